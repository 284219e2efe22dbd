// Floats to integers on a grid and back: the reference's sums, one piece of a leaf at a time. The largest magnitude of
// a piece is found first, so that the loop over values need not ask which of them are large.
#include "common.h"

#include <cmath>

static const int HALF_BITS = 46, OFFSET = 2048, BAD = 4095;  // as in reference.py
static const int64_t PIECE = 2048;                           // values whose sums lie in the nearest cache
static const double MAGIC = 6755399441055744.0;              // 1.5 * 2**52: adding it rounds to an integer, to even

struct Call {
  const void* rows;
  int64_t count, width;  // of rows, of values in each
  const int64_t* bounds;  // pairs
  int64_t leaves;
  const int64_t* shifts;
  int64_t *low, *tops;
  int dtype, threads;
};

template <class S>
static void add(const S* __restrict x, int64_t n, double scale, int64_t* __restrict low) {
  const uint64_t magic = cast<uint64_t>(MAGIC);
  for (int64_t i = 0; i < n; ++i) {
    double rounded = double(widen(x[i])) * scale + MAGIC;
    low[i] = int64_t(uint64_t(low[i]) + (cast<uint64_t>(rounded) - magic));
  }
}

// The same where values may be split, too large to count, or not finite.
template <class S>
static void add_any(const S* x, int64_t n, double scale, int64_t* low) {
  const double half = power(HALF_BITS), most = power(2 * HALF_BITS);
  for (int64_t i = 0; i < n; ++i) {
    double d = double(widen(x[i])) * scale;
    if (!(std::fabs(d) < most)) continue;
    double halves = std::fabs(d) < half ? 0 : std::nearbyint(d / half);
    low[i] = int64_t(uint64_t(low[i]) + uint64_t(int64_t(std::nearbyint(d - halves * half))));
  }
}

template <class S>
static void one(const Call& c, int64_t leaf, int64_t start, int64_t n, uint64_t& top) {
  const double scale = power(c.shifts[leaf]);
  for (int64_t row = 0; row < c.count; ++row) {
    const S* x = static_cast<const S*>(c.rows) + row * c.width + start;
    const uint64_t here = largest(x, n);
    top = here > top ? here : top;
    if (cast<double>(here) * scale < power(HALF_BITS)) add(x, n, scale, c.low + start);
    else add_any(x, n, scale, c.low + start);
  }
}

static int64_t coded(uint64_t bits) {
  if (!bits) return 0;
  if (bits >= 0x7ff0000000000000ull) return BAD;
  int exponent;
  std::frexp(cast<double>(bits), &exponent);
  return exponent + OFFSET;
}

// Calls f(leaf, start, size) for the pieces of thread k out of `parts`.
template <class F>
static void walk(const int64_t* bounds, int64_t leaves, int64_t width, int k, int parts, F f) {
  const int64_t low = width / parts * k, high = k + 1 == parts ? width : width / parts * (k + 1);
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    const int64_t begin = bounds[2 * leaf] > low ? bounds[2 * leaf] : low;
    const int64_t end = bounds[2 * leaf + 1] < high ? bounds[2 * leaf + 1] : high;
    for (int64_t start = begin; start < end; start += PIECE) {
      f(leaf, start, end - start < PIECE ? end - start : PIECE);
    }
  }
}

EXPORT void to_grid_add(const Call* call) {
  const Call& c = *call;
  with(c.dtype, [&](auto s) {
    using S = decltype(s);
    const int parts = pieces(c.width, c.threads);
    std::vector<std::vector<uint64_t>> tops(parts, std::vector<uint64_t>(c.leaves));
    parallel(parts, [&](int k) {
      walk(c.bounds, c.leaves, c.width, k, parts, [&](int64_t leaf, int64_t start, int64_t n) {
        one<S>(c, leaf, start, n, tops[k][leaf]);
      });
    });
    for (int64_t leaf = 0; leaf < c.leaves; ++leaf) {
      uint64_t top = 0;
      for (int k = 0; k < parts; ++k) top = tops[k][leaf] > top ? tops[k][leaf] : top;
      c.tops[leaf] = coded(top);
    }
  });
}

// An integer of 64 bits as a double, to nearest even: its halves are exact, and their sum is rounded once.
static inline double real(int64_t x) {
  double high = cast<double>(((uint64_t(x) >> 32) ^ 0x80000000ull) | 0x4530000000000000ull);  // 2**84 + 2**63 more
  double low = cast<double>((uint64_t(x) & 0xffffffffull) | 0x4330000000000000ull);          // 2**52 more
  return (high - cast<double>(0x4530000080100000ull)) + low;
}

struct Back {
  const int64_t *low, *high;  // high: null where nothing was split
  int64_t width;
  const int64_t* bounds;
  int64_t leaves;
  const int64_t* shifts;
  void* out;
  int dtype, threads;
};

EXPORT void from_grid(const Back* call) {
  const Back& c = *call;
  with(c.dtype, [&](auto d) {
    using D = decltype(d);
    const int parts = pieces(c.width, c.threads);
    parallel(parts, [&](int k) {
      walk(c.bounds, c.leaves, c.width, k, parts, [&](int64_t leaf, int64_t start, int64_t n) {
        const double unit = power(-c.shifts[leaf]), half = power(HALF_BITS - c.shifts[leaf]);
        const int64_t* __restrict low = c.low + start;
        D* __restrict out = static_cast<D*>(c.out) + start;
        if (c.high) {
          const int64_t* __restrict high = c.high + start;
          for (int64_t i = 0; i < n; ++i) narrow(real(low[i]) * unit + real(high[i]) * half, out[i]);
        } else {
          for (int64_t i = 0; i < n; ++i) narrow(real(low[i]) * unit, out[i]);
        }
      });
    });
  });
}
