"""Symmetric block-wise quantisation in plain torch: the largest magnitude of a block, and a code for every value.

A flat x[n] is made of parts, whose lengths add up to n. Blocks restart at every part, and the last block of a part may
be short, so no value depends on another part's. A code is `round(x / absmax * qmax)` and reads `(code / qmax) *
absmax`: the largest value of a block is exact, and the error of the others is at most absmax / (2 qmax).

Source: Wang et al., ZeRO++, arXiv 2306.10209, section 3; its scale is absmax / (qmax + 1), which loses the maximum.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

Lengths = tuple[int, ...]


@lru_cache(maxsize=256)
def runs(lengths: Lengths, block: int) -> tuple[tuple[int, int], ...]:
    """Neighbouring blocks of one size, as (how many, values in each): each run is one matrix.

    >>> runs((8, 4, 6), 4)
    ((4, 4), (1, 2))
    """
    sizes: list[int] = []
    for n in lengths:
        sizes += [block] * (n // block) + [n % block] * (n % block > 0)
    return tuple((len(list(same)), size) for size, same in groupby(sizes))


def _matrices(x: Tensor, lengths: Lengths, block: int) -> list[Tensor]:
    """x[n] as views [blocks, values], one a run."""
    shapes = runs(lengths, block)
    return [part.view(shape) for part, shape in zip(x.split([k * m for k, m in shapes]), shapes, strict=True)]


def _columns(tops: Tensor, lengths: Lengths, block: int) -> list[Tensor]:
    """A number a block as views [blocks, 1], one a run."""
    return [part.view(-1, 1) for part in tops.split([k for k, _ in runs(lengths, block)])]


def absmax(x: Tensor, lengths: Lengths, block: int) -> Tensor:
    """The largest magnitude of every block, [blocks] in x's dtype; nan for a block that holds inf or nan.

    >>> absmax(torch.tensor([1.0, -3.0, 2.0, float("inf")]), (3, 1), 2)
    tensor([3., 2., nan])
    """
    # two reductions, because aminmax is not vectorised along a dim: 13 times their time on a CPU
    tops = [torch.maximum(-part.amin(1), part.amax(1)) for part in _matrices(x, lengths, block)]
    out = torch.cat(tops) if tops else x.new_empty(0)
    return torch.where(out.isfinite(), out.abs(), torch.nan)  # zeros have one sign, whichever way they were found


def _scaled(x: Tensor, tops: Tensor, lengths: Lengths, block: int, qmax: float) -> Tensor:
    """x / absmax * qmax; 0 in a block of zeros, and in one that reads as nan whatever its codes are."""
    divisor, scaled = torch.where(tops > 0, tops, 1), torch.empty_like(x)
    parts = (_matrices(scaled, lengths, block), _matrices(x, lengths, block), _columns(divisor, lengths, block))
    for out, part, top in zip(*parts, strict=True):
        torch.div(part, top, out=out)
    return scaled.mul_(qmax).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _unscaled(x: Tensor, tops: Tensor, lengths: Lengths, block: int) -> Tensor:
    """x, times its block's absmax in place."""
    for part, top in zip(_matrices(x, lengths, block), _columns(tops, lengths, block), strict=True):
        part.mul_(top)
    return x


def code_int(
    x: Tensor, tops: Tensor, lengths: Lengths, block: int, qmax: int, generator: torch.Generator | None = None
) -> Tensor:
    """int8 [n] in -qmax .. qmax.

    Args:
      x: in float32 or float64, as tops.
      generator: rounds up with the probability of the remainder, so that the mean of many draws is x. None: to nearest.

    >>> code_int(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([2.0, 0.0]), (2, 1), 2, 127)
    tensor([  64, -127,    0], dtype=torch.int8)
    """
    scaled = _scaled(x, tops, lengths, block, qmax)
    if generator is None:
        return scaled.round_().clamp_(-qmax, qmax).to(torch.int8)
    below = scaled.floor()
    draws = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return (below + (draws < scaled - below)).clamp_(-qmax, qmax).to(torch.int8)


def read_int(codes: Tensor, tops: Tensor, lengths: Lengths, block: int, qmax: int) -> Tensor:
    """The values of int8 codes, [n] in tops' dtype; nan in a block whose absmax is nan."""
    return _unscaled(codes.to(tops.dtype).div_(qmax), tops, lengths, block)


def code_fp8(x: Tensor, tops: Tensor, lengths: Lengths, block: int, dtype: torch.dtype) -> Tensor:
    """[n] in an 8-bit floating dtype, scaled so that a block's largest magnitude is the largest finite code."""
    top = torch.finfo(dtype).max
    return _scaled(x, tops, lengths, block, top).clamp_(-top, top).to(dtype)


def read_fp8(codes: Tensor, tops: Tensor, lengths: Lengths, block: int) -> Tensor:
    """The values of 8-bit floating codes, [n] in tops' dtype."""
    return _unscaled(codes.to(tops.dtype).div_(torch.finfo(codes.dtype).max), tops, lengths, block)


def join_nibbles(codes: Tensor) -> Tensor:
    """Codes in -8 .. 7 two to a byte, uint8 [ceil(n / 2)]; an odd last one stands alone."""
    raised = codes + 8
    if raised.numel() % 2:
        raised = torch.cat([raised, raised.new_full((1,), 8)])
    pairs = raised.view(torch.int16)  # the first code of a pair is the low byte, on every machine that torch runs on
    return (pairs | (pairs >> 4)).to(torch.uint8)


def split_nibbles(joined: Tensor, n: int) -> Tensor:
    """The n codes that join_nibbles was given, int8.

    >>> split_nibbles(join_nibbles(torch.tensor([-7, 0, 7], dtype=torch.int8)), 3)
    tensor([-7,  0,  7], dtype=torch.int8)
    """
    pairs = joined.to(torch.int16)
    both = ((pairs | (pairs << 4)) & 0x0F0F).view(torch.int8)
    return both[:n] - 8


def hadamard(x: Tensor, lengths: Lengths, width: int) -> Tensor:
    """Every group of `width` neighbours of a part times the Hadamard matrix of ones and minus ones; a part that is no
    multiple of width stays.

    Source: Jia et al., SDP4Bit, arXiv 2410.15526.

    >>> hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), (4, 1), 4)
    tensor([10., -2., -4.,  0.,  5.])
    """
    parts = [part if part.numel() % width else _butterflies(part, width) for part in x.split(lengths)]
    return torch.cat(parts) if parts else x


def hadamard_back(x: Tensor, lengths: Lengths, width: int) -> Tensor:
    """What `hadamard` was given: the matrix is its own inverse, but for a factor of width."""
    parts = [part if part.numel() % width else _butterflies(part, width).div_(width) for part in x.split(lengths)]
    return torch.cat(parts) if parts else x


def _butterflies(x: Tensor, width: int) -> Tensor:
    step = 1
    while step < width:
        low, high = x.view(-1, 2, step).unbind(1)
        x = torch.stack([low + high, low - high], 1).view(-1)
        step *= 2
    return x
