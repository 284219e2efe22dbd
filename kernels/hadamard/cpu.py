"""The Hadamard transform in C++, with the reference's bits: a group is turned while it lies in the nearest cache."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from funczero.kernels import native
from funczero.kernels.hadamard import reference
from funczero.kernels.hadamard.reference import Lengths


def hadamard(x: Tensor, lengths: Lengths, width: int) -> Tensor:
    """As the reference's."""
    return _turned(x, lengths, width, False) if _takes(x, lengths, width) else reference.hadamard(x, lengths, width)


def hadamard_back(x: Tensor, lengths: Lengths, width: int) -> Tensor:
    """As the reference's."""
    if not _takes(x, lengths, width):
        return reference.hadamard_back(x, lengths, width)
    return _turned(x, lengths, width, True)


def _turned(x: Tensor, lengths: Lengths, width: int, back: bool) -> Tensor:
    out, numbers, found = torch.empty_like(x), native.integers(lengths), native.library("hadamard")
    assert found is not None  # the registry has asked
    found.hadamard(
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        numbers,
        ctypes.c_int64(len(lengths)),
        ctypes.c_int64(width),
        ctypes.c_int(back),
        ctypes.c_int(x.dtype == torch.float64),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out


def _takes(x: Tensor, lengths: Lengths, width: int) -> bool:
    return (
        native.plain(x)
        and x.dtype in (torch.float32, torch.float64)
        and x.dim() == 1
        and x.numel() == sum(lengths)
        and width > 0
        and width & (width - 1) == 0
    )
