"""Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.optimizer import Formula, GradientTransformation, Smooth
from funczero.optim.count import Scalars, counted, zero
from funczero.optim.rate import Beta, Rate, one_for_all
from funczero.optim.rates import Rates
from funczero.transforms.formula import optimizer


class Lion(NamedTuple):
    """The number of applied updates, a momentum like the parameters, in their dtype, and the rates lr, weight_decay,
    b1 and b2.
    """

    count: Tensor
    mu: Any
    rates: Any = ()


def lion(lr: Rate, b1: Beta = 0.9, b2: float = 0.99, weight_decay: Rate = 0.0) -> GradientTransformation:
    """p <- p - lr (sign(b1 m + (1 - b1) g) + wd p), then m <- b2 m + (1 - b2) g.

    Elementwise: each value depends on its own place alone.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree; a third to a tenth of AdamW's.
      b1, b2: in [0, 1); b1 may be a schedule. DeepSpeed's defaults are (0.9, 0.999), the paper's (0.9, 0.99).
      weight_decay: decoupled; number, schedule, rules or tree.
    """
    b1, b2 = one_for_all("lion", "b1", b1), one_for_all("lion", "b2", b2, moves=False)
    rate = Rates("lion", lr=lr, weight_decay=weight_decay, b1=b1, b2=b2)

    def init(params: Any) -> Lion:
        return Lion(zero(params), tree.map(torch.zeros_like, params), rate.init(params))

    def leaf(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], s: Scalars) -> None:
        (momenta,), (factor, _) = moments, s.of(grads)
        beta1, beta2 = float(s.rates["b1"]), float(s.rates["b2"])
        for p, g, m in zip(params, grads, momenta, strict=True):
            g = torch.where(s.ok, g.mul_(factor), 0.0)
            move = torch.lerp(g, m, beta1).sign_().add_(p * s.rates["weight_decay"]).mul_(s.rates["lr"])
            p.sub_(torch.where(s.ok, move, 0.0))
            m.copy_(torch.where(s.ok, torch.lerp(g, m, beta2), m))

    def smooth(p: Tensor, g: Tensor, momenta: list[Tensor], s: Scalars) -> tuple[Tensor, list[Tensor]]:
        lr, decay, beta1, beta2 = (s.rates[what] for what in ("lr", "weight_decay", "b1", "b2"))
        move = (beta1 * momenta[0] + (1 - beta1) * g).sign()  # whose derivative is 0
        return p - lr * (move + decay * p), [beta2 * momenta[0] + (1 - beta2) * g]

    return optimizer(
        "lion", init, Formula(rate.reads(), lambda s: [s.mu], counted, leaf, smooth=Smooth(rate.smooth, smooth))
    )
