"""Stochastic gradient descent with momentum: Polyak 1964, in torch's form."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import flag
from funczero.core.types import GradientTransformation
from funczero.layout.slots import Slots
from funczero.optim import rates


class SGD(NamedTuple):
    """The number of applied updates, and the momentum buffers (None without momentum)."""

    count: Tensor
    trace: Any


def sgd(lr: rates.Rate, momentum: float = 0.0, nesterov: bool = False, weight_decay: rates.Rate = 0.0) -> GradientTransformation:
    """p <- p - lr u, with g' = g + wd p, t <- momentum t + g', and u = t (or g' + momentum t with nesterov; g' without momentum).

    Elementwise: each value depends on its own place alone.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree.
      momentum: in [0, 1).
      weight_decay: added to the gradient (not decoupled); number, schedule, rules or tree.
    """
    rate, momentum = rates.Rates("sgd", lr, weight_decay), rates.one_for_all("sgd", "momentum", momentum, moves=False)
    if flag("sgd", "nesterov", nesterov) and not momentum:
        raise ValueError("sgd: momentum=0.0 leaves nesterov=True nothing to look ahead with; write a momentum above 0, or leave nesterov out")

    def init(params: Any) -> SGD:
        rate.fit(params)
        leaf = next(iter(tree.tensors(params)), torch.zeros(()))
        return SGD(torch.zeros((), dtype=torch.float32, device=leaf.device), tree.map(torch.zeros_like, params) if momentum else None)

    def update(grads: Any, state: SGD, params: Any) -> tuple[Any, SGD]:
        step, decay = rate.trees(state.count, params)
        g = tree.map(lambda g, p, d: g + d * p, grads, params, decay)
        trace = tree.map(lambda t, x: momentum * t + x, state.trace, g) if momentum else None
        u = g if trace is None else tree.map(lambda x, t: x + momentum * t, g, trace) if nesterov else trace
        return tree.map(lambda a, x: -a * x, step, u), SGD(state.count + 1, trace)

    def apply(params: Slots, grads: Slots, factor: Tensor, state: SGD, ok: Tensor) -> tuple[Slots, SGD, dict[str, Tensor]]:
        zero = torch.zeros((), dtype=grads.buffers[0].dtype, device=ok.device)
        traces = (state.trace,) if momentum else ()
        groups, shown = rate.groups(state.count, params, grads, *traces)
        for a, decay, (p, g, *t) in groups:
            for i, (x, y) in enumerate(zip(p, g, strict=True)):
                y.mul_(factor.to(y.dtype))
                y = y.add_(x * decay) if isinstance(decay, Tensor) else y.add_(x, alpha=decay) if decay else y
                if momentum:
                    t[0][i].copy_(torch.where(ok, momentum * t[0][i] + y, t[0][i]))
                    y = y + momentum * t[0][i] if nesterov else t[0][i]
                x.sub_(torch.where(ok, y * a, zero))
        return params, SGD(state.count + ok, state.trace), {"lr": shown}

    return GradientTransformation(init, update, apply, "sgd", elementwise=True)
