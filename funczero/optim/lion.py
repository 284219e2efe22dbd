"""Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.types import GradientTransformation
from funczero.layout.slots import Slots
from funczero.optim import rates


class Lion(NamedTuple):
    """The number of applied updates, and a momentum like the parameters, in their dtype."""

    count: Tensor
    mu: Any


def lion(lr: rates.Rate, b1: rates.Beta = 0.9, b2: float = 0.99, weight_decay: rates.Rate = 0.0) -> GradientTransformation:
    """p <- p - lr (sign(b1 m + (1 - b1) g) + wd p), then m <- b2 m + (1 - b2) g.

    Elementwise: each value depends on its own place alone.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree; a third to a tenth of AdamW's.
      b1, b2: in [0, 1); b1 may be a schedule. DeepSpeed's defaults are (0.9, 0.999), the paper's (0.9, 0.99).
      weight_decay: decoupled; number, schedule, rules or tree.
    """
    rate = rates.Rates("lion", lr, weight_decay)
    b1, b2 = rates.one_for_all("lion", "b1", b1), rates.one_for_all("lion", "b2", b2, moves=False)

    def init(params: Any) -> Lion:
        rate.fit(params)
        leaf = next(iter(tree.tensors(params)), torch.zeros(()))
        return Lion(torch.zeros((), dtype=torch.float32, device=leaf.device), tree.map(torch.zeros_like, params))

    def update(grads: Any, state: Lion, params: Any) -> tuple[Any, Lion]:
        beta, (step, decay) = float(rates.at("lion", "b1", b1, state.count, 1.0)), rate.trees(state.count, params)
        updates = tree.map(lambda m, g, p, a, d: -a * ((beta * m + (1 - beta) * g).sign() + d * p), state.mu, grads, params, step, decay)
        return updates, Lion(state.count + 1, tree.map(lambda m, g: b2 * m + (1 - b2) * g, state.mu, grads))

    def apply(params: Slots, grads: Slots, factor: Tensor, state: Lion, ok: Tensor) -> tuple[Slots, Lion, dict[str, Tensor]]:
        beta = float(rates.at("lion", "b1", b1, state.count, 1.0))
        groups, shown = rate.groups(state.count, params, grads, state.mu)
        for a, decay, (ps, gs, ms) in groups:
            for p, g, m in zip(ps, gs, ms, strict=True):
                g = torch.where(ok, g.mul_(factor.to(g.dtype)), 0.0)
                move = torch.lerp(g, m, beta).sign_().add_(p * decay).mul_(a)
                p.sub_(torch.where(ok, move, 0.0))
                m.copy_(torch.where(ok, torch.lerp(g, m, b2), m))
        return params, Lion(state.count + ok, state.mu), {"lr": shown}

    return GradientTransformation(init, update, apply, "lion", elementwise=True)
