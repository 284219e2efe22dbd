// The Hadamard transform of groups of neighbours: sums and differences in the reference's order, so its bits.
#include "common.h"

// Steps of 1, 2 and 4 on eight neighbours, in registers.
template <class C>
static inline void eight(const C* __restrict x, C* __restrict out) {
  C a[8], b[8];
  for (int i = 0; i < 8; i += 2) a[i] = x[i] + x[i + 1], a[i + 1] = x[i] - x[i + 1];
  for (int i = 0; i < 8; i += 4) {
    b[i] = a[i] + a[i + 2], b[i + 1] = a[i + 1] + a[i + 3];
    b[i + 2] = a[i] - a[i + 2], b[i + 3] = a[i + 1] - a[i + 3];
  }
  for (int i = 0; i < 4; ++i) out[i] = b[i] + b[i + 4], out[i + 4] = b[i] - b[i + 4];
}

template <class C>
static void group(const C* x, int64_t width, bool back, C* out) {
  int64_t step = 1;
  if (width >= 8) {
    for (int64_t i = 0; i < width; i += 8) eight(x + i, out + i);
    step = 8;
  } else {
    for (int64_t i = 0; i < width; ++i) out[i] = x[i];
  }
  for (; step < width; step *= 2) {
    for (int64_t at = 0; at < width; at += 2 * step) {
      C *__restrict low = out + at, *__restrict high = low + step;
      for (int64_t i = 0; i < step; ++i) {
        C sum = low[i] + high[i], difference = low[i] - high[i];
        low[i] = sum, high[i] = difference;
      }
    }
  }
  if (back) {
    const C part = C(1) / C(width);  // a power of two, so as exact as the division
    for (int64_t i = 0; i < width; ++i) out[i] *= part;
  }
}

template <class C>
static void all(const C* x, C* out, const int64_t* lengths, int64_t leaves, int64_t width, bool back, int threads) {
  int64_t start = 0;
  for (int64_t leaf = 0; leaf < leaves; start += lengths[leaf++]) {
    const int64_t n = lengths[leaf], groups = n / width;
    if (n % width) {
      std::memcpy(out + start, x + start, n * sizeof(C));
      continue;
    }
    const int parts = pieces(n, threads);
    parallel(parts, [&](int k) {
      const int64_t end = k + 1 == parts ? groups : groups / parts * (k + 1);
      for (int64_t i = groups / parts * k; i < end; ++i) {
        group(x + start + i * width, width, back, out + start + i * width);
      }
    });
  }
}

EXPORT void hadamard(const void* x, void* out, const int64_t* lengths, int64_t leaves, int64_t width, int back,
                     int wide, int threads) {
  if (wide) all(static_cast<const double*>(x), static_cast<double*>(out), lengths, leaves, width, back, threads);
  else all(static_cast<const float*>(x), static_cast<float*>(out), lengths, leaves, width, back, threads);
}
