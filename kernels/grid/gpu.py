"""Sums on a grid in Triton, for CUDA and ROCm: a program adds the rows' values of one piece of a leaf, and finds the
largest magnitude of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from funczero.kernels.grid import reference
from funczero.kernels.grid.reference import BAD, HALF, OFFSET, Bounds, add_high, power
from funczero.kernels.segments import magnitude, narrow, segments, stored

__all__ = ["add_high", "from_grid", "to_grid_add"]  # values that are split are rare: the reference serves
WIDTH = 1024
MAGIC = tl.constexpr(6755399441055744.0)  # 1.5 * 2**52: adding it rounds to an integer, to even
SPLIT = tl.constexpr(2.0**HALF)


def to_grid_add(rows: Tensor, bounds: Bounds, shifts: Tensor, low: Tensor) -> Tensor:
    """As the reference's."""
    fits = rows.shape[-1:] == low.shape and len(shifts) == len(bounds) and _inside(bounds, low)
    if not (fits and rows.is_contiguous() and low.is_contiguous()) or rows.requires_grad:
        return reference.to_grid_add(rows, bounds, shifts, low)
    leaf, starts, sizes = segments(tuple(map(tuple, bounds)), WIDTH, low.device)
    found = torch.zeros(len(starts), dtype=torch.int64, device=low.device)
    count = rows.numel() // max(len(low), 1)
    if len(starts) and count:
        _add[(len(starts),)](rows, power(shifts), low, found, leaf, starts, sizes, count, len(low), WIDTH)
    tops = torch.zeros(len(bounds), dtype=torch.int64, device=low.device).scatter_reduce_(0, leaf, found, "amax")
    top = tops.view(torch.float64)
    codes = torch.where(top > 0, torch.frexp(top).exponent.long() + OFFSET, 0)
    return torch.where(top.isfinite(), codes, BAD)


def from_grid(low: Tensor, high: Tensor | None, bounds: Bounds, shifts: Tensor, dtype: torch.dtype) -> Tensor:
    """As the reference's."""
    fits = len(shifts) == len(bounds) and _inside(bounds, low) and (high is None or high.shape == low.shape)
    if not (fits and low.is_contiguous()) or (high is not None and not high.is_contiguous()):
        return reference.from_grid(low, high, bounds, shifts, dtype)
    leaf, starts, sizes = segments(tuple(map(tuple, bounds)), WIDTH, low.device)
    out = torch.zeros(len(low), dtype=dtype, device=low.device)
    units, halves = power(-shifts), power(HALF - shifts)
    if len(starts):
        _back[(len(starts),)](
            low, low if high is None else high, units, halves, stored(out), leaf, starts, sizes, high is not None,
            dtype == torch.bfloat16, dtype == torch.float16, WIDTH, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _inside(bounds: Bounds, low: Tensor) -> bool:
    return all(0 <= a <= b <= len(low) for a, b in bounds)


@triton.jit
def _rounded(x):
    return (x + MAGIC).to(tl.int64, bitcast=True) - 0x4338000000000000  # the bits of MAGIC


@triton.jit
def _add(rows, scales, low, found, leaf, starts, sizes, count, width, WIDTH: tl.constexpr):
    piece, lane = tl.program_id(0), tl.arange(0, WIDTH)
    start, n = tl.load(starts + piece), tl.load(sizes + piece)
    scale, inside = tl.load(scales + tl.load(leaf + piece)), lane < n
    total = tl.load(low + start + lane, mask=inside, other=0)
    top = tl.zeros([WIDTH], tl.int64)
    for row in range(count):
        value = tl.load(rows + row * width + start + lane, mask=inside, other=0)
        if value.dtype != tl.float64:
            value = value.to(tl.float32).to(tl.float64)
        top = tl.maximum(top, magnitude(value))
        d = value * scale
        d = tl.where(tl.abs(d) < SPLIT * SPLIT, d, 0.0)
        halves = tl.where(tl.abs(d) < SPLIT, 0.0, (d / SPLIT + MAGIC) - MAGIC)
        total += _rounded(d - halves * SPLIT)
    tl.store(low + start + lane, total, mask=inside)
    tl.store(found + piece, tl.max(top, 0))


@triton.jit
def _back(
    low, high, units, halves, out, leaf, starts, sizes, SPLITS: tl.constexpr, BFLOAT: tl.constexpr,
    HALFS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    piece, lane = tl.program_id(0), tl.arange(0, WIDTH)
    start, n = tl.load(starts + piece), tl.load(sizes + piece)
    part, inside = tl.load(leaf + piece), lane < n
    value = tl.load(low + start + lane, mask=inside, other=0).to(tl.float64) * tl.load(units + part)
    if SPLITS:
        value += tl.load(high + start + lane, mask=inside, other=0).to(tl.float64) * tl.load(halves + part)
    tl.store(out + start + lane, narrow(value, BFLOAT, HALFS), mask=inside)
