// AdamW and Adam in one pass, as torch's fused kernel computes whole vectors: the same operations, fused and not, in the
// same order for every value, wherever it lies. Gradients are read and not written.
#include "common.h"

#include <cmath>
#include <limits>

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
  double multiply, divide;  // of gradients: before they are rounded to their dtype, and after it
  int decoupled, dtype, threads;
};

// x / by of many x that are roots of floats, or 0, inf, nan: correctly rounded without a division, which is the slowest
// thing here. The first quotient is within 2 units of its last place, the second within one, and so the last is exact
// (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990).
template <class C>
struct Quotient {
  C by, part;
  explicit Quotient(C by) : by(by), part(C(1) / by) {}
  C operator()(C x) const {
    if constexpr (sizeof(C) == 8) return x / by;  // what is rooted may be so small that remainders are
    C first = x * part;
    C second = std::fma(std::fma(-by, first, x), part, first);
    C third = std::fma(std::fma(-by, second, x), part, second);
    return x <= std::numeric_limits<C>::max() ? third : x;
  }
};

template <class T, bool decoupled, bool decays, bool near>
static void move(const Call& c, const Leaf& leaf, int64_t begin, int64_t end) {
  using C = Wide<T>;
  T* __restrict p = static_cast<T*>(leaf.param);
  const T* __restrict g = static_cast<const T*>(leaf.grad);
  T* __restrict m = static_cast<T*>(leaf.mu);
  T* __restrict v = static_cast<T*>(leaf.nu);
  const C size = C(-(c.lr / (1 - std::pow(c.beta1, c.updates))));
  const Quotient<C> corrected(C(std::sqrt(1 - std::pow(c.beta2, c.updates))));
  const C keep = C(1 - c.lr * c.weight_decay), decay = C(c.weight_decay), eps = C(c.eps);
  const C weight = C(1 - c.beta1), beta2 = C(c.beta2), weight2 = C(1 - c.beta2);
  const C multiply = C(c.multiply), divide = C(c.divide);
  for (int64_t i = begin; i < end; ++i) {
    C param = widen(p[i]), grad = widen(g[i]), mu = widen(m[i]), nu = widen(v[i]);
    if constexpr (std::is_same_v<T, float>) {
      grad = grad / divide;
    } else {
      T rounded;
      narrow(C(grad * multiply), rounded);
      grad = widen(rounded);
    }
    if constexpr (decays && decoupled) param = param * keep;
    if constexpr (decays && !decoupled) grad = std::fma(param, decay, grad);
    // a weighted mean from its nearer end, as torch.lerp
    mu = near ? std::fma(weight, grad - mu, mu) : std::fma(weight - 1, grad - mu, grad);
    nu = std::fma(weight2 * grad, grad, nu * beta2);
    param = param + size * mu / (corrected(std::sqrt(nu)) + eps);
    narrow(mu, m[i]);
    narrow(nu, v[i]);
    narrow(param, p[i]);
  }
}

template <class T>
static void chosen(const Call& c, const Leaf& leaf, int64_t begin, int64_t end) {
  const bool near = std::fabs(Wide<T>(1 - c.beta1)) < Wide<T>(0.5);
  auto with_near = [&](auto decoupled, auto decays) {
    if (near) move<T, decltype(decoupled)::value, decltype(decays)::value, true>(c, leaf, begin, end);
    else move<T, decltype(decoupled)::value, decltype(decays)::value, false>(c, leaf, begin, end);
  };
  if (c.weight_decay == 0) with_near(std::true_type{}, std::false_type{});
  else if (c.decoupled) with_near(std::true_type{}, std::true_type{});
  else with_near(std::false_type{}, std::true_type{});
}

EXPORT void update(const Call* call) {
  const Call& c = *call;
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
        if (begin < end) chosen<T>(c, c.leaves[j], begin, end);
      }
    });
  });
}
