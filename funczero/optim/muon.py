"""Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import flag, number, whole
from funczero.core.optimizer import Across, Asked, Formula, Found, GradientTransformation
from funczero.optim.count import Scalars, counted, zero
from funczero.optim.matrices import scaled
from funczero.optim.rate import Rate, one_for_all
from funczero.optim.rates import Rates
from funczero.optim.shapes import refuse_shapes
from funczero.transforms.formula import optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(NamedTuple):
    """The number of applied updates, the momentum in rows like the parameters, in their dtype, and the rates lr,
    weight_decay and momentum.
    """

    count: Tensor
    mu: Any
    rates: Any = ()


def muon(
    lr: Rate,
    momentum: float = 0.95,
    weight_decay: Rate = 0.0,
    nesterov: bool = True,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    scale: str = "original",
    flatten: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    small: int = 1 << 10,
) -> GradientTransformation:
    """p <- p (1 - lr wd) - lr s O, with O the nearest orthogonal matrix to u by Newton-Schulz steps in `dtype`,
    m <- lerp(m, g, 1 - momentum) and u = lerp(g, m, momentum), or m without nesterov.

    Law: the bits of the unsharded update at every stage and world. Momentum rests in rows; rows of u travel in `dtype`,
    losslessly since that cast is its first act, to the rank that a matrix is dealt to, and rows of O come back:
    2 b N (W - 1) / W^2 bytes a rank over both ways where W ranks cut N values of b bytes evenly.

    A leaf of 3 dims is a batch of matrices, computed one by one; where it is cut along dim 0 nothing of it travels.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree.
      momentum: in [0, 1).
      weight_decay: decoupled, per update times lr; number, schedule, rules or tree. torch's default is 0.1.
      steps: Newton-Schulz steps, with these coefficients; eps is the least norm that u is divided by.
      scale: s of a matrix [a, b]: "original" is sqrt(max(1, a / b)), "match_rms_adamw" 0.2 sqrt(max(a, b)), "none" 1.
      flatten: leaves of so many dims and more are taken as the matrix [first dim, all others], as convolutions want it;
        0: none.
      dtype: in which u travels and is orthogonalised.
      small: matrices of fewer values are computed by every rank.

    Raises:
      ValueError: at init: a leaf of less than 2 dims, or of more than 3 without flatten; by path.

    Source: torch.optim.Muon, whose values these are, bit for bit, where leaves have 2 dims.

    >>> import funczero as fz
    >>> fz.partition([(fz.matrices(but="embed|head"), fz.muon(0.02)), ("", fz.adamw(3e-4))]).name
    'partition'
    """
    if scale not in ("original", "match_rms_adamw", "none"):
        raise ValueError(
            f"muon: scale={scale!r} is none of 'original', 'match_rms_adamw' and 'none'; write one of them"
        )
    flag("muon", "nesterov", nesterov)
    if whole("muon", "flatten", flatten, low=0) in (1, 2):
        raise ValueError(f"muon: flatten={flatten} takes vectors or matrices apart; write 3 or more, or 0 for none")
    momentum, eps = one_for_all("muon", "momentum", momentum, moves=False), number("muon", "eps", eps, above=True)
    if len(coefficients) != 3:
        raise ValueError(f"muon: coefficients={coefficients!r} are not three numbers; write (a, b, c)")
    coefficients = tuple(number("muon", "coefficients", x, low=-math.inf) for x in coefficients)
    rate = Rates("muon", lr=lr, weight_decay=weight_decay, momentum=momentum)
    one = partial(orthogonal, steps=whole("muon", "steps", steps), coefficients=coefficients, eps=eps)

    def init(params: Any) -> Muon:
        refuse_shapes("muon", params, flatten)
        return Muon(zero(params), tree.map(torch.zeros_like, params), rate.init(params))

    def ready(params: list[Tensor], grads: list[Tensor], momenta: list[list[Tensor]], s: Scalars) -> Asked:
        beta, rows = float(s.rates["momentum"]), []
        scaled(grads, s)
        for g, m in zip(grads, *momenta, strict=True):
            new = torch.lerp(m, g, 1 - beta)
            m.copy_(torch.where(s.ok, new, m))
            rows.append((g.lerp(new, beta) if nesterov else new).to(dtype))
        return Asked(rows=[rows])

    def orthogonalised(values: list[Tensor], _: list[Tensor], s: Scalars) -> Tensor:
        (x,) = values
        if matrix_of(x.shape, flatten) or x.dim() == 2:
            return one(x.reshape(len(x), -1)).reshape(x.shape)
        return torch.stack([one(y) for y in x])

    def leaf(params: list[Tensor], grads: list[Tensor], _: Any, s: Scalars, found: Found) -> None:
        lr, decay = s.rates["lr"], s.rates["weight_decay"]
        for p, move, shape in zip(params, found.rows, found.shapes, strict=True):
            rate = lr * scale_of(scale, shape, flatten)
            new = p * (1 - lr * decay)
            new = new - move * rate if isinstance(rate, Tensor) else new.add_(move, alpha=-rate)
            p.copy_(torch.where(s.ok, new, p))

    dims = lambda shape: len(shape) if matrix_of(shape, flatten) else 2
    across = Across(
        ready,
        orthogonalised,
        cost=partial(cost_of, flatten=flatten),
        dims=dims,
        small=whole("muon", "small", small, low=0),
    )
    return optimizer("muon", init, Formula(rate.reads(), lambda s: [s.mu], counted, leaf, across=across), "leafwise")


def orthogonal(
    x: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = 1e-7
) -> Tensor:
    """A matrix near the nearest orthogonal one, by the quintic Newton-Schulz iteration, in the dtype of x.

    >>> torch.linalg.svdvals(orthogonal(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))).round()
    tensor([1., 1., 1., 1., 1.])
    """
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    y = x.T if tall else x
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if tall else y


def matrix_of(shape: tuple[int, ...], flatten: int) -> tuple[int, int] | None:
    """What a leaf is as one matrix, where it is flattened."""
    return (shape[0], math.prod(shape[1:])) if flatten and len(shape) >= flatten else None


def scale_of(scale: str, shape: tuple[int, ...], flatten: int) -> float:
    """What the rate of a leaf is multiplied by."""
    a, b = matrix_of(shape, flatten) or shape[-2:]
    if scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(a, b))
    return math.sqrt(max(1, a / b)) if scale == "original" and b else 1.0


def cost_of(shape: tuple[int, ...], flatten: int) -> float:
    """Multiplications of a step on a leaf, to a factor."""
    a, b = matrix_of(shape, flatten) or shape[-2:]
    return math.prod(shape) // max(1, a * b) * min(a, b) ** 2 * (2 * max(a, b) + min(a, b))
