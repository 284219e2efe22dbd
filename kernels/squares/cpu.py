"""Sums of squares in C++, with the reference's integers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from funczero.kernels import native
from funczero.kernels.squares import reference
from funczero.kernels.squares.reference import BINS


class _Part(ctypes.Structure):
    """Values that lie side by side, as squares.cpp has it."""

    _fields_ = (("values", ctypes.c_void_p), ("n", ctypes.c_int64))


class _Call(ctypes.Structure):
    """What `square_bins` reads and writes, as squares.cpp has it."""

    _fields_ = (
        ("parts", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("wide", "dtype", "threads")),
    )


def square_bins(xs: Sequence[Tensor], wide: bool = False) -> Tensor:
    """As the reference's."""
    dtype = xs[0].dtype
    if not (native.plain(*xs) and dtype in native.DTYPES and all(x.dtype == dtype for x in xs)):
        return reference.square_bins(xs, wide)
    found, out = native.library("squares"), torch.zeros(1 + BINS * (1 + wide), dtype=torch.int64)
    assert found is not None  # the registry has asked
    parts = (_Part * len(xs))(*((x.data_ptr(), x.numel()) for x in xs))
    call = _Call(
        ctypes.addressof(parts), len(xs), out.data_ptr(), wide, native.DTYPES[dtype], torch.get_num_threads()
    )  # fmt: skip
    found.square_bins(ctypes.byref(call))
    return out
