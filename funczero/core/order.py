"""The order of sums: which global micro-batch sits where, and the one tree in which all are added.

A micro-batch's global index is a mixed-radix number whose digits are the accumulates and the mesh axes; the sum taken
first is the fastest digit. Rows are dealt by it, so the tree over indices is the same on any mesh and at any stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from funczero.core import rows
from funczero.core.types import Layout, Tree

T = TypeVar("T")  # what is summed


def indices(layout: Layout, coordinate: Callable[[str], int]) -> list[int]:
    """Global indices of the micro-batches of one rank, in the order of time; `coordinate(axis)` is the rank's place.

    >>> order = (("accumulate", 2), ("data", 2))
    >>> indices(Layout(order=order), {"data": 1}.get)
    [2, 3]
    >>> indices(Layout(order=order[::-1]), {"data": 1}.get)
    [1, 3]
    """
    here, stride = [0], 1
    for name, n in layout.order:
        digits = range(n) if name == "accumulate" else [coordinate(name)]
        here, stride = [i + d * stride for d in digits for i in here], stride * n
    return here


def deal(batch: Tree, layout: Layout, coordinate: Callable[[str], int]) -> Tree:
    """This rank's rows of a global batch: its micro-batches, in the order of time; what has no rows, whole."""
    micros = rows.split(batch, layout.stride, "local_rows", layout.cut)
    return rows.joined([micros[i] for i in indices(layout, coordinate)], layout.cut)


def tree_sum(parts: list[Tensor] | Tensor) -> Tensor:
    """The sum along dim 0 in a balanced binary tree: a fixed order, the same for one rank's time and another's ranks.

    >>> import torch
    >>> tree_sum(torch.tensor([1e8, 1.0, -1e8, 1.0], dtype=torch.float64)).item()
    2.0
    """
    xs: list[Tensor] = list(parts)
    while len(xs) > 1:
        xs = [a + b for a, b in zip(xs[::2], xs[1::2], strict=False)] + xs[len(xs) // 2 * 2 :]
    return xs[0]


Counter = tuple[T, ...]  # one partial sum for every set bit of the count, oldest and largest first


def push(counter: Counter[T], count: int, item: T, add: Callable[[T, T], T]) -> Counter[T]:
    """The binary counter of `count` summands takes one more: log2(k) + 1 partial sums, never k."""
    while count & 1:
        counter, item, count = counter[:-1], add(counter[-1], item), count >> 1
    return (*counter, item)


def close(counter: Counter[T], add: Callable[[T, T], T]) -> T:
    """The sum of what a counter holds, right to left, as the tree over the same summands would take it."""
    total = counter[-1]
    for part in reversed(counter[:-1]):
        total = add(part, total)
    return total
