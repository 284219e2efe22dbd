"""Sums that have no order, in plain torch: floats become integers on a grid of a power of two, a step for every leaf.

A value x of a leaf with shift s is d = x * 2**s units. What is less than 2**46 units is rounded to one integer, to
nearest even. A larger one is split exactly: `high` counts 2**46 units, `low` what is left, at most 2**45. Sums of
2**16 values then fit into 64 bits. What is not finite, or has 2**92 units or more, counts as nothing, and its code
tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Bounds = Sequence[tuple[int, int]]  # (start, stop) of every leaf's values in a buffer

HALF = 46  # bits of one integer before it is split
OFFSET = 2048  # of the code of an exponent, as math.frexp counts it; 0 is the code of zeros
BAD = 4095  # the code of a leaf with a value that is not finite
CHUNK = 1 << 16  # values that are converted at a time, so that they stay in a cache


def power(exponents: Tensor) -> Tensor:
    """2.0 ** exponents, exactly, in float64.

    Args:
      exponents: int64, from -1022 to 1023.

    >>> power(torch.tensor([3, -1]))
    tensor([8.0000, 0.5000], dtype=torch.float64)
    """
    return ((exponents + 1023) << 52).view(torch.float64)


def codes(rows: Tensor, bounds: Bounds) -> Tensor:
    """The code of every leaf's largest magnitude in all rows, int64 [leaves].

    >>> codes(torch.tensor([[3.0, 0.0, -0.5], [1.0, 0.0, 0.1]]), [(0, 1), (1, 2), (2, 3)]) - OFFSET
    tensor([    2, -2048,     0])
    """
    tops = []
    for start, stop in bounds:
        part = rows[..., start:stop]
        low, high = torch.aminmax(part) if part.numel() else (rows.new_zeros(()), rows.new_zeros(()))
        tops.append(torch.maximum(high, -low))
    return _code(torch.stack(tops).double()) if tops else torch.zeros(0, dtype=torch.int64, device=rows.device)


def _code(tops: Tensor) -> Tensor:
    _, exponent = torch.frexp(tops)
    found = torch.where(tops > 0, exponent.long() + OFFSET, 0)
    return torch.where(tops.isfinite(), found, BAD)


def to_grid_add(rows: Tensor, bounds: Bounds, shifts: Tensor, low: Tensor) -> Tensor:
    """Adds every row's units to `low`, in place, and returns the leaves' codes; what is split gives its low part.

    Args:
      rows: [R, n] or [n], any floating dtype.
      bounds: columns of every leaf; other columns are left alone.
      shifts: int64 [leaves], from -900 to 900: a unit is 2 ** -shift.
      low: int64 [n].

    >>> low = torch.zeros(2, dtype=torch.int64)
    >>> to_grid_add(torch.tensor([[1.5, 0.5], [0.25, 2.0**50]]), [(0, 2)], torch.tensor([2]), low) - OFFSET
    tensor([51])
    >>> low  # 2**52 units are 64 * 2**46 and nothing more
    tensor([7, 2])
    """
    tops, scale = codes(rows, bounds), power(shifts)
    for i, part, to in _chunks(rows, bounds, low):
        d = _counted(part.double() * scale[i])
        to += (d - _halves(d) * 2.0**HALF).round_().long()
    return tops


def add_high(rows: Tensor, bounds: Bounds, shifts: Tensor, high: Tensor) -> None:
    """Adds to `high`, in place, what `to_grid_add` has left out: whole 2**46 units of the values that are split.

    >>> high = torch.zeros(2, dtype=torch.int64)
    >>> add_high(torch.tensor([1.5, 2.0**50]), [(0, 2)], torch.tensor([2]), high)
    >>> high
    tensor([ 0, 64])
    """
    scale = power(shifts)
    for i, part, to in _chunks(rows, bounds, high):
        to += _halves(_counted(part.double() * scale[i])).long()


def _counted(d: Tensor) -> Tensor:
    """Values in units, with zeros where one is not finite or too large to count."""
    return torch.where(d.abs() < 2.0 ** (2 * HALF), d, 0.0)


def _halves(d: Tensor) -> Tensor:
    """How many 2**46 are split off values in units."""
    return torch.where(d.abs() < 2.0**HALF, 0.0, (d * 2.0**-HALF).round_())


def _chunks(rows: Tensor, bounds: Bounds, out: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(leaf, some of its values in one row, where they are added)."""
    for row in rows.view(-1, rows.shape[-1]) if rows.numel() else ():
        for i, (start, stop) in enumerate(bounds):
            for a, b in pairwise((*range(start, stop, CHUNK), stop)):
                yield i, row[a:b], out[a:b]


def from_grid(low: Tensor, high: Tensor | None, bounds: Bounds, shifts: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of sums of integers, [n] in dtype; zeros outside the bounds.

    Args:
      low, high: int64 [n]; None where nothing was split.

    >>> from_grid(torch.tensor([7, 2]), torch.tensor([0, 64]), [(0, 2)], torch.tensor([2]), torch.float64)
    tensor([1.7500e+00, 1.1259e+15], dtype=torch.float64)
    """
    out, units, halves = low.new_zeros(low.shape, dtype=dtype), power(-shifts), power(HALF - shifts)
    for i, (start, stop) in enumerate(bounds):
        value = low[start:stop].double() * units[i]
        if high is not None:
            value += high[start:stop].double() * halves[i]
        out[start:stop] = value
    return out
