"""Tensors as memory: their dtypes by name, as numpy sees them, their bytes, and new room for them."""

from __future__ import annotations

import ctypes
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
