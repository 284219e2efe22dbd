// Sums of squares as integers: the reference's, chunk by chunk. A chunk is read twice: for its largest square, which
// fixes the grid, and for its sums. An integer is what the bits of a float grow by when a multiple of its unit is added.
#include "common.h"

#include <cmath>

static const int WIDTH = 32, LOW = -704, BINS = 48;  // as in reference.py
static const int64_t CHUNK = 1 << 18;

struct Part {
  const void* values;
  int64_t n;
};

struct Call {
  const Part* parts;
  int64_t count;
  int64_t* out;  // [1 + BINS], or twice as many bins where wide: zeros
  int wide, dtype, threads;
};

// The sums of K folds, each 2**32 times finer than the one before; the last values' rest is dropped.
template <int K, class S>
static void add(const S* __restrict x, int64_t n, double grid, uint64_t* sums) {
  uint64_t found[3] = {0, 0, 0};
  const double one = grid, two = one * 0x1p-32, three = two * 0x1p-32;
  for (int64_t i = 0; i < n; ++i) {
    const double d = widen(x[i]), y = d * d, s = y + one, rest = y - (s - one), t = rest + two;
    found[0] += cast<uint64_t>(s);
    found[1] += cast<uint64_t>(t);
    if constexpr (K > 2) found[2] += cast<uint64_t>((rest - (t - two)) + three);
  }
  const double grids[3] = {one, two, three};
  for (int k = 0; k < K; ++k) sums[k] += found[k] - uint64_t(n) * cast<uint64_t>(grids[k]);
}

template <class S>
static void chunk(const std::vector<Part>& parts, bool wide, int64_t* out) {
  constexpr int K = sizeof(S) == 8 ? 3 : 2;
  uint64_t most = 0;
  for (const Part& p : parts) {
    const uint64_t here = largest(static_cast<const S*>(p.values), p.n);
    most = here > most ? here : most;
  }
  const double top = cast<double>(most) * cast<double>(most);
  if (!(top < power(LOW + WIDTH * BINS - 1))) {
    ++out[0];
    return;
  }
  int exponent = 0;
  const bool even = std::frexp(top, &exponent) == 0.5;
  int64_t level = top > 0 ? (exponent - even - LOW) / WIDTH : 0;
  level = level < K - 1 ? K - 1 : level;
  const double grid = 1.5 * power(level * WIDTH + LOW + 52);
  uint64_t sums[3] = {0, 0, 0};
  for (const Part& p : parts) add<K>(static_cast<const S*>(p.values), p.n, grid, sums);
  for (int k = 0; k < K; ++k) {
    const int64_t units = int64_t(sums[k]);
    if (wide) out[1 + BINS + level - k] += units >> WIDTH;
    out[1 + level - k] += wide ? units & ((int64_t(1) << WIDTH) - 1) : units;
  }
}

// As the reference cuts them: a part that does not fit whole into what is left of a chunk begins another.
static std::vector<std::vector<Part>> chunks(const Call& c, int64_t size) {
  std::vector<std::vector<Part>> out;
  int64_t room = 0;
  for (int64_t k = 0; k < c.count; ++k) {
    for (int64_t start = 0; start < c.parts[k].n; start += CHUNK) {
      const int64_t left = c.parts[k].n - start, n = left < CHUNK ? left : CHUNK;
      if (n > room) {
        out.emplace_back();
        room = CHUNK;
      }
      out.back().push_back({static_cast<const char*>(c.parts[k].values) + start * size, n});
      room -= n;
    }
  }
  return out;
}

EXPORT void square_bins(const Call* call) {
  const Call& c = *call;
  with(c.dtype, [&](auto s) {
    using S = decltype(s);
    const auto all = chunks(c, sizeof(S));
    const int parts = int(int64_t(all.size()) < c.threads ? all.size() : c.threads);
    std::vector<std::vector<int64_t>> found(parts, std::vector<int64_t>(1 + 2 * BINS));
    parallel(parts, [&](int k) {
      for (size_t i = k; i < all.size(); i += parts) chunk<S>(all[i], c.wide, found[k].data());
    });
    for (const auto& one : found) {
      for (int k = 0; k <= BINS * (1 + c.wide); ++k) c.out[k] += one[k];
    }
  });
}
