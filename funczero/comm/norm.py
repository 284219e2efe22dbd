"""Exact norms: sums of squares as integers that add in any order, so that a norm is the same on any mesh."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funczero.kernels.registry import kernel
from funczero.kernels.squares.reference import BINS, LOW, WIDTH, folds

__all__ = ["BINS", "folds", "norm_of", "square_bins"]
MANY = 1 << 31  # values that a bin of 64 bits holds, however large they are


def square_bins(x: Tensor, *more: Tensor, of: int = 0) -> Tensor:
    """int64 [1 + BINS], [1 + 2 * BINS] of many values: the number of chunks with a non-finite square, then the squares
    of all x as integers by bin.

    Adding two results gives the result of the concatenation, whatever was cut where.

    Args:
      of: how many values' results are added in all, the same for each of them.

    >>> a = torch.tensor([3.0, 4.0, 0.0])
    >>> norm_of(square_bins(a)).item(), norm_of(square_bins(a[:1]) + square_bins(a[1:])).item()
    (5.0, 5.0)
    """
    found: Tensor = kernel("squares", x.device).square_bins((x, *more), of > MANY)
    return found


def norm_of(bins: Tensor, n: int = 2) -> Tensor:
    """float64 0-d: the square root of the sum in `bins`; of them only the top n count, whoever filled lower ones."""
    if bins.device.type == "cpu":
        units, above = bins[1 : 1 + BINS].tolist(), bins[1 + BINS :].tolist() or [0] * BINS
        whole = [x + (y << WIDTH) for x, y in zip(units, above, strict=True)]
        high = max((k for k, units in enumerate(whole) if units), default=n - 1)
        exact = sum(whole[high - k] << (n - 1 - k) * WIDTH for k in range(n) if high >= k)
        return torch.tensor(math.sqrt(math.ldexp(exact, (high - n + 1) * WIDTH + LOW)), dtype=torch.float64)
    return norm_on_device(bins, n)


def norm_on_device(bins: Tensor, n: int) -> Tensor:
    """The same to float64's rounding without a sync, and of one representation of the sum, whatever its parts were."""
    units, above = bins[1 : 1 + BINS], bins[1 + BINS :]
    if len(above):  # one representation for one integer
        above, units = above + (units >> WIDTH), units & ((1 << WIDTH) - 1)
    places = torch.arange(BINS, device=bins.device)
    filled = units != 0 if not len(above) else (units != 0) | (above != 0)
    top = (filled * places).max().clamp(min=n - 1)
    parts = list(units.index_select(0, top - places[:n]).unbind())
    over = list(above.index_select(0, top - places[:n]).unbind()) if len(above) else [torch.zeros_like(top)] * n
    for k in range(n - 1, 0, -1):  # carry upwards: one representation for one sum
        carry = parts[k] >> WIDTH
        parts[k], parts[k - 1] = parts[k] - (carry << WIDTH), parts[k - 1] + carry + over[k]
    order = top * WIDTH + LOW
    total = sum(torch.ldexp(p.double(), order - k * WIDTH) for k, p in reversed(list(enumerate(parts))))
    return torch.as_tensor(total + torch.ldexp(over[0].double(), order + WIDTH)).sqrt()
