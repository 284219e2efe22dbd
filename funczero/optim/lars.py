"""LARS: You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import number
from funczero.core.optimizer import Across, Asked, Formula, Found, GradientTransformation
from funczero.optim.count import Scalars, counted, zero
from funczero.optim.matrices import scaled
from funczero.optim.rate import Rate, one_for_all
from funczero.optim.rates import Rates
from funczero.transforms.formula import optimizer


class Lars(NamedTuple):
    """The number of applied updates, the momentum buffers, and the rates lr, weight_decay and momentum."""

    count: Tensor
    trace: Any
    rates: Any = ()


def lars(
    lr: Rate, momentum: float = 0.9, weight_decay: Rate = 0.0, trust: float = 1e-3, eps: float = 0.0
) -> GradientTransformation:
    """p <- p - v, with v <- momentum v + lr t (g + wd p) and t = trust |p| / (|g| + wd |p| + eps) of each leaf, or 1
    where |p| or |g| is 0.

    Law: the same bits on any mesh: norms are exact sums of integers, one for all leaves, and no rows travel.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree.
      momentum: in [0, 1).
      weight_decay: number, schedule, rules or tree.
      trust: the paper's eta; positive.
      eps: added below.

    Source: algorithm 1 of the paper.
    """
    trust, eps = number("lars", "trust", trust, above=True), number("lars", "eps", eps)
    momentum = one_for_all("lars", "momentum", momentum, moves=False)
    rate = Rates("lars", lr=lr, weight_decay=weight_decay, momentum=momentum)

    def init(params: Any) -> Lars:
        return Lars(zero(params), tree.map(torch.zeros_like, params), rate.init(params))

    def ready(params: list[Tensor], grads: list[Tensor], _: list[list[Tensor]], s: Scalars) -> Asked:
        scaled(grads, s)
        return Asked(norms=[params, grads])

    def leaf(params: list[Tensor], grads: list[Tensor], traces: list[list[Tensor]], s: Scalars, found: Found) -> None:
        lr, decay = s.rates["lr"], s.rates["weight_decay"]
        for p, g, v, a, b in zip(params, grads, *traces, *found.norms, strict=True):
            t = torch.where((a > 0) & (b > 0), trust * a / (b + decay * a + eps), 1.0)
            new = s.rates["momentum"] * v + (g + p * decay) * (t * lr).to(g.dtype)
            v.copy_(torch.where(s.ok, new, v))
            p.sub_(torch.where(s.ok, v, 0.0))

    formula = Formula(rate.reads(), lambda s: [s.trace], counted, leaf, across=Across(ready))
    return optimizer("lars", init, formula, "leaf_norms")
