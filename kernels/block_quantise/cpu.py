"""Block quantisation in C++, with the reference's bits: a block is read once, and its codes are made while it lies in
the nearest cache. What is computed in float64 is left to the reference.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from funczero.kernels import native
from funczero.kernels.block_quantise import reference
from funczero.kernels.block_quantise.reference import FLOATS, Lengths, fits, payload

FORMS = {"int8": 0, "int4": 1, "e4m3": 2, "e5m2": 3}  # as in block_quantise.cpp


class _Call(ctypes.Structure):
    """What a call reads and writes, as block_quantise.cpp has it."""

    _fields_ = (
        ("lengths", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("leaves", "block", "n")),
        *((name, ctypes.c_void_p) for name in ("x", "draws", "read_codes", "read_tops", "out", "tops")),
        *((name, ctypes.c_int) for name in ("dtype", "threads")),
    )


def quantise(
    x: Tensor,
    lengths: Lengths,
    block: int,
    form: str,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    if x.dtype == torch.float64 or not (_takes(x, out) and fits(x, out, None, lengths, block, form)):
        return reference.quantise(x, lengths, block, form, generator, out)
    return _quantised(x, lengths, block, form, generator, out, None)


def dequantise(
    codes: Tensor, tops: Tensor, lengths: Lengths, block: int, form: str, dtype: torch.dtype | None = None
) -> Tensor:
    """As the reference's."""
    n, dtype = sum(lengths), dtype or tops.dtype
    if not (_coded(codes, tops) and fits(None, codes, tops, lengths, block, form) and dtype in native.DTYPES):
        return reference.dequantise(codes, tops, lengths, block, form, dtype)
    out = torch.empty(n, dtype=dtype)
    numbers = native.integers(lengths)
    call = _Call(
        ctypes.addressof(numbers), len(lengths), block, n, None, None, codes.data_ptr(), tops.data_ptr(),
        out.data_ptr(), None, native.DTYPES[dtype], torch.get_num_threads()
    )  # fmt: skip
    _library().dequantise(ctypes.byref(call), FORMS[form])
    return out


def requantise(
    codes: Tensor,
    tops: Tensor,
    x: Tensor,
    lengths: Lengths,
    block: int,
    form: str,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    if not (_takes(x, None) and _coded(codes, tops) and fits(x, codes, tops, lengths, block, form)):
        return reference.requantise(codes, tops, x, lengths, block, form, generator)
    return _quantised(x, lengths, block, form, generator, None, (codes, tops))


def _quantised(
    x: Tensor,
    lengths: Lengths,
    block: int,
    form: str,
    generator: torch.Generator | None,
    out: Tensor | None,
    read: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    n, numbers = x.numel(), native.integers(lengths)
    out = torch.empty(payload(n, form), dtype=torch.uint8) if out is None else out
    tops = torch.empty(sum(-(-m // block) for m in lengths), dtype=torch.float32)
    drawn = generator is not None and form not in FLOATS
    draws = torch.rand(x.shape, generator=generator, dtype=torch.float32) if drawn else None
    codes_at, tops_at = (None, None) if read is None else (y.data_ptr() for y in read)
    draws_at = None if draws is None else draws.data_ptr()
    call = _Call(
        ctypes.addressof(numbers), len(lengths), block, n, x.data_ptr(), draws_at, codes_at, tops_at,
        out.data_ptr(), tops.data_ptr(), native.DTYPES[x.dtype], torch.get_num_threads()
    )  # fmt: skip
    _library().quantise(ctypes.byref(call), FORMS[form])
    native.written(out)
    return out, tops


def _takes(x: Tensor, out: Tensor | None) -> bool:
    return native.plain(x, *([] if out is None else [out])) and x.dtype in native.DTYPES


def _coded(codes: Tensor, tops: Tensor) -> bool:
    return native.plain(codes, tops) and tops.dtype == torch.float32


def _library() -> ctypes.CDLL:
    found = native.library("block_quantise")
    assert found is not None  # the registry has asked
    return found
