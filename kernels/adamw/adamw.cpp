// AdamW and Adam in one pass, as torch's fused kernel computes whole vectors: the same operations in the same order for
// every value, wherever it lies. Gradients are read and not written.
#include "common.h"

#include <cmath>

struct Rates {
  double lr, beta1, beta2, weight_decay, eps;
};

struct Leaf {
  void *param, *grad, *mu, *nu;
  int64_t n;
};

// T: the dtype of all four; C: what it is computed in.
template <class T, class C, bool decoupled, bool scaled, bool small>
static void move(const Leaf& leaf, int64_t begin, int64_t end, const Rates& r, double step, C multiply, C divide) {
  T* __restrict p = static_cast<T*>(leaf.param);
  const T* __restrict g = static_cast<const T*>(leaf.grad);
  T* __restrict m = static_cast<T*>(leaf.mu);
  T* __restrict v = static_cast<T*>(leaf.nu);
  const C size = C(-(r.lr / (1 - std::pow(r.beta1, step))));
  const C root = C(std::sqrt(1 - std::pow(r.beta2, step)));
  const C keep = C(1 - r.lr * r.weight_decay), decay = C(r.weight_decay), eps = C(r.eps);
  const C weight = C(1 - r.beta1), beta2 = C(r.beta2), weight2 = C(1 - r.beta2);
  for (int64_t i = begin; i < end; ++i) {
    C param = widen(p[i]), grad = widen(g[i]), mu = widen(m[i]), nu = widen(v[i]);
    if constexpr (!std::is_same_v<T, float>) {
      T rounded;
      narrow(C(grad * multiply), rounded);
      grad = widen(rounded);
    }
    if constexpr (scaled) grad = grad / divide;
    if constexpr (decoupled) {
      param = param * keep;
    } else {
      grad = grad + param * decay;
    }
    // a weighted mean from the nearer end, as torch.lerp
    if constexpr (small) {
      mu = std::fma(weight, grad - mu, mu);
    } else {
      mu = std::fma(weight - 1, grad - mu, grad);
    }
    nu = std::fma(weight2 * grad, grad, nu * beta2);
    param = param + size * mu / (std::sqrt(nu) / root + eps);
    narrow(mu, m[i]);
    narrow(nu, v[i]);
    narrow(param, p[i]);
  }
}
EXPORT void trial(Leaf* leaf, double lr, double b1, double b2, double wd, double eps, double step, float divide){
  Rates r{lr,b1,b2,wd,eps};
  move<float,float,true,true,true>(*leaf,0,leaf->n,r,step,1.f,divide);
}
