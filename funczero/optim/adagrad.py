"""Adagrad: Duchi, Hazan and Singer, "Adaptive Subgradient Methods", JMLR 12 (2011)."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import number
from funczero.core.types import GradientTransformation
from funczero.layout.slots import Slots
from funczero.optim import rates


class Adagrad(NamedTuple):
    """The number of applied updates, and the sum of squared gradients."""

    count: Tensor
    nu: Any


def adagrad(lr: rates.Rate = 1e-2, eps: float = 1e-10, weight_decay: rates.Rate = 0.0) -> GradientTransformation:
    """p <- p - lr g' / (sqrt(v) + eps), with g' = g + wd p and v <- v + g' g'.

    Elementwise: each value depends on its own place alone.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree.
      eps: added to the root; positive.
      weight_decay: added to the gradient (not decoupled); number, schedule, rules or tree.
    """
    rate, eps = rates.Rates("adagrad", lr, weight_decay), number("adagrad", "eps", eps, above=True)

    def init(params: Any) -> Adagrad:
        rate.fit(params)
        rates.lasting("adagrad", eps, params)
        leaf = next(iter(tree.tensors(params)), torch.zeros(()))
        return Adagrad(torch.zeros((), dtype=torch.float32, device=leaf.device), tree.map(torch.zeros_like, params))

    def update(grads: Any, state: Adagrad, params: Any) -> tuple[Any, Adagrad]:
        step, decay = rate.trees(state.count, params)
        g = tree.map(lambda g, p, d: g + d * p, grads, params, decay)
        nu = tree.map(lambda v, x: v + x * x, state.nu, g)
        return tree.map(lambda x, v, a: -a * x / (v.sqrt() + eps), g, nu, step), Adagrad(state.count + 1, nu)

    def apply(params: Slots, grads: Slots, factor: Tensor, state: Adagrad, ok: Tensor) -> tuple[Slots, Adagrad, dict[str, Tensor]]:
        groups, shown = rate.groups(state.count, params, grads, state.nu)
        for a, decay, (ps, gs, vs) in groups:
            for p, g, v in zip(ps, gs, vs, strict=True):
                g = torch.where(ok, g.mul_(factor.to(g.dtype)).add_(p * decay), 0.0)
                v.addcmul_(g, g)
                p.sub_(g.mul_(a).div_(v.sqrt().add_(eps)))
        return params, Adagrad(state.count + ok, state.nu), {"lr": shown}

    return GradientTransformation(init, update, apply, "adagrad", elementwise=True)
