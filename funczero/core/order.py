"""The order of sums: which global micro-batch sits where, and the one tree in which all are added.

A micro-batch's global index is a mixed-radix number whose digits are the accumulates and the mesh axes; the sum taken
first is the fastest digit. Rows are dealt by it, so the tree over indices is the same on any mesh and at any stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor

from funczero.core import rows
from funczero.core.types import Layout, Tree

FEW = 4  # parts that are added one by one, which costs them no longer way through memory
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


class Dealt(NamedTuple):
    """This rank's rows of a global batch that has fewer micro-batches than there are places for them.

    The last places are empty. A rank runs a copy of the first micro-batch in each of its own, so that all ranks launch
    the same, and nothing of it counts.
    """

    rows: Tree  # of this rank's micro-batches, copies included
    micros: int  # micro-batches of the global batch
    here: int  # of them, how many this rank has
    places: int  # of this rank
    cut: Tree = 0  # in which dims the rows lie, as rows.split's

    def split(self, n: int) -> list[Dealt]:
        """n equal parts in the order of time, for the calls of a stream."""
        if n < 1 or self.places % n:
            raise ValueError(f"Dealt.split: {self.places} places do not divide into {n} calls; give a divisor of them")
        each = self.places // n
        parts = rows.split(self.rows, n, "split", self.cut)
        here = [min(max(self.here - i * each, 0), each) for i in range(n)]
        return [self._replace(rows=x, here=k, places=each) for x, k in zip(parts, here, strict=True)]

    def real(self) -> Tree:
        """The rows that count, or one copy where none does."""
        parts = rows.split(self.rows, self.places, "local_rows", self.cut)
        return rows.joined(parts[: max(self.here, 1)], self.cut)


def deal(batch: Tree, layout: Layout, coordinate: Callable[[str], int], size: int | None = None) -> Tree:
    """This rank's rows of a global batch: its micro-batches, in the order of time; what has no rows, whole.

    Args:
      size: rows of a micro-batch, where there may be fewer of them than places; None: as many.

    Raises:
      ValueError: the rows do not divide, or there are more micro-batches than places.
    """
    who, places, mine = "local_rows", layout.stride, indices(layout, coordinate)
    if size is None:
        micros = rows.split(batch, places, who, layout.cut)
    else:
        n = rows.count(batch, who, layout.cut)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or n % size or not 0 < n // size <= places:
            what = f"rows={size!r} does not cut a batch of {n} rows into one to {places} micro-batches"
            raise ValueError(f"{who}: {what}, which is how many this chain has places for")
        micros = rows.split(batch, n // size, who, layout.cut)
    have = [micros[i] if i < len(micros) else micros[0] for i in mine]
    own = rows.joined(have, layout.cut)
    if len(micros) == places:
        return own
    return Dealt(own, len(micros), sum(i < len(micros) for i in mine), len(mine), layout.cut)


def tree_sum(parts: list[Tensor] | Tensor) -> Tensor:
    """The sum along dim 0 in a balanced binary tree: a fixed order, the same for one rank's time and another's ranks.

    >>> import torch
    >>> tree_sum(torch.tensor([1e8, 1.0, -1e8, 1.0], dtype=torch.float64)).item()
    2.0
    """
    if isinstance(parts, Tensor):
        while len(parts) > FEW and len(parts) % 2 == 0:  # one level at once: a thousand parts take ten operations
            parts = parts[::2] + parts[1::2]
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
