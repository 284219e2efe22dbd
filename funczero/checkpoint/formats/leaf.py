"""A leaf of somebody else's file: what it is, and how to read it, whole or some rows; and what a source comes to."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.memory import narrowed

DIMS = 32  # of a leaf
LARGEST = 1 << 48  # values of a leaf


class Leaf(NamedTuple):
    """A tensor that is read when it is asked for, into new memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: Callable[[int, int], Tensor]  # of dim 0, from and to; of a scalar the one value
    file: str  # for messages
    at: Any = None  # where all of it lies, if at one place: leaves at the same one are tied

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """All of it."""
        return self.rows(0, self.shape[0] if self.shape else 1)


class Found(NamedTuple):
    """What a source holds, by the names that a checkpoint gives it."""

    leaves: dict[str, Leaf]
    ties: dict[str, str] = {}  # another name of a leaf -> the stored one
    step: int = 0
    updates: int = 0
    client: Any = None
    notes: tuple[str, ...] = ()  # what was not taken as it is


def placed(path: Path, at: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Leaf:
    """A leaf whose values lie at one place of a file, in order."""

    def rows(a: int, b: int) -> Tensor:
        one = prod(shape[1:]) * dtype.itemsize
        return bytes_at(path, at + a * one, dtype, (b - a, *shape[1:]) if shape else ())

    return Leaf(dtype, shape, rows, str(path), (path, at, dtype, shape) if prod(shape) else None)


def bytes_at(path: Path, at: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Values from a place of a file, read into memory of their own.

    Raises:
      CheckpointError: the file has become shorter.
    """
    out = torch.empty(prod(shape), dtype=dtype)
    if not out.numel():
        return out.view(shape)
    raw = memoryview(out.view(torch.uint8).numpy().data)
    with path.open("rb", buffering=0) as f:
        f.seek(at)
        done = 0
        while done < len(raw):
            got = f.readinto(raw[done : done + (1 << 30)])
            if not got:
                raise CheckpointError(f"import: {str(path)!r} ends before the values of one of its leaves; it was cut")
            done += got
    return out.view(shape)


def regular(path: Path, who: str = "import") -> int:
    """The size of a regular file; CheckpointError where it is none, for a reader of a pipe would wait."""
    try:
        status = os.stat(path)
    except OSError as e:
        raise CheckpointError(f"{who}: {str(path)!r} cannot be read ({e.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{who}: {str(path)!r} is no regular file; give a file, or the folder that holds it")
    return status.st_size


def sizes(values: Any, what: str, file: str) -> tuple[int, ...]:
    """A shape that a file names, checked before anything is made of it.

    Raises:
      CheckpointError: it is none, or no memory holds it.
    """
    shape = tuple(values) if isinstance(values, (tuple, list)) else None
    if shape is None or len(shape) > DIMS or not all(type(n) is int and n >= 0 for n in shape) or prod(shape) > LARGEST:
        told = str(shape)[:80] if shape is not None and all(type(n) is int for n in shape) else type(values).__name__
        raise CheckpointError(f"import: {what[:200]!r} of {file!r} has the shape {told}, which no tensor has")
    return shape


def refuse_twice(names: Mapping[str, Any], name: str, file: str) -> None:
    """CheckpointError where a name is there already."""
    if name in names:
        raise CheckpointError(f"import: {file!r} has {name[:200]!r}, which another file has, too; remove one of them")


def chosen(found: Found, exclude: str | None, dtype: torch.dtype | None) -> Found:
    """Without the leaves whose names match, parameters and moments alike, and with floating parameters cast.

    Raises:
      ValueError: the regex is none, or finds nothing.
    """
    leaves, ties = found.leaves, found.ties
    if exclude is not None:
        try:
            pattern = re.compile(exclude)
        except re.error as e:
            raise ValueError(
                f"import: exclude={exclude!r} is no regex ({e}); write one that is found in names"
            ) from None
        gone = {n for n in (*leaves, *ties) if pattern.search(n)}
        if not gone:
            raise ValueError(f"import: exclude={exclude!r} is found in no name; they begin with {list(leaves)[:4]}")
        kept = {n: x for n, x in leaves.items() if n not in gone}
        for second, first in ties.items():  # a value whose first name goes is stored under a name that stays
            if first in gone and second not in gone and not any(kept.get(n) is leaves[first] for n in kept):
                kept[second] = leaves[first]
        ties = {
            a: next(n for n in kept if kept[n] is leaves[b]) for a, b in ties.items() if a not in gone and a not in kept
        }
        leaves = kept
    if dtype is not None:
        leaves = {n: cast(x, dtype, n) if n.startswith("params/") else x for n, x in leaves.items()}
    return found._replace(leaves=leaves, ties=ties)


def cast(leaf: Leaf, dtype: torch.dtype, name: str) -> Leaf:
    """A floating leaf in another dtype; others as they are. Reading it refuses a value beyond that dtype, by name."""
    if not leaf.dtype.is_floating_point or leaf.dtype == dtype:
        return leaf
    return leaf._replace(dtype=dtype, rows=lambda a, b: narrowed(leaf.rows(a, b), dtype, name), at=None)
