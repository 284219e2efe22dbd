"""CRC-32C in C++, by the processor's own instruction where it has one; the interpreter's lock is free meanwhile."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import torch
from torch import Tensor

from funczero.kernels import native
from funczero.kernels.crc32c import reference


def crc32c(x: Tensor, before: int = 0) -> int:
    """As the reference's."""
    if not _takes(x):
        return reference.crc32c(x, before)
    return _library().crc32c(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)), ctypes.c_uint32(before))


def read(file: int, start: int, out: Tensor) -> int:
    """As the reference's."""
    if not _takes(out):
        return reference.read(file, start, out)
    native.written(out)
    done, crc = _through(_library().read_checked, file, start, out)
    if done < len(out):
        raise EOFError(f"the file ends {len(out) - done} bytes early")
    return crc


def write(file: int, start: int, x: Tensor) -> int:
    """As the reference's."""
    if not _takes(x):
        return reference.write(file, start, x)
    return _through(_library().write_checked, file, start, x)[1]


def _through(call: Callable[..., int], file: int, start: int, x: Tensor) -> tuple[int, int]:
    """(bytes that went between a file and memory, their checksum)."""
    crc, memory = ctypes.c_uint32(), ctypes.c_void_p(x.data_ptr())
    done = call(ctypes.c_int(file), ctypes.c_int64(start), memory, ctypes.c_int64(len(x)), ctypes.byref(crc))
    if done < 0:
        raise OSError(-done, os.strerror(-done))
    return done, crc.value


def _takes(x: Tensor) -> bool:
    return native.plain(x) and x.dtype == torch.uint8 and x.dim() == 1


def _library() -> ctypes.CDLL:
    found = native.library("crc32c")
    assert found is not None  # the registry has asked
    found.crc32c.restype = ctypes.c_uint32
    found.read_checked.restype = found.write_checked.restype = ctypes.c_int64
    return found
