"""Exact sums of squares: integers that add in any order, so that a norm is the same on any mesh.

Each square, exact in float64, is rounded once to a grid fixed by its binary order, and the rounded parts are added as
integers (the pre-rounding of Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", 2013): every float64 sum
below is exact, so no kernel's order of summation, chunk, row or rank can be seen in the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WIDTH = 32  # binary orders a bin
LOW = -704  # lowest binary order of a square that counts; smaller ones are zero
BINS = 48  # up to 2**832; larger squares count as overflow
CHUNK = 1 << 18  # elements summed at once: CHUNK * 2**(WIDTH + 1) < 2**53


def folds(dtype: torch.dtype) -> int:
    """How many bins below the largest square's count: an error of 2**-33 (float64: 2**-65) of the largest square per
    value.
    """
    return 3 if dtype == torch.float64 else 2


def square_bins(x: Tensor, *more: Tensor) -> Tensor:
    """int64 [1 + BINS]: the number of chunks with a non-finite square, then the squares of all x as integers by bin.

    Adding two results gives the result of the concatenation, whatever was cut where.

    >>> a = torch.tensor([3.0, 4.0, 0.0])
    >>> norm_of(square_bins(a)).item(), norm_of(square_bins(a[:1]) + square_bins(a[1:])).item()
    (5.0, 5.0)
    """
    n, chunks = folds(x.dtype), _chunks([x, *more])
    if x.device.type != "cpu":
        out = torch.zeros(1 + BINS, dtype=torch.int64, device=x.device)
        if x.is_meta:  # a plan's: there are no values to add
            return out
        for chunk in chunks:
            add_on_device(out, torch.cat(chunk).double() ** 2, n)
        return out
    bins = [0] * (1 + BINS)
    sizes = [sum(part.numel() for part in chunk) for chunk in chunks]
    both, coarse = (torch.empty(max(sizes, default=0), dtype=torch.float64) for _ in range(2))
    for chunk, size in zip(chunks, sizes, strict=True):
        y = torch.cat(chunk, out=both[:size])
        _add_on_host(bins, torch.square(y, out=y), coarse[:size], n)
    return torch.tensor(bins)


def _chunks(xs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Flat parts that are summed at once."""
    out: list[list[Tensor]] = []
    room = 0
    for part in (part for x in xs for part in x.reshape(-1).split(CHUNK)):
        if part.numel() > room:
            out.append([])
            room = CHUNK
        if part.numel():
            out[-1].append(part)
            room -= part.numel()
    return out


def _add_on_host(bins: list[int], y: Tensor, coarse: Tensor, n: int) -> None:
    top = y.max().item()
    if not top < 2.0 ** (LOW + WIDTH * BINS - 1):  # nan and inf included
        bins[0] += 1
        return
    level = min(max((math.frexp(top)[1] - 1 - LOW) // WIDTH, n - 1), BINS - 1) if top else n - 1
    for k in range(n):
        order = (level - k) * WIDTH + LOW
        grid = math.ldexp(1.5, order + 52)
        torch.add(y, grid, out=coarse).sub_(grid)
        bins[1 + level - k] += int(math.ldexp(coarse.sum().item(), -order))
        if k + 1 < n:
            y.sub_(coarse)


def add_on_device(out: Tensor, y: Tensor, n: int) -> None:
    """The same integers without a sync."""
    top = y.max()
    good = top < 2.0 ** (LOW + WIDTH * BINS - 1)
    level = ((torch.frexp(top).exponent - 1 - LOW) // WIDTH).clamp(n - 1, BINS - 1)
    order = torch.where(good & (top > 0), level, n - 1) * WIDTH + LOW
    one, sums = torch.full((), 1.5, dtype=torch.float64, device=y.device), []
    for k in range(n):
        grid = torch.ldexp(one, order + (52 - k * WIDTH))
        coarse = (y + grid).sub_(grid)
        sums.append(torch.ldexp(coarse.sum(), k * WIDTH - order))
        y = y.sub_(coarse)
    places = (order - LOW) // WIDTH + 1 - torch.arange(n, device=y.device)
    out.index_add_(0, places, torch.where(good, torch.stack(sums), 0).long())
    out[0] += ~good


def norm_of(bins: Tensor, n: int = 2) -> Tensor:
    """float64 0-d: the square root of the sum in `bins`; of them only the top n count, whoever filled lower ones."""
    if bins.device.type == "cpu":
        whole = bins.tolist()[1:]
        high = max((k for k, units in enumerate(whole) if units), default=n - 1)
        exact = sum(whole[high - k] << (n - 1 - k) * WIDTH for k in range(n) if high >= k)
        return torch.tensor(math.sqrt(math.ldexp(exact, (high - n + 1) * WIDTH + LOW)), dtype=torch.float64)
    units = bins[1:]
    places = torch.arange(BINS, device=bins.device)
    top = ((units != 0) * places).max().clamp(min=n - 1)
    parts = list(units.index_select(0, top - places[:n]).unbind())
    for k in range(n - 1, 0, -1):  # carry upwards: one representation for one sum
        carry = parts[k] >> WIDTH
        parts[k], parts[k - 1] = parts[k] - (carry << WIDTH), parts[k - 1] + carry
    order = top * WIDTH + LOW
    total = sum(torch.ldexp(p.double(), order - k * WIDTH) for k, p in reversed(list(enumerate(parts))))
    return torch.as_tensor(total).sqrt()
