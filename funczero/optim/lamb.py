"""LAMB: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", arXiv 1904.00962."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import number
from funczero.core.optimizer import Across, Asked, Formula, Found, GradientTransformation
from funczero.optim.count import zero
from funczero.optim.rate import Beta, Rate, lasting, one_for_all
from funczero.optim.rates import Rates
from funczero.transforms.formula import optimizer


class Lamb(NamedTuple):
    """Moments like the parameters, in their dtype, the number of applied updates, and the rates lr, weight_decay, b1
    and b2.
    """

    count: Tensor
    mu: Any
    nu: Any
    rates: Any = ()


class Scalars(NamedTuple):
    """What the formula takes beside the leaves."""

    ok: Tensor
    factor: Tensor
    rates: dict[str, Any]
    first: Tensor  # what m and v are divided by
    second: Tensor
    after: Tensor  # what lr is multiplied by


def lamb(
    lr: Rate,
    b1: Beta = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: Rate = 0.0,
    low: float = 0.0,
    high: float = math.inf,
    corrected: str = "moments",
) -> GradientTransformation:
    """p <- p - lr t u, with u = m' / (sqrt(v') + eps) + wd p and t = |p| / |u| of each leaf, or 1 where either is 0.

    m' and v' are the bias-corrected moments of the gradient and its square. Law: the same bits on any mesh: norms are
    exact sums of integers, one for all leaves, and no rows travel.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree.
      b1, b2: decay of the moments per update, in [0, 1); b1 may be a schedule.
      eps: added to the root of the second moment; positive.
      weight_decay: number, schedule, rules or tree.
      low, high: t is held between them (DeepSpeed: min_coeff, max_coeff).
      corrected: "moments"; "rate": lr is multiplied by sqrt(1 - b2^n) / (1 - b1^n) and the moments stay as they are,
        as DeepSpeed and apex do, so that norms are those of uncorrected updates; "none".

    Source: algorithm 2 of the paper; the bounds stand for its phi.
    """
    eps = number("lamb", "eps", eps, above=True)
    low = number("lamb", "low", low)
    high = high if high == math.inf else number("lamb", "high", high, low=low)
    if corrected not in ("moments", "rate", "none"):
        raise ValueError(f"lamb: corrected={corrected!r} is none of 'moments', 'rate' and 'none'; write one of them")
    b1, b2 = one_for_all("lamb", "b1", b1), one_for_all("lamb", "b2", b2, moves=False)
    rate = Rates("lamb", lr=lr, weight_decay=weight_decay, b1=b1, b2=b2)

    def init(params: Any) -> Lamb:
        kept = rate.init(params)
        lasting("lamb", eps, params)
        mu, nu = (tree.map(torch.zeros_like, params) for _ in range(2))
        return Lamb(zero(params), mu, nu, kept)

    def scalars(state: Lamb, now: list[dict[str, Any]], factor: Tensor, ok: Tensor) -> tuple[Lamb, list[Scalars]]:
        count = state.count + ok
        n, out = count.double().clamp(min=1), []
        for each in now:
            c1, c2 = (1 - torch.as_tensor(each[b], dtype=torch.float64) ** n for b in ("b1", "b2"))
            one = torch.ones_like(n)
            first, second = (c1, c2.sqrt()) if corrected == "moments" else (one, one)
            out.append(Scalars(ok, factor, each, first, second, c2.sqrt() / c1 if corrected == "rate" else one))
        return state._replace(count=count), out

    def ready(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], s: Scalars) -> Asked:
        beta1, beta2 = float(s.rates["b1"]), float(s.rates["b2"])
        for g, m, v in zip(grads, *moments, strict=True):
            g = torch.where(s.ok, g.mul_(s.factor.to(g.dtype)), 0.0)
            m.copy_(torch.where(s.ok, torch.lerp(g, m, beta1), m))
            v.copy_(torch.where(s.ok, torch.lerp(g * g, v, beta2), v))
        for p, g, m, v in zip(params, grads, *moments, strict=True):
            u = m.div(s.first.to(m.dtype)).div_(v.sqrt().div_(s.second.to(v.dtype)).add_(eps))
            g.copy_(u.add_(p * s.rates["weight_decay"]))
        return Asked(norms=[params, grads])

    def leaf(params: list[Tensor], moves: list[Tensor], _: Any, s: Scalars, found: Found) -> None:
        for p, u, a, b in zip(params, moves, *found.norms, strict=True):
            trust = torch.where((a > 0) & (b > 0), (a / b).clamp(low, high), 1.0)
            p.sub_(torch.where(s.ok, u * (trust * s.after * s.rates["lr"]).to(u.dtype), 0.0))

    formula = Formula(rate.reads(), lambda s: [s.mu, s.nu], scalars, leaf, across=Across(ready))
    return optimizer("lamb", init, formula, "leaf_norms")
