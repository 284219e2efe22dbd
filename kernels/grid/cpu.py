"""Sums on a grid in C++: the reference's integers, with the largest magnitude found in the same pass."""

from __future__ import annotations

import ctypes
from itertools import chain

import torch
from torch import Tensor

from funczero.kernels import native
from funczero.kernels.grid import reference
from funczero.kernels.grid.reference import Bounds, add_high

__all__ = ["add_high", "from_grid", "to_grid_add"]  # values that are split are rare: the reference serves


class _Call(ctypes.Structure):
    """What `to_grid_add` reads and writes, as grid.cpp has it."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("bounds", ctypes.c_void_p),
        ("leaves", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("shifts", "low", "tops")),
        *((name, ctypes.c_int) for name in ("dtype", "threads")),
    )


class _Back(ctypes.Structure):
    """What `from_grid` reads and writes, as grid.cpp has it."""

    _fields_ = (
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("bounds", ctypes.c_void_p),
        ("leaves", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("shifts", "out")),
        *((name, ctypes.c_int) for name in ("dtype", "threads")),
    )


def to_grid_add(rows: Tensor, bounds: Bounds, shifts: Tensor, low: Tensor) -> Tensor:
    """As the reference's."""
    if not (_takes(low, bounds, shifts, rows) and rows.dtype in native.DTYPES and rows.shape[-1:] == low.shape):
        return reference.to_grid_add(rows, bounds, shifts, low)
    tops, numbers = torch.empty(len(bounds), dtype=torch.int64), native.integers(tuple(chain(*bounds)))
    count = rows.numel() // max(len(low), 1)
    call = _Call(
        rows.data_ptr(), count, len(low), ctypes.addressof(numbers), len(bounds), shifts.data_ptr(), low.data_ptr(),
        tops.data_ptr(), native.DTYPES[rows.dtype], torch.get_num_threads()
    )  # fmt: skip
    _library().to_grid_add(ctypes.byref(call))
    native.written(low)
    return tops


def from_grid(low: Tensor, high: Tensor | None, bounds: Bounds, shifts: Tensor, dtype: torch.dtype) -> Tensor:
    """As the reference's."""
    fits = high is None or (native.plain(high) and high.dtype == torch.int64 and high.shape == low.shape)
    if not (fits and _takes(low, bounds, shifts) and dtype in native.DTYPES):
        return reference.from_grid(low, high, bounds, shifts, dtype)
    numbers = native.integers(tuple(chain(*bounds)))
    covered = bool(bounds) and all(a == b for a, b in zip((0, *numbers[1::2]), (*numbers[::2], len(low)), strict=True))
    out = (torch.empty if covered else torch.zeros)(len(low), dtype=dtype)
    call = _Back(
        low.data_ptr(), None if high is None else high.data_ptr(), len(low), ctypes.addressof(numbers), len(bounds),
        shifts.data_ptr(), out.data_ptr(), native.DTYPES[dtype], torch.get_num_threads()
    )  # fmt: skip
    _library().from_grid(ctypes.byref(call))
    return out


def _takes(low: Tensor, bounds: Bounds, shifts: Tensor, *others: Tensor) -> bool:
    return (
        native.plain(low, shifts, *others)
        and low.dtype == shifts.dtype == torch.int64
        and low.dim() == 1
        and len(shifts) == len(bounds)
        and all(0 <= a <= b <= len(low) for a, b in bounds)
    )


def _library() -> ctypes.CDLL:
    found = native.library("grid")
    assert found is not None  # the registry has asked
    return found
