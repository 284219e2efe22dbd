"""Where the pieces lie that programs on a GPU work on, one each; and what their kernels share."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@lru_cache(maxsize=64)
def segments(bounds: tuple[tuple[int, int], ...], size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(number of the part, start, values) of every piece of at most `size` values, int64 [pieces]; pieces restart at
    every part.

    >>> segments(((0, 5), (5, 7)), 4, torch.device("cpu"))
    (tensor([0, 0, 1]), tensor([0, 4, 5]), tensor([4, 1, 2]))
    """
    starts = [torch.arange(a, b, size) for a, b in bounds]
    parts = [torch.full_like(x, i) for i, x in enumerate(starts)]
    sizes = [(b - x).clamp(max=size) for x, (_, b) in zip(starts, bounds, strict=True)]
    none = [torch.zeros(0, dtype=torch.int64)]
    part, start, count = (torch.cat(none + x).to(device) for x in (parts, starts, sizes))
    return part, start, count


def bounds_of(lengths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of parts that follow each other.

    >>> bounds_of((3, 0, 2))
    ((0, 3), (3, 3), (3, 5))
    """
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return tuple(zip([0, *stops], stops, strict=False))


def stored(x: Tensor) -> Tensor:
    """What `widen` is loaded from and `narrow` is stored into: bfloat16 as its bits, which the interpreter, too, reads
    and rounds rightly.
    """
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


@triton.jit
def widen(x, C: tl.constexpr, BFLOAT: tl.constexpr):
    """A loaded value in the dtype that it is computed in."""
    if BFLOAT:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(C)


@triton.jit
def narrow(x, BFLOAT: tl.constexpr, HALF: tl.constexpr):
    """x rounded to nearest, ties to even; as bits where that is bfloat16. A double goes through float, as in torch."""
    if BFLOAT:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)
    if HALF:
        x = x.to(tl.float32).to(tl.float16)
    return x


@triton.jit
def magnitude(x):
    """The bits of |x|, which compare as it does, with nan above all."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit
def divided(x, by):
    """x / by, correctly rounded: the language's own division of floats is not."""
    if x.dtype == tl.float64:
        x = x / by
    else:
        x = tl.div_rn(x, by)
    return x
