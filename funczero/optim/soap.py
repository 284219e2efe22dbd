"""SOAP: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321."""

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
from funczero.optim.rate import Rate, lasting, one_for_all
from funczero.optim.rates import Rates
from funczero.optim.shapes import refuse_shapes
from funczero.transforms.deal import owned
from funczero.transforms.formula import optimizer

SIDES = ("left", "right", "left_basis", "right_basis")


class Soap(NamedTuple):
    """The number of applied updates; whole with each leaf's owner, in float32 or wider, the moments of g and of the
    square of g in the bases, averages of g g' and g' g with their eigenvectors; and the rates lr, weight_decay, b1, b2.
    """

    count: Tensor
    mu: Any
    nu: Any
    sides: dict[str, Any]
    rates: Any = ()


class Scalars(NamedTuple):
    """What the formula takes beside the leaves."""

    ok: Tensor
    factor: Tensor
    rates: dict[str, Any]
    count: Tensor  # float64, of this update
    fresh: bool  # are bases taken in this update?


def soap(
    lr: Rate,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: Rate = 0.0,
    every: int = 10,
    small: int = 1 << 10,
) -> GradientTransformation:
    """p <- p (1 - lr wd) - lr A n B', with A and B the eigenvectors of L <- b2 L + (1 - b2) g g' and of R from g' g,
    and n Adam's update of A' g B: the corrected A' m B over sqrt(v') + eps.

    Law: the bits of the unsharded update at every stage and world. Rows of the gradient travel to the owner of the
    matrix, who has all moments, and rows of the update come back: 2 b N (W - 1) / W^2 bytes a rank over both ways where
    W ranks cut N values of b bytes evenly. A leaf of 3 dims is a batch of matrices, computed one by one; where it is
    cut along dim 0 nothing of it travels.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree.
      b1, b2: decay of the moments and of L and R per update, in [0, 1).
      eps: positive.
      weight_decay: decoupled, per update times lr; number, schedule, rules or tree.
      every: applied updates for which a basis is kept; v stays as it is where a basis changes.
      small: matrices of fewer values are computed by every rank.

    Raises:
      ValueError: at init: a leaf of less than 2 dims or of more than 3; by path.

    Source: algorithm 3 of the paper, which takes a new basis behind the update; here it is taken before, as the first
      needs one.
    """
    eps, every = number("soap", "eps", eps, above=True), whole("soap", "every", every)
    b1, b2 = (one_for_all("soap", what, b, moves=False) for what, b in (("b1", b1), ("b2", b2)))
    rate = Rates("soap", lr=lr, weight_decay=weight_decay, b1=b1, b2=b2)

    def init(params: Any) -> Soap:
        refuse_shapes("soap", params)
        lasting("soap", eps, params)
        leaf = params.buffers[0] if isinstance(params, Slots) else next(iter(tree.tensors(params)))
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        shapes = dict(zip(("mu", "nu", *SIDES), (_same, _same, *(left_of, right_of) * 2), strict=True))
        made = {name: owned(name, params, across, shape, dtype) for name, shape in shapes.items()}
        return Soap(zero(params), made["mu"], made["nu"], {k: made[k] for k in SIDES}, rate.init(params))

    def scalars(state: Soap, now: list[dict[str, Any]], factor: Tensor, ok: Tensor) -> tuple[Soap, list[Scalars]]:
        fresh, n = int(state.count) % every == 0, state.count + ok
        return state._replace(count=n), [Scalars(ok, factor, each, n.double().clamp(min=1), fresh) for each in now]

    def one(g: Tensor, states: list[Tensor], s: Scalars) -> Tensor:
        (m, v, left, right, *bases), (beta1, beta2) = states, (float(s.rates[b]) for b in ("b1", "b2"))
        wide = g.to(m.dtype)
        sides = [torch.lerp(wide @ wide.T, left, beta2), torch.lerp(wide.T @ wide, right, beta2)]
        if s.fresh:
            bases = [torch.linalg.eigh(x)[1] for x in sides]
        a, b = bases
        turned = a.T @ wide @ b
        m, v = torch.lerp(wide, m, beta1), torch.lerp(turned * turned, v, beta2)
        c1, c2 = ((1 - torch.as_tensor(x, dtype=torch.float64) ** s.count).to(m.dtype) for x in (beta1, beta2))
        for x, new in zip(states, (m, v, *sides, *bases), strict=True):
            x.copy_(torch.where(s.ok, new, x))
        return (a @ ((a.T @ m @ b) / c1 / ((v / c2).sqrt() + eps)) @ b.T).to(g.dtype)

    def leaf(params: list[Tensor], grads: list[Tensor], _: Any, s: Scalars, found: Found) -> None:
        lr, decay = s.rates["lr"], s.rates["weight_decay"]
        for p, u in zip(params, found.rows, strict=True):
            p.copy_(torch.where(s.ok, p * (1 - lr * decay) - u * lr, p))

    across = Across(
        rows_of,
        each(one),
        own=lambda s: [s.mu, s.nu, *(s.sides[k] for k in SIDES)],
        cost=_cost,
        dims=lambda shape: 2,
        small=whole("soap", "small", small, low=0),
    )
    return optimizer("soap", init, Formula(rate.reads(), lambda s: [], scalars, leaf, across=across), "leafwise")


def _same(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def _cost(shape: tuple[int, ...]) -> float:
    """Of two eigendecompositions and the products, to a factor."""
    return (shape[0] if len(shape) > 2 else 1) * (float(shape[-1]) + float(shape[-2])) ** 3
