"""Shampoo: Gupta, Koren and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", arXiv 1802.09568."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import number, whole
from funczero.core.optimizer import Across, Formula, Found, GradientTransformation
from funczero.layout.slots import Slots
from funczero.optim.count import zero
from funczero.optim.matrices import each, left_of, right_of, rows_of
from funczero.optim.rate import Rate, one_for_all
from funczero.optim.rates import Rates
from funczero.optim.shapes import refuse_shapes
from funczero.transforms.deal import owned
from funczero.transforms.formula import optimizer


class Shampoo(NamedTuple):
    """The number of applied updates, the momentum in rows like the parameters (() without), sums of g g' and of g' g,
    whole with each leaf's owner, in float32 or wider, their roots where they last for several updates, and the rates
    lr, weight_decay and momentum.
    """

    count: Tensor
    trace: Any
    left: Any
    right: Any
    roots: Any = ()
    rates: Any = ()


class Scalars(NamedTuple):
    """What the formula takes beside the leaves."""

    ok: Tensor
    factor: Tensor
    rates: dict[str, Any]
    fresh: bool  # are roots taken in this update?


def shampoo(
    lr: Rate,
    momentum: float = 0.0,
    weight_decay: Rate = 0.0,
    eps: float = 1e-4,
    b2: float = 1.0,
    every: int = 1,
    small: int = 1 << 10,
) -> GradientTransformation:
    """p <- p (1 - lr wd) - lr t, with L <- b2 L + g g', R <- b2 R + g' g, u = (L + eps 1)^(-1/4) g (R + eps 1)^(-1/4)
    and t <- momentum t + u.

    Law: the bits of the unsharded update at every stage and world. Momentum rests in rows; rows of the gradient travel
    to the owner of the matrix, who has L and R, and rows of u come back: 2 b N (W - 1) / W^2 bytes a rank over both
    ways where W ranks cut N values of b bytes evenly. A leaf of 3 dims is a batch of matrices, computed one by one;
    where it is cut along dim 0 nothing of it travels.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree.
      momentum: in [0, 1).
      weight_decay: decoupled, per update times lr; number, schedule, rules or tree.
      eps: positive.
      b2: 1 is the paper's sum; less forgets.
      every: applied updates for which a root is kept; more than one keeps roots as states, too.
      small: matrices of fewer values are computed by every rank.

    Raises:
      ValueError: at init: a leaf of less than 2 dims or of more than 3; by path.

    Source: algorithm 1 of the paper.
    """
    eps = number("shampoo", "eps", eps, above=True)
    momentum, every = one_for_all("shampoo", "momentum", momentum, moves=False), whole("shampoo", "every", every)
    b2 = 1.0 if type(b2) in (int, float) and b2 == 1 else number("shampoo", "b2", b2, high=1.0)
    rate = Rates("shampoo", lr=lr, weight_decay=weight_decay, **({"momentum": momentum} if momentum else {}))

    def init(params: Any) -> Shampoo:
        refuse_shapes("shampoo", params)
        leaf = params.buffers[0] if isinstance(params, Slots) else next(iter(tree.tensors(params)))
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        made = [
            owned(name, params, across, shape, dtype)
            for name, shape in (
                ("left", left_of),
                ("right", right_of),
                ("left_root", left_of),
                ("right_root", right_of),
            )
        ]
        trace = tree.map(torch.zeros_like, params) if momentum else ()
        roots = dict(zip(("left", "right"), made[2:], strict=True)) if every > 1 else ()
        return Shampoo(zero(params), trace, made[0], made[1], roots, rate.init(params))

    def scalars(state: Shampoo, now: list[dict[str, Any]], factor: Tensor, ok: Tensor) -> tuple[Shampoo, list[Scalars]]:
        fresh = every == 1 or int(state.count) % every == 0
        return state._replace(count=state.count + ok), [Scalars(ok, factor, each, fresh) for each in now]

    def one(g: Tensor, states: list[Tensor], s: Scalars) -> Tensor:
        wide = g.to(states[0].dtype)
        sums = [b2 * states[0] + wide @ wide.T, b2 * states[1] + wide.T @ wide]
        roots = [inverse_root(x, eps) for x in sums] if s.fresh else states[2:]
        for x, new in zip(states, [*sums, *roots], strict=False):
            x.copy_(torch.where(s.ok, new, x))
        return (roots[0] @ wide @ roots[1]).to(g.dtype)

    def leaf(params: list[Tensor], grads: list[Tensor], traces: list[list[Tensor]], s: Scalars, found: Found) -> None:
        lr, decay = s.rates["lr"], s.rates["weight_decay"]
        for k, (p, u) in enumerate(zip(params, found.rows, strict=True)):
            if traces:
                t = traces[0][k]
                u = t.mul(s.rates["momentum"]).add_(u)
                t.copy_(torch.where(s.ok, u, t))
            p.copy_(torch.where(s.ok, p * (1 - lr * decay) - u * lr, p))

    across = Across(
        rows_of,
        each(one),
        own=lambda s: [s.left, s.right, *([s.roots["left"], s.roots["right"]] if every > 1 else [])],
        cost=_cost,
        dims=lambda shape: 2,
        small=whole("shampoo", "small", small, low=0),
    )
    moments = lambda s: [s.trace] if momentum else []
    return optimizer("shampoo", init, Formula(rate.reads(), moments, scalars, leaf, across=across), "leafwise")


def inverse_root(x: Tensor, eps: float, power: float = -0.25) -> Tensor:
    """(x + eps 1)^power of a symmetric positive matrix.

    >>> inverse_root(torch.diag(torch.tensor([15.0, 80.0])), 1.0)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.3333]])
    """
    values, vectors = torch.linalg.eigh(x + eps * torch.eye(len(x), dtype=x.dtype, device=x.device))
    return vectors * values.clamp(min=eps) ** power @ vectors.T


def _cost(shape: tuple[int, ...]) -> float:
    """Of two eigendecompositions, to a factor."""
    return (shape[0] if len(shape) > 2 else 1) * (float(shape[-1]) ** 3 + float(shape[-2]) ** 3)
