"""The Hadamard transform in Triton, for CUDA and ROCm: a program turns some whole groups in its registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from funczero.kernels.hadamard import reference
from funczero.kernels.hadamard.reference import Lengths
from funczero.kernels.segments import bounds_of, segments

LEAST, MOST = 1024, 8192  # values of a program


def hadamard(x: Tensor, lengths: Lengths, width: int) -> Tensor:
    """As the reference's."""
    return _turned(x, lengths, width, False) if _takes(x, lengths, width) else reference.hadamard(x, lengths, width)


def hadamard_back(x: Tensor, lengths: Lengths, width: int) -> Tensor:
    """As the reference's."""
    return _turned(x, lengths, width, True) if _takes(x, lengths, width) else reference.hadamard_back(x, lengths, width)


def _takes(x: Tensor, lengths: Lengths, width: int) -> bool:
    known = x.dtype in (torch.float32, torch.float64) and x.is_contiguous() and not x.requires_grad
    return known and x.shape == (sum(lengths),) and 0 < width <= MOST and width & (width - 1) == 0


def _turned(x: Tensor, lengths: Lengths, width: int, back: bool) -> Tensor:
    out, many = x.clone(), max(width, LEAST)
    turned = tuple(bounds for bounds in bounds_of(lengths) if (bounds[1] - bounds[0]) % width == 0)
    _, starts, sizes = segments(turned, many, x.device)
    if len(starts):
        _turn[(len(starts),)](x, out, starts, sizes, width.bit_length() - 1, 1 / width if back else 1.0, many)
    return out


@triton.jit
def _turn(x, out, starts, sizes, STEPS: tl.constexpr, TIMES: tl.constexpr, MANY: tl.constexpr):
    piece, lane = tl.program_id(0), tl.arange(0, MANY)
    start, n = tl.load(starts + piece), tl.load(sizes + piece)
    value = tl.load(x + start + lane, mask=lane < n, other=0)
    for i in tl.static_range(STEPS):
        pairs = tl.permute(tl.reshape(value, (MANY >> (i + 1), 2, 1 << i)), (0, 2, 1))
        low, high = tl.split(pairs)
        value = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 2, 1)), (MANY,))
    tl.store(out + start + lane, value * TIMES, mask=lane < n)
