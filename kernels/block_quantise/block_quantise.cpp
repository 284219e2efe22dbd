// Block quantisation, one block at a time: its largest magnitude, then its codes, while it lies in the cache nearest.
// Every value goes through the reference's own operations in their order, so the bits are the reference's.
#include "common.h"

#include <cmath>
#include <limits>

#define NOINLINE __attribute__((noinline))  // once in the library, however many call it

enum Form { INT8, INT4, E4M3, E5M2 };  // as in cpu.py

// --- the largest magnitude, compared as bits, which keeps nan ---
template <class C>
NOINLINE static C absmax(const C* x, int64_t n) {
  using Bits = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;  // of a positive number: signed compares as well
  const Bits positive = std::numeric_limits<Bits>::max();
  Bits top = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits = cast<Bits>(x[i]) & positive;
    top = bits > top ? bits : top;
  }
  C found = cast<C>(top);
  const Bits nan = sizeof(C) == 8 ? Bits(0x7ff8LL << 48) : Bits(0x7fc00000);
  return found <= std::numeric_limits<C>::max() ? found : cast<C>(nan);
}

// --- codes ---
// To even: a sum with 1.5 * 2**23 has no fraction, and its low bits are the integer.
inline uint8_t rounded(float x) { return uint8_t(cast<uint32_t>(x + 12582912.0f)); }
inline uint8_t rounded(double x) { return uint8_t(cast<uint64_t>(x + 6755399441055744.0)); }

template <class C>
inline C clamped(C x, C top) {
  x = x < -top ? -top : x;
  return x > top ? top : x;
}

// Of magnitudes up to the largest finite code, rounded to even.
template <Form form>
inline uint8_t eight(float x) {
  constexpr int kept = form == E4M3 ? 3 : 2, bias = form == E4M3 ? 7 : 15;
  constexpr uint32_t least = uint32_t(128 - bias) << 23, unit = uint32_t(127 + 24 - bias - kept) << 23;
  uint32_t bits = cast<uint32_t>(x), sign = bits >> 31 << 7, a = bits & 0x7fffffff;
  uint32_t small = cast<uint32_t>(cast<float>(a) + cast<float>(unit)) - unit;
  uint32_t odd = (a >> (23 - kept)) & 1;
  uint32_t normal = (a - (uint32_t(127 - bias) << 23) + (1u << (22 - kept)) - 1 + odd) >> (23 - kept);
  return uint8_t(sign | (a < least ? small : normal));
}

template <Form form, class C>
constexpr C limit() {
  return form == INT8 ? C(127) : form == INT4 ? C(7) : form == E4M3 ? C(448) : C(57344);
}

template <Form form, class C>
inline uint8_t coded(C scaled) {
  if constexpr (form == INT8 || form == INT4) return rounded(scaled);
  else return eight<form>(float(scaled));
}

// x / by, correctly rounded and without a division, which is the slowest thing here: a first quotient within a unit of
// its last place is made exact by one correction, one within two units by two (Markstein, "Computation of elementary
// functions on the IBM RISC System/6000 processor", 1990). Where x is so small that a remainder is not exact, its code
// is 0 either way. The sign of a zero is lost.
struct Quotient {
  float by, part;
  bool works, once;

  explicit Quotient(float by) : by(by), part(1 / by), works(false), once(false) {
#ifdef __FP_FAST_FMAF
    works = by > 0x1p-60f && by < 0x1p60f;
    once = std::fabs(std::fma(part, by, -1.0f)) < 0x1p-25f;
#endif
  }

  template <bool twice>
  float of(float x) const {
    float found = x * part;
    if constexpr (twice) found = std::fma(std::fma(-by, found, x), part, found);
    return std::fma(std::fma(-by, found, x), part, found);
  }
};

template <Form form, bool twice>
NOINLINE static void code_by(const float* __restrict x, const Quotient by, int64_t n, uint8_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    float scaled = by.of<twice>(x[i]) * limit<form, float>();
    uint32_t sign = cast<uint32_t>(x[i]) & 0x80000000u;
    out[i] = coded<form, float>(form == INT8 || form == INT4 ? scaled : cast<float>(cast<uint32_t>(scaled) | sign));
  }
}

// A block with inf or nan: what is not finite counts as 0, and the rest is clamped.
template <Form form, class C>
NOINLINE static void code_odd(const C* x, const C* draws, int64_t n, uint8_t* out) {
  const C top = limit<form, C>();
  for (int64_t i = 0; i < n; ++i) {
    C scaled = x[i] * top;
    if (!(std::fabs(scaled) <= std::numeric_limits<C>::max())) scaled = 0;
    if (draws) {
      C below = std::floor(scaled);
      scaled = below + C(draws[i] < scaled - below);
    }
    out[i] = coded<form, C>(clamped(scaled, top));
  }
}

template <Form form, class C>
NOINLINE static void code(const C* __restrict x, const C* __restrict draws, C top, int64_t n, uint8_t* __restrict out) {
  const C largest = limit<form, C>();
  if (!(top >= 0)) return code_odd<form, C>(x, draws, n, out);
  const C divisor = top > 0 ? top : C(1);
  if constexpr (std::is_same_v<C, float>) {
    const Quotient by(divisor);
    if (by.works && !draws) return by.once ? code_by<form, false>(x, by, n, out) : code_by<form, true>(x, by, n, out);
  }
  if (draws) {
    for (int64_t i = 0; i < n; ++i) {
      C scaled = x[i] / divisor * largest, below = std::floor(scaled);
      out[i] = coded<form, C>(clamped(below + C(draws[i] < scaled - below), largest));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = coded<form, C>(x[i] / divisor * largest);
  }
}

// Codes from place `start` on, two to a byte: the first in the low bits. An odd last one has a code of 0 beside it.
NOINLINE static void join(const uint8_t* __restrict codes, int64_t start, int64_t n, uint8_t* __restrict out) {
  if (n && start % 2) {
    uint8_t& byte = out[start / 2];
    byte = uint8_t((byte & 15) | ((codes[0] + 8) << 4));
    ++codes, ++start, --n;
  }
  out += start / 2;
  for (int64_t i = 0; i < n / 2; ++i) {
    uint16_t pair;
    std::memcpy(&pair, codes + 2 * i, 2);
    pair = uint16_t((pair & 0x0f0f) ^ 0x0808);  // + 8 of each, with no carry
    out[i] = uint8_t(pair | (pair >> 4));
  }
  if (n % 2) out[n / 2] = uint8_t(((codes[n - 1] + 8) & 15) | 0x80);
}

NOINLINE static void split(const uint8_t* __restrict joined, int64_t start, int64_t n, uint8_t* __restrict codes) {
  if (n && start % 2) {
    *codes++ = uint8_t((joined[start / 2] >> 4) - 8);
    ++start, --n;
  }
  joined += start / 2;
  for (int64_t i = 0; i < n / 2; ++i) {
    uint32_t byte = joined[i];
    uint16_t pair = uint16_t(((byte | (byte << 4)) & 0x0f0f) + 0x7878) ^ 0x8080;  // - 8 of each, with no borrow
    std::memcpy(codes + 2 * i, &pair, 2);
  }
  if (n % 2) codes[n - 1] = uint8_t((joined[n / 2] & 15) - 8);
}

// --- values of codes, before their block's magnitude ---
template <Form form, class C>
struct Values {
  C by_code[256];
  Values() {
    for (int code = 0; code < 256; ++code) {
      if constexpr (form == INT8 || form == INT4) {
        by_code[code] = C(int8_t(code)) / limit<form, C>();
      } else {
        constexpr int kept = form == E4M3 ? 3 : 2, bias = form == E4M3 ? 7 : 15;
        int exponent = (code & 127) >> kept, rest = code & ((1 << kept) - 1);
        C x = std::ldexp(C(exponent ? (1 << kept) | rest : rest), (exponent ? exponent : 1) - bias - kept);
        if (form == E4M3 ? (code & 127) == 127 : exponent == 31) {
          x = form == E5M2 && !rest ? std::numeric_limits<C>::infinity() : std::numeric_limits<C>::quiet_NaN();
        }
        by_code[code] = (code & 128 ? -x : x) / limit<form, C>();
      }
    }
  }
};

template <Form form, class C>
NOINLINE static void read(const uint8_t* __restrict codes, C top, int64_t n, const Values<form, C>& values,
                          C* __restrict out) {
  if constexpr (form == INT8 || form == INT4) {
    const C largest = limit<form, C>();
    for (int64_t i = 0; i < n; ++i) out[i] = C(int8_t(codes[i])) / largest * top;
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = values.by_code[codes[i]] * top;
  }
}

// --- blocks ---
// Calls f(start, size, number) for the blocks of part k out of `parts`. A block belongs to the part in which it starts,
// but one that begins inside a byte goes with the one before it.
template <class F>
static void blocks(const int64_t* lengths, int64_t leaves, int64_t block, int64_t n, int k, int parts, F f) {
  const int64_t low = n / parts * k, high = k + 1 == parts ? n : n / parts * (k + 1);
  int64_t start = 0, number = 0;
  bool mine = false;
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    for (int64_t left = lengths[leaf]; left > 0; ++number) {
      int64_t size = left < block ? left : block;
      if (start % 2 == 0) mine = start >= low && start < high;
      if (mine) f(start, size, number);
      start += size, left -= size;
    }
  }
}

struct Call {
  const int64_t* lengths;
  int64_t leaves, block, n;
  const void *x, *draws, *read_codes, *read_tops;  // null: to nearest; nothing is read
  void *out, *tops;
  int dtype, threads;  // dtype: of x, or of the values that are read
};

// Some values in another dtype, beginning at a place.
template <class C>
NOINLINE static void take(const void* from, int dtype, int64_t start, int64_t n, C* __restrict out) {
  with(dtype, [&](auto s) {
    const auto* __restrict at = static_cast<const decltype(s)*>(from) + start;
    for (int64_t i = 0; i < n; ++i) out[i] = C(widen(at[i]));
  });
}

template <class C>
NOINLINE static void give(const C* __restrict x, int dtype, int64_t start, int64_t n, void* to) {
  with(dtype, [&](auto d) {
    auto* __restrict at = static_cast<decltype(d)*>(to) + start;
    for (int64_t i = 0; i < n; ++i) narrow(x[i], at[i]);
  });
}

template <class C>
static bool same(int dtype) {
  return dtype == (sizeof(C) == 8 ? DOUBLE : SINGLE);
}

// Room of one thread for a block.
template <class C>
struct Room {
  std::vector<C> wide, added;
  std::vector<uint8_t> codes;
  explicit Room(const Call& c) : wide(c.block < c.n ? c.block : c.n), added(wide.size()), codes(wide.size()) {}
};

template <Form form, class C>
static void read_block(const Call& c, Room<C>& room, int64_t start, int64_t size, int64_t number, C* out) {
  static const Values<form, C> values;
  const uint8_t* codes = static_cast<const uint8_t*>(c.read_codes);
  if constexpr (form == INT4) split(codes, start, size, room.codes.data());
  const C top = static_cast<const C*>(c.read_tops)[number];
  read<form, C>(form == INT4 ? room.codes.data() : codes + start, top, size, values, out);
}

template <Form form, class C>
static void quantised(const Call& c) {
  uint8_t* out = static_cast<uint8_t*>(c.out);
  const int parts = pieces(c.n, c.threads);
  parallel(parts, [&](int k) {
    Room<C> room(c);
    blocks(c.lengths, c.leaves, c.block, c.n, k, parts, [&](int64_t start, int64_t size, int64_t number) {
      const C* x = static_cast<const C*>(c.x) + start;
      if (!same<C>(c.dtype)) {
        take<C>(c.x, c.dtype, start, size, room.added.data());
        x = room.added.data();
      }
      if (c.read_codes) {
        read_block<form, C>(c, room, start, size, number, room.wide.data());
        for (int64_t i = 0; i < size; ++i) room.wide[i] += x[i];
        x = room.wide.data();
      }
      const C top = static_cast<C*>(c.tops)[number] = absmax<C>(x, size);
      uint8_t* codes = form == INT4 ? room.codes.data() : out + start;
      code<form, C>(x, c.draws ? static_cast<const C*>(c.draws) + start : nullptr, top, size, codes);
      if constexpr (form == INT4) join(codes, start, size, out);
    });
  });
}

template <Form form, class C>
static void dequantised(const Call& c) {
  const int parts = pieces(c.n, c.threads);
  parallel(parts, [&](int k) {
    Room<C> room(c);
    blocks(c.lengths, c.leaves, c.block, c.n, k, parts, [&](int64_t start, int64_t size, int64_t number) {
      C* x = same<C>(c.dtype) ? static_cast<C*>(c.out) + start : room.wide.data();
      read_block<form, C>(c, room, start, size, number, x);
      if (!same<C>(c.dtype)) give<C>(x, c.dtype, start, size, c.out);
    });
  });
}

template <Form form>
static void with_form(const Call& c, bool reads) {
  return reads ? dequantised<form, float>(c) : quantised<form, float>(c);  // twice the forms take twice the compiler
}

static void run(const Call& c, int form, bool reads) {
  switch (form) {
    case INT8: return with_form<INT8>(c, reads);
    case INT4: return with_form<INT4>(c, reads);
    case E4M3: return with_form<E4M3>(c, reads);
    default: return with_form<E5M2>(c, reads);
  }
}

// Quantises x; with read_codes, what these read as plus x.
EXPORT void quantise(const Call* call, int form) { run(*call, form, false); }

EXPORT void dequantise(const Call* call, int form) { run(*call, form, true); }
