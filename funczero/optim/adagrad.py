"""Adagrad: Duchi, Hazan and Singer, "Adaptive Subgradient Methods", JMLR 12 (2011)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import number
from funczero.core.optimizer import Formula, GradientTransformation, Smooth
from funczero.core.straight import root
from funczero.optim.count import Scalars, counted, zero
from funczero.optim.rate import Rate, lasting
from funczero.optim.rates import Rates
from funczero.transforms.formula import optimizer


class Adagrad(NamedTuple):
    """The number of applied updates, the sum of squared gradients, and the rates lr and weight_decay."""

    count: Tensor
    nu: Any
    rates: Any = ()


def adagrad(lr: Rate = 1e-2, eps: float = 1e-10, weight_decay: Rate = 0.0) -> GradientTransformation:
    """p <- p - lr g' / (sqrt(v) + eps), with g' = g + wd p and v <- v + g' g'.

    Elementwise: each value depends on its own place alone.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree.
      eps: added to the root; positive.
      weight_decay: added to the gradient (not decoupled); number, schedule, rules or tree.
    """
    eps, rate = number("adagrad", "eps", eps, above=True), Rates("adagrad", lr=lr, weight_decay=weight_decay)

    def init(params: Any) -> Adagrad:
        kept = rate.init(params)
        lasting("adagrad", eps, params)
        return Adagrad(zero(params), tree.map(torch.zeros_like, params), kept)

    def leaf(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], s: Scalars) -> None:
        (sums,), (factor, _) = moments, s.of(grads)
        for p, g, v in zip(params, grads, sums, strict=True):
            g = torch.where(s.ok, g.mul_(factor).add_(p * s.rates["weight_decay"]), 0.0)
            v.addcmul_(g, g)
            p.sub_(g.mul_(s.rates["lr"]).div_(v.sqrt().add_(eps)))

    def smooth(p: Tensor, g: Tensor, sums: list[Tensor], s: Scalars) -> tuple[Tensor, list[Tensor]]:
        g = g + s.rates["weight_decay"] * p
        v = sums[0] + g * g
        return p - s.rates["lr"] * g / (root(v) + eps), [v]

    return optimizer(
        "adagrad", init, Formula(rate.reads(), lambda s: [s.nu], counted, leaf, smooth=Smooth(rate.smooth, smooth))
    )
