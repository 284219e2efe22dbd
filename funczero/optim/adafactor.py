"""Adafactor: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv 1804.04235."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core.number import flag, number, whole
from funczero.core.optimizer import Across, Asked, Formula, Found, GradientTransformation
from funczero.optim.count import zero
from funczero.optim.matrices import scaled
from funczero.optim.rate import Rate
from funczero.optim.rates import Rates
from funczero.transforms.deal import owned
from funczero.transforms.formula import optimizer


class Adafactor(NamedTuple):
    """The number of applied updates; of leaves with two dims and more the mean squares of rows and of columns, of
    others those of values, whole with each leaf's owner; and the rates lr and weight_decay.
    """

    count: Tensor
    row_var: Any
    col_var: Any
    variance: Any
    rates: Any = ()


class Scalars(NamedTuple):
    """What the formula takes beside the leaves."""

    ok: Tensor
    factor: Tensor
    rates: dict[str, Any]
    count: Tensor  # float64


def adafactor(
    lr: Rate = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: Rate = 0.0,
    small: int = 1 << 10,
    relative: bool = True,
) -> GradientTransformation:
    """p <- p (1 - lr wd) - a u / max(1, rms(u) / d), with u = g / max(sqrt(v), eps_1), v the outer product of its row
    and column means over the mean, which follow g^2 by 1 - n^beta2_decay, and a = max(eps_2, rms(p)) min(lr, 1/sqrt n).

    Law: the bits of the unsharded update at every stage and world. Rows of the gradient travel to the leaf's owner and
    rows of u come back: 2 b N (W - 1) / W^2 bytes a rank over both ways where W ranks cut N values of b bytes evenly.
    Factored states travel never; rms(p) is an exact sum of integers.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree.
      beta2_decay: at most 0.
      eps: least root of v (None: that of the dtype), and the least rms of a parameter.
      d: clips the root mean square of an update; at least 1.
      weight_decay: decoupled, per update times lr; number, schedule, rules or tree.
      small: leaves of fewer values are computed by every rank.
      relative: False: a is lr itself, and eps_1^2 is added to g^2 in place of the least root.

    Source: torch.optim.Adafactor, with its use of lr and eps; relative=False is Hugging Face's with scale_parameter and
    relative_step False, as its Trainer has it.
    """
    if number("adafactor", "beta2_decay", beta2_decay, low=-math.inf) > 0:
        raise ValueError(f"adafactor: beta2_decay={beta2_decay} is above 0; write a number of at most 0")
    eps1 = None if eps[0] is None else number("adafactor", "eps[0]", eps[0])
    eps2, d = number("adafactor", "eps[1]", eps[1]), number("adafactor", "d", d, low=1.0)
    rate = Rates("adafactor", lr=lr, weight_decay=weight_decay)
    if not flag("adafactor", "relative", relative) and not eps1:
        raise ValueError(f"adafactor: eps={eps} adds nothing to the squares of relative=False; write eps=(1e-15, 1e-3)")
    added = 0.0 if relative or eps1 is None else eps1 * eps1

    def init(params: Any) -> Adafactor:
        row, col, full = (
            owned(name, params, across, shape)
            for name, shape in (("row_var", _row), ("col_var", _col), ("variance", _full))
        )
        return Adafactor(zero(params), row, col, full, rate.init(params))

    def scalars(
        state: Adafactor, now: list[dict[str, Any]], factor: Tensor, ok: Tensor
    ) -> tuple[Adafactor, list[Scalars]]:
        n = state.count + ok
        return state._replace(count=n), [Scalars(ok, factor, each, n.double().clamp(min=1)) for each in now]

    def ready(params: list[Tensor], grads: list[Tensor], _: list[list[Tensor]], s: Scalars) -> Asked:
        scaled(grads, s)
        return Asked(norms=[params] if relative else [], rows=[grads])

    def computed(values: list[Tensor], states: list[Tensor], s: Scalars) -> Tensor:
        (g,), least = values, torch.finfo(values[0].dtype).eps if eps1 is None else eps1
        follow = (s.count**beta2_decay).to(g.dtype)
        square = g * g if relative else g * g + added
        means = [square.mean(dim, keepdim=True) for dim in (-1, -2)] if g.dim() > 1 else [square]
        new = [torch.lerp(v, x, follow) for v, x in zip(states, means, strict=True)]
        for v, x in zip(states, new, strict=True):
            v.copy_(torch.where(s.ok, x, v))
        if not relative:
            u = (
                g * new[0].rsqrt()
                if g.dim() < 2
                else g * (new[0] / new[0].mean(-2, keepdim=True)).rsqrt() * new[1].rsqrt()
            )
        else:
            v = new[0] if g.dim() < 2 else new[0] @ new[1] / new[0].mean(-2, keepdim=True).clamp(min=least)
            u = v.clamp(min=least * least).rsqrt().mul_(g)
        return u / (u.norm() / (u.numel() ** 0.5 * d)).clamp(min=1.0)

    def leaf(params: list[Tensor], grads: list[Tensor], _: Any, s: Scalars, found: Found) -> None:
        lr, decay = s.rates["lr"], s.rates["weight_decay"]
        step = torch.minimum(torch.as_tensor(lr, dtype=torch.float64), s.count**-0.5)
        if not relative:
            for p, u in zip(params, found.rows, strict=True):
                p.copy_(torch.where(s.ok, p * (1 - lr * decay) - u * lr, p))
            return
        for p, u, norm, shape in zip(params, found.rows, *found.norms, found.shapes, strict=True):
            size = (norm / math.prod(shape) ** 0.5).clamp(min=eps2)
            new = p * (1 - lr * decay) - u * (size * step).to(u.dtype)
            p.copy_(torch.where(s.ok, new, p))

    across = Across(
        ready,
        computed,
        own=lambda s: [s.row_var, s.col_var, s.variance],
        small=whole("adafactor", "small", small, low=0),
    )
    return optimizer("adafactor", init, Formula(rate.reads(), lambda s: [], scalars, leaf, across=across), "leafwise")


def _row(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return (*shape[:-1], 1) if len(shape) > 1 else None


def _col(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return (*shape[:-2], 1, shape[-1]) if len(shape) > 1 else None


def _full(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return shape if len(shape) < 2 else None
