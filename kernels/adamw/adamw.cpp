// AdamW and Adam in one pass, as torch's fused kernel computes whole vectors: the same operations, fused and not, in
// the same order for every value, wherever it lies. Gradients are read and not written.
#include "common.h"

#include <cmath>

struct Leaf {
  void* param;
  const void* grad;
  void *mu, *nu;
  int64_t n;
};

struct Call {
  const Leaf* leaves;
  int64_t count;
  double lr, beta1, beta2, weight_decay, eps, updates;
  double multiply, divide;  // of gradients: of float32 by division, of others before they are rounded to their dtype
  double size, correction;  // written here: of the step, and of the second moment's root
  int decoupled, dtype, threads;
};

// How gradients are scaled: they are multiplied and rounded to their dtype; or, in float32, divided by a number, for
// which a power of two is multiplied, with the same bits in three quarters of the time.
enum Scale { ROUNDED, MULTIPLIED, DIVIDED };

static bool is_power(double x) {
  int exponent;
  return x > 0x1p-100 && x < 0x1p100 && std::frexp(x, &exponent) == 0.5;
}

template <class T, Scale scale, bool decoupled, bool decays>
static void move(const Call& c, const Leaf& leaf, int64_t begin, int64_t end) {
  using C = Wide<T>;
  T* __restrict p = static_cast<T*>(leaf.param);
  const T* __restrict g = static_cast<const T*>(leaf.grad);
  T* __restrict m = static_cast<T*>(leaf.mu);
  T* __restrict v = static_cast<T*>(leaf.nu);
  const C size = C(c.size), correction = C(c.correction), eps = C(c.eps);
  const C keep = C(1 - c.lr * c.weight_decay), decay = C(c.weight_decay);
  const C multiply = C(scale == ROUNDED ? c.multiply : 1 / c.divide), divide = C(c.divide);
  const C weight = C(1 - c.beta1), beta2 = C(c.beta2), weight2 = C(1 - c.beta2);
  const bool near = weight < C(0.5);
  const C toward = near ? weight : weight - 1;
  for (int64_t i = begin; i < end; ++i) {
    C param = widen(p[i]), grad = widen(g[i]), mu = widen(m[i]), nu = widen(v[i]);
    if constexpr (scale == ROUNDED) {
      T rounded;
      narrow(C(grad * multiply), rounded);
      grad = widen(rounded);
    } else {
      grad = scale == MULTIPLIED ? grad * multiply : grad / divide;
    }
    if constexpr (decays && decoupled) param = param * keep;
    if constexpr (decays && !decoupled) grad = std::fma(param, decay, grad);
    mu = std::fma(toward, grad - mu, near ? mu : grad);  // a weighted mean from its nearer end, as torch.lerp
    nu = std::fma(weight2 * grad, grad, nu * beta2);
    param = param + size * mu / (std::sqrt(nu) / correction + eps);
    narrow(mu, m[i]);
    narrow(nu, v[i]);
    narrow(param, p[i]);
  }
}

template <class T, Scale scale>
static void chosen(const Call& c, const Leaf& leaf, int64_t begin, int64_t end) {
  if (c.weight_decay == 0) move<T, scale, true, false>(c, leaf, begin, end);
  else if (c.decoupled) move<T, scale, true, true>(c, leaf, begin, end);
  else move<T, scale, false, true>(c, leaf, begin, end);
}

EXPORT void update(Call* call) {
  const Call& c = *call;
  call->size = -(c.lr / (1 - std::pow(c.beta1, c.updates)));
  call->correction = std::sqrt(1 - std::pow(c.beta2, c.updates));
  int64_t total = 0;
  for (int64_t j = 0; j < c.count; ++j) total += c.leaves[j].n;
  const int parts = pieces(total, c.threads);
  with(c.dtype, [&](auto t) {
    using T = decltype(t);
    parallel(parts, [&](int k) {
      const int64_t low = total / parts * k, high = k + 1 == parts ? total : total / parts * (k + 1);
      int64_t start = 0;
      for (int64_t j = 0; j < c.count; start += c.leaves[j++].n) {
        const int64_t begin = low > start ? low - start : 0;
        const int64_t end = high - start < c.leaves[j].n ? high - start : c.leaves[j].n;
        if (begin >= end) continue;
        if constexpr (!std::is_same_v<T, float>) chosen<T, ROUNDED>(c, c.leaves[j], begin, end);
        else if (is_power(c.divide)) chosen<T, MULTIPLIED>(c, c.leaves[j], begin, end);
        else chosen<T, DIVIDED>(c, c.leaves[j], begin, end);
      }
    });
  });
}
