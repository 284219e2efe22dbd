"""Tensors as memory: their dtypes by name, as numpy sees them, their bytes, and new room for them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from funczero.checkpoint.error import CheckpointError
from funczero.core.number import dtype_name


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name; CheckpointError where torch has none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"checkpoint: {name!r} is no dtype of this torch")
    return dtype


def floating(name: str) -> torch.dtype:
    """The floating dtype of that name, which others are cast to.

    Raises:
      CheckpointError: torch has none.
    """
    dtype = torch_dtype(name)
    if not dtype.is_floating_point:
        why = "is no floating dtype, so values would be cut to integers"
        raise CheckpointError(f"checkpoint: {name!r} {why}; write one of float32, bfloat16, float16, float64")
    return dtype


def narrowed(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Floating values in another floating dtype, rounded; no finite one becomes infinite, or another dtype's largest.

    Args:
      name: of the leaf, for the message.

    Raises:
      CheckpointError: a value is beyond what the dtype has.
    """
    out = x.to(dtype)
    if not x.numel() or not x.dtype.is_floating_point or torch.finfo(dtype).max >= torch.finfo(x.dtype).max:
        return out
    wide = x.float() if x.itemsize == 1 else x
    most = torch.stack(wide.aminmax()).double().abs().max().item()
    if not math.isfinite(most):
        most = wide.masked_fill(~wide.isfinite(), 0).double().abs().max().item()
    if most >= _end(dtype):
        top = torch.finfo(dtype).max
        raise CheckpointError(
            f"checkpoint: {name!r} has a value of magnitude {most:.4g}, and {dtype_name(dtype)} ends at {top:.4g};"
            " write another dtype, as bfloat16 or float32"
        )
    return out


def _end(dtype: torch.dtype) -> float:
    """The least magnitude that would not be rounded to one of the dtype's.

    >>> _end(torch.float16), _end(torch.float8_e4m3fn)
    (65520.0, 464.0)
    """
    info = torch.finfo(dtype)
    return info.max + math.ldexp(info.eps, math.frexp(info.max)[1] - 2)


def numpy_view(x: Tensor) -> np.ndarray:
    """A CPU tensor's memory as numpy sees it, in its true dtype."""
    name = dtype_name(x.dtype)
    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes

        return x.view(torch.int16 if name == "bfloat16" else torch.uint8).numpy().view(getattr(ml_dtypes, name))
    return x.numpy()


def nbytes(x: Tensor) -> int:
    """Bytes of a tensor's values."""
    return x.numel() * x.element_size()


def room(size: int) -> Tensor:
    """New memory of so many bytes, aligned; numpy asks the system for huge pages, without which the first touch
    costs more than a copy.
    """
    memory = torch.from_numpy(np.empty(size + 64, np.uint8))
    start = -memory.data_ptr() % 64
    return memory[start : start + size]


def give_back() -> None:
    """What malloc holds without using it goes back to the system, where glibc is.

    The threads of a save, ours and those of the libraries that write, free into arenas that keep what they got, and the
    next save may meet other arenas: a run that saves often would grow by that.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
