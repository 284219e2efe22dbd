"""AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101; Adam: Kingma and Ba,
arXiv 1412.6980.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import number
from funczero.core.optimizer import Formula, GradientTransformation, Smooth
from funczero.core.straight import root
from funczero.kernels.adamw.reference import Rates as KernelRates
from funczero.kernels.registry import kernel
from funczero.optim.count import zero
from funczero.optim.rate import Beta, Rate, lasting, one_for_all
from funczero.optim.rates import Rates
from funczero.transforms.formula import optimizer


class AdamW(NamedTuple):
    """Moments like the parameters, in their dtype, the number of applied updates, and the rates lr, weight_decay, b1
    and b2.
    """

    count: Tensor  # float32, as torch's kernel wants it
    mu: Any
    nu: Any
    rates: Any = ()


class Scalars(NamedTuple):
    """What the kernel takes beside the leaves."""

    count: Tensor
    found: Tensor  # 1 where the update is skipped
    factor: Tensor
    rates: dict[str, Any]


def adamw(
    lr: Rate, b1: Beta = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: Rate = 0.01
) -> GradientTransformation:
    """p <- p (1 - lr wd) - lr m' / (sqrt(v') + eps), with m', v' the bias-corrected moments of the gradient and its
    square.

    Elementwise: each value depends on its own place alone. The formula is torch's fused kernel, bit for bit.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree; DeepSpeed: optimizer.params.lr.
      b1, b2: decay of the moments per update, in [0, 1); b1 may be a schedule (DeepSpeed: OneCycle's momentum).
      eps: added to the root of the second moment; positive.
      weight_decay: decoupled, per update times lr; number, schedule, rules or tree.
    """
    return _adam("adamw", lr, b1, b2, eps, weight_decay)


def adam(
    lr: Rate, b1: Beta = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: Rate = 0.0
) -> GradientTransformation:
    """p <- p - lr m' / (sqrt(v') + eps): as adamw, with wd p added to the gradient before its moments.

    Args: as adamw's; DeepSpeed: optimizer.type Adam with adam_w_mode false.
    """
    return _adam("adam", lr, b1, b2, eps, weight_decay)


def _adam(name: str, lr: Rate, b1: Beta, b2: float, eps: float, weight_decay: Rate) -> GradientTransformation:
    eps = number(name, "eps", eps, above=True)
    b1, b2 = one_for_all(name, "b1", b1), one_for_all(name, "b2", b2, moves=False)
    rate = Rates(name, lr=lr, weight_decay=weight_decay, b1=b1, b2=b2)

    def init(params: Any) -> AdamW:
        kept = rate.init(params)
        lasting(name, eps, params)
        mu, nu = (tree.map(torch.zeros_like, params) for _ in range(2))
        return AdamW(zero(params), mu, nu, kept)

    def smooth(p: Tensor, g: Tensor, moments: list[Tensor], s: Scalars) -> tuple[Tensor, list[Tensor]]:
        lr, decay, beta1, beta2 = (s.rates[what] for what in ("lr", "weight_decay", "b1", "b2"))
        if name == "adamw":
            p = p * (1 - lr * decay)
        else:
            g = g + decay * p
        mu, nu = (b * m + (1 - b) * x for b, m, x in zip((beta1, beta2), moments, (g, g * g), strict=True))
        n = s.count.double().clamp(min=1)  # of a first update that is skipped: no 0 / 0 in what nobody takes
        step = lr * mu / (1 - beta1**n) / (root(nu) / (1 - beta2**n).sqrt() + eps)
        return p - step, [mu, nu]

    def scalars(state: AdamW, now: list[dict[str, Any]], factor: Tensor, ok: Tensor) -> tuple[AdamW, list[Scalars]]:
        n, found = state.count + ok, (~ok).float()
        return state._replace(count=n), [Scalars(n, found, factor, each) for each in now]

    def leaf(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], s: Scalars) -> None:
        beta1, beta2, decay = (float(s.rates[what]) for what in ("b1", "b2", "weight_decay"))
        rates = KernelRates(s.rates["lr"], beta1, beta2, decay, eps, name == "adamw")
        kernel("adamw", s.count.device).update(params, grads, *moments, s.count, s.factor, s.found, rates)

    return optimizer(
        name, init, Formula(rate.reads(), lambda s: [s.mu, s.nu], scalars, leaf, smooth=Smooth(rate.smooth, smooth))
    )
