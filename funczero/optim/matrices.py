"""What optimizers of matrices share: their gradient before it travels, batches of matrices, the sides of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funczero.core.optimizer import Asked

Shape = tuple[int, ...]
One = Callable[[Tensor, list[Tensor], Any], Tensor]  # (gradient, the owner's states of it, scalars) -> update


def scaled(grads: list[Tensor], s: Any) -> None:
    """The gradients with their factor, in place; zeros where the update is skipped.

    Args:
      s: scalars with `ok` and `factor`.
    """
    for g in grads:
        g.copy_(torch.where(s.ok, g.mul_(s.factor.to(g.dtype)), 0.0))


def rows_of(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], s: Any) -> Asked:
    """`ready` of a formula whose owner needs the gradient and nothing else."""
    scaled(grads, s)
    return Asked(rows=[grads])


def each(one: One) -> Callable[[list[Tensor], list[Tensor], Any], Tensor]:
    """`whole` of a formula, from what is computed of one matrix: those of a batch (3 dims) one by one."""

    def computed(values: list[Tensor], states: list[Tensor], s: Any) -> Tensor:
        (g,) = values
        if g.dim() == 2:
            return one(g, states, s)
        return torch.stack([one(x, [y[k] for y in states], s) for k, x in enumerate(g)])

    return computed


def left_of(shape: Shape) -> Shape:
    """Of the square on a matrix' left side."""
    return (*shape[:-1], shape[-2])


def right_of(shape: Shape) -> Shape:
    """Of the square on its right side."""
    return (*shape[:-2], shape[-1], shape[-1])
