"""What torch.save writes, read without torch.load: a zip whose one pickle describes tensors, and whose other members
are their storages, stored and not compressed, so that each is read from its place.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.formats.leaf import Leaf, bytes_at, placed, regular, sizes
from funczero.checkpoint.formats.pickles import LIMIT, TORCH, Pickled, loads

MEMBERS, NODES = 1 << 20, 1 << 23  # of a file, and values in what it holds


class Part(NamedTuple):
    """A stretch of a file that is a zip of its own, as DCP packs many into one."""

    path: Path
    at: int
    size: int


class _Window:
    """A part of a file as zipfile reads it."""

    def __init__(self, f: BinaryIO, part: Part) -> None:
        self._f, self._part, self._now = f, part, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._now

    def seek(self, to: int, whence: int = 0) -> int:
        self._now = max(0, (0, self._now, self._part.size)[whence] + to)
        return self._now

    def read(self, n: int = -1) -> bytes:
        left = max(0, self._part.size - self._now)
        n = left if n is None or n < 0 else min(n, left)
        self._f.seek(self._part.at + self._now)
        out = self._f.read(n)
        self._now += len(out)
        return out


def read(part: Path | Part, known: Mapping[str, Callable[[], Any]] = TORCH) -> Any:
    """What was saved, with a `Leaf` in the place of every tensor.

    Raises:
      CheckpointError: it is in torch's format of before 1.6, names what is not read, or is not whole.
    """
    path = part if isinstance(part, Path) else part.path
    size = regular(path)
    if isinstance(part, Path):
        part = Part(part, 0, size)
    elif not 0 <= part.at <= part.at + part.size <= size:
        raise CheckpointError(f"import: {str(path)!r} is shorter than what is said to lie in it; it was cut")
    try:
        with path.open("rb") as f:
            return _read(f, part, known)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, struct.error, zipfile.BadZipFile) as e:
        raise CheckpointError(
            f"import: {str(path)!r} is no whole file of torch.save ({type(e).__name__}: {str(e)[:200]}); one of before"
            " torch 1.6 is loaded and saved again first"
        ) from None


def _read(f: BinaryIO, part: Part, known: Mapping[str, Callable[[], Any]]) -> Any:
    window: Any = _Window(f, part)
    z = zipfile.ZipFile(window)
    infos = z.infolist()
    if len(infos) > MEMBERS or any(i.compress_type or i.flag_bits & 1 or i.file_size != i.compress_size for i in infos):
        raise ValueError("it is compressed or encrypted, which torch.save never does")
    if len(members := {i.filename: i for i in infos}) != len(infos):
        raise ValueError("two members have one name")
    pickles = [i for i in infos if i.filename.partition("/")[2] == "data.pkl"]
    if len(pickles) != 1 or pickles[0].file_size > LIMIT:
        raise ValueError("it holds no data.pkl of a size that is read")
    top = pickles[0].filename.partition("/")[0]
    order = members.get(f"{top}/byteorder")
    if order is not None and z.read(order)[:16] != b"little":
        raise ValueError("its values are not little-endian")
    found = loads(z.read(pickles[0]), str(part.path), known)
    return _filled(found, partial(_leaf, f, part, members, top), [NODES], 0)


def _leaf(f: BinaryIO, part: Part, members: dict[str, zipfile.ZipInfo], top: str, x: Pickled) -> Leaf:
    """A described tensor as a leaf, its place checked."""
    file = str(part.path)
    shape, stride = sizes(x.shape, "a tensor", file), sizes(x.stride, "a stride", file)
    info = members.get(f"{top}/data/{x.key}")
    if info is None or len(stride) != len(shape):
        raise ValueError(f"storage {x.key[:40]!r} is not in it")
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if prod(shape) else -1
    one = x.dtype.itemsize
    if info.file_size < x.held or x.at < 0 or (x.at + last + 1) * one > info.file_size:
        raise ValueError(f"a tensor of shape {list(shape)} lies outside of its storage")
    if prod(shape) > last + 1:
        raise ValueError(f"a tensor of shape {list(shape)} has fewer values than places (it was expanded)")
    f.seek(part.at + info.header_offset)
    head = f.read(30)
    if head[:4] != b"PK\3\4":
        raise ValueError(f"storage {x.key[:40]!r} has no header")
    name, extra = struct.unpack("<HH", head[26:30])
    at = part.at + info.header_offset + 30 + name + extra
    if at + info.file_size > part.at + part.size:
        raise ValueError(f"storage {x.key[:40]!r} ends outside of the file")
    if stride == _contiguous(shape) or prod(shape) < 2:
        return placed(part.path, at + x.at * one, x.dtype, shape)

    def rows(a: int, b: int) -> torch.Tensor:  # of a transposed one: its storage whole, then in order
        span = bytes_at(part.path, at + x.at * one, x.dtype, (last + 1,))
        return span.as_strided(shape, stride)[a:b].contiguous()

    return Leaf(x.dtype, shape, rows, file)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(max(1, n) for n in shape[i + 1 :]) for i in range(len(shape)))


def _filled(x: Any, leaf: Callable[[Pickled], Leaf], left: list[int], depth: int) -> Any:
    """A tree with leaves in the places of tensors; a tree deeper or larger than a program writes is refused, for parts
    of it may stand in it many times.
    """
    left[0] -= 1
    if depth > 64 or left[0] < 0:
        raise ValueError("it is nested deeper, or holds more values, than what a program saves")
    if isinstance(x, Pickled):
        return leaf(x)
    if isinstance(x, dict):
        return {k: _filled(v, leaf, left, depth + 1) for k, v in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_filled(v, leaf, left, depth + 1) for v in x)
    return x


def flat(x: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything in nested mappings and lists."""
    if isinstance(x, dict):
        for k, v in x.items():
            yield from flat(v, (*path, str(k)))
    elif isinstance(x, (list, tuple)) and not isinstance(x, Leaf):
        for k, v in enumerate(x):
            yield from flat(v, (*path, str(k)))
    else:
        yield path, x
