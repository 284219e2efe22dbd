"""Stochastic gradient descent with momentum: Polyak 1964, in torch's form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import flag, number
from funczero.core.optimizer import Formula, GradientTransformation, Smooth
from funczero.optim.count import Scalars, counted, zero
from funczero.optim.rate import Rate, one_for_all
from funczero.optim.rates import Rates
from funczero.transforms.formula import optimizer

TAKE = "taken"  # how much of the gradient goes into the momentum in an update, beside its rates


class SGD(NamedTuple):
    """The number of applied updates, the momentum buffers (() without momentum), and the rates lr, weight_decay
    and momentum.
    """

    count: Tensor
    trace: Any
    rates: Any = ()


def sgd(
    lr: Rate, momentum: float = 0.0, nesterov: bool = False, weight_decay: Rate = 0.0, dampening: float = 0.0
) -> GradientTransformation:
    """p <- p - lr u, with g' = g + wd p, t <- momentum t + (1 - dampening) g', and u = t (or g' + momentum t with
    nesterov; g' without momentum). The first t is g'.

    Elementwise: each value depends on its own place alone.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree.
      momentum: in [0, 1).
      weight_decay: added to the gradient (not decoupled); number, schedule, rules or tree.
      dampening: in [0, 1); 0 with nesterov.
    """
    momentum = one_for_all("sgd", "momentum", momentum, moves=False)
    if flag("sgd", "nesterov", nesterov) and not momentum:
        raise ValueError(
            "sgd: momentum=0.0 leaves nesterov=True nothing to look ahead with; write a momentum above 0, or leave"
            " nesterov out"
        )
    dampening = number("sgd", "dampening", dampening, high=1.0)
    if dampening and (nesterov or not momentum):
        why = "and nesterov are not one formula" if nesterov else "damps a momentum, and there is none"
        raise ValueError(f"sgd: dampening={dampening:g} {why}; leave one of them out")
    rate = Rates("sgd", lr=lr, weight_decay=weight_decay, **({"momentum": momentum} if momentum else {}))

    def init(params: Any) -> SGD:
        return SGD(zero(params), tree.map(torch.zeros_like, params) if momentum else (), rate.init(params))

    def leaf(params: list[Tensor], grads: list[Tensor], traces: list[list[Tensor]], s: Scalars) -> None:
        lr, decay, beta = s.rates["lr"], s.rates["weight_decay"], s.rates.get("momentum", 0.0)
        factor, zero = s.of(grads)
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            g.mul_(factor)
            g = g.add_(p * decay) if isinstance(decay, Tensor) else g.add_(p, alpha=decay) if decay else g
            if traces:
                t = traces[0][i]
                t.copy_(torch.where(s.ok, beta * t + (g * s.rates[TAKE].to(g.dtype) if dampening else g), t))
                g = g + beta * t if nesterov else t
            p.sub_(torch.where(s.ok, g * lr, zero))

    def smooth(p: Tensor, g: Tensor, traces: list[Tensor], s: Scalars) -> tuple[Tensor, list[Tensor]]:
        g = g + s.rates["weight_decay"] * p
        traces = [s.rates["momentum"] * t + (g * s.rates[TAKE].to(g.dtype) if dampening else g) for t in traces]
        for t in traces:
            g = g + s.rates["momentum"] * t if nesterov else t
        return p - s.rates["lr"] * g, traces

    def scalars(state: SGD, now: list[dict[str, Any]], factor: Tensor, ok: Tensor) -> tuple[SGD, list[Scalars]]:
        if dampening:
            take = torch.where(state.count == 0, 1.0, 1 - torch.tensor(dampening, dtype=torch.float64))
            now = [{**each, TAKE: take} for each in now]
        return counted(state, now, factor, ok)

    held = lambda s: [s.trace] if momentum else []  # () has no leaf, where vmap would find a None
    return optimizer("sgd", init, Formula(rate.reads(), held, scalars, leaf, smooth=Smooth(rate.smooth, smooth)))
