// What all kernels share: 16-bit floats as bits, and threads. Plain C++17, so that a file takes seconds to compile.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Dtype { HALF, BFLOAT, SINGLE, DOUBLE };  // as in native.py

struct half {
  uint16_t bits;
};
struct bfloat {
  uint16_t bits;
};

template <class To, class From>
inline To cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// --- reading: exact, and without arithmetic on subnormal floats, which a processor may be told to flush ---
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat x) { return cast<float>(uint32_t(x.bits) << 16); }
inline float widen(half x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  uint32_t normal = (rest << 13) + (112u << 23);
  uint32_t small = cast<uint32_t>(float(int32_t(rest)) * 0x1p-24f);
  uint32_t far = (rest << 13) | 0x7f800000u;
  uint32_t found = rest >= 0x7c00 ? far : rest < 0x0400 ? small : normal;
  return cast<float>(found | sign);
}

// --- rounding to nearest, ties to even; a double goes through float, as in torch ---
inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(double x, float& to) { to = float(x); }
inline void narrow(float x, double& to) { to = x; }
inline void narrow(float x, bfloat& to) {
  uint32_t bits = cast<uint32_t>(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void narrow(float x, half& to) {
  uint32_t bits = cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, a = bits & 0x7fffffff;
  uint32_t normal = (a + 0xc8000fffu + ((a >> 13) & 1)) >> 13;
  uint32_t small = cast<uint32_t>(cast<float>(a) + 0.5f) - 0x3f000000u;
  uint32_t far = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  to.bits = uint16_t(sign | (a >= 0x47800000u ? far : a < 0x38800000u ? small : normal));
}
inline void narrow(double x, bfloat& to) { narrow(float(x), to); }
inline void narrow(double x, half& to) { narrow(float(x), to); }

template <class S>
using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;  // what a dtype is computed in

// 2.0 ** exponent, from -1022 to 1023.
inline double power(int64_t exponent) { return cast<double>((exponent + 1023) << 52); }

// The largest magnitude as the bits of a double; what is not finite as those of inf, or more.
template <class S>
inline uint64_t largest(const S* x, int64_t n) {
  if constexpr (sizeof(S) == 8) {
    int64_t top = 0;
    for (int64_t i = 0; i < n; ++i) {
      int64_t bits = cast<int64_t>(x[i]) & std::numeric_limits<int64_t>::max();
      top = bits > top ? bits : top;
    }
    return top;
  } else {
    using Bits = std::conditional_t<sizeof(S) == 4, int32_t, int16_t>;
    Bits top = 0;
    for (int64_t i = 0; i < n; ++i) {
      Bits bits = cast<Bits>(x[i]) & std::numeric_limits<Bits>::max();
      top = bits > top ? bits : top;
    }
    double found = widen(cast<S>(top));
    return cast<uint64_t>(found) & ~(1ull << 63);
  }
}

// The call of a function template with the type of a dtype.
template <class F>
inline void with(int dtype, F f) {
  switch (dtype) {
    case HALF: return f(half{});
    case BFLOAT: return f(bfloat{});
    case SINGLE: return f(float{});
    default: return f(double{});
  }
}

// f(k) for every k below `parts`, each in a thread of its own where there is one to be had.
template <class F>
inline void parallel(int parts, F f) {
  std::vector<std::thread> threads;
  threads.reserve(parts);
  for (int k = 1; k < parts; ++k) {
    try {
      threads.emplace_back(f, k);
    } catch (const std::system_error&) {
      f(k);
    }
  }
  if (parts > 0) f(0);
  for (auto& t : threads) t.join();
}

// How many parts n values are worth: a thread costs about as much as 1 << 16 of them.
inline int pieces(int64_t n, int threads) {
  int64_t most = n >> 16;
  return int(most < 1 ? 1 : most < threads ? most : threads);
}
