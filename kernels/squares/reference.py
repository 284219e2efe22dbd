"""Sums of squares as integers that add in any order, in plain torch.

Each square, exact in float64, is rounded once to a grid fixed by its binary order, and the rounded parts are added as
integers (the pre-rounding of Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", 2013): every float64 sum
below is exact, so no kernel's order of summation, chunk, row or rank can be seen in the result.

A bin counts units of 2**order, and is the highest of squares in (2**(order - 1), 2**(order + 31)]: those that are at
least one unit when they are rounded, and nothing when they are rounded to the next bin's. So a chunk whose squares are
all small adds to a bin what it would have added beside a large one.
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


def square_bins(xs: Sequence[Tensor], wide: bool = False) -> Tensor:
    """int64 [1 + BINS]: the number of chunks with a non-finite square, then the squares of all xs as integers by bin.

    Law: adding two results gives one with the root of the concatenation, whatever was cut where.

    Args:
      xs: at least one tensor, of one floating dtype on one device.
      wide: int64 [1 + 2 * BINS] in place of it: of a chunk's sums the low 32 bits, then what is above them. A bin of
        64 bits holds 2**31 values, this 2**48.

    >>> square_bins([torch.tensor([3.0, 4.0]), torch.tensor([0.0])])[22:25]
    tensor([ 0, 25,  0])
    """
    n, chunks = folds(xs[0].dtype), _chunks(xs)
    if xs[0].device.type != "cpu":
        out = torch.zeros(1 + BINS * (1 + wide), dtype=torch.int64, device=xs[0].device)
        if xs[0].is_meta:  # a plan's: there are no values to add
            return out
        for chunk in chunks:
            add_on_device(out, torch.cat(chunk).double() ** 2, n)
        return out
    bins = [0] * (1 + BINS * (1 + wide))
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
    fraction, exponent = math.frexp(top)
    level = max((exponent - (fraction == 0.5) - LOW) // WIDTH, n - 1) if top else n - 1
    for k in range(n):
        order = (level - k) * WIDTH + LOW
        grid = math.ldexp(1.5, order + 52)
        torch.add(y, grid, out=coarse).sub_(grid)
        # fmod changes nothing that is a sum, which CHUNK keeps below 2**53; a plan says any number here
        units = int(math.fmod(math.ldexp(coarse.sum().item(), -order), 2.0**53))
        if len(bins) > 1 + BINS:
            bins[1 + BINS + level - k] += units >> WIDTH
            units &= (1 << WIDTH) - 1
        bins[1 + level - k] += units
        if k + 1 < n:
            y.sub_(coarse)


def add_on_device(out: Tensor, y: Tensor, n: int) -> None:
    """The same integers without a sync: squares y, float64 [m], are added to `out` in place, of either length."""
    top = y.max()
    good = top < 2.0 ** (LOW + WIDTH * BINS - 1)
    fraction, exponent = torch.frexp(top)
    level = ((exponent - (fraction == 0.5).int() - LOW) // WIDTH).clamp(n - 1, BINS - 1)
    order = torch.where(good & (top > 0), level, n - 1) * WIDTH + LOW
    one, sums = torch.full((), 1.5, dtype=torch.float64, device=y.device), []
    for k in range(n):
        grid = torch.ldexp(one, order + (52 - k * WIDTH))
        coarse = (y + grid).sub_(grid)
        sums.append(torch.ldexp(coarse.sum(), k * WIDTH - order))
        y = y.sub_(coarse)
    places = (order - LOW) // WIDTH + 1 - torch.arange(n, device=y.device)
    units = torch.where(good, torch.stack(sums), 0).long()
    if len(out) > 1 + BINS:
        out.index_add_(0, places + BINS, units >> WIDTH)
        units = units & ((1 << WIDTH) - 1)
    out.index_add_(0, places, units)
    out[0] += ~good
