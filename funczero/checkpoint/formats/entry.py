"""A leaf of a checkpoint as it is written for others, and files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch


class Entry(NamedTuple):
    """One tensor of an exported file."""

    key: str  # as load_state_dict knows it; of a moment, of its parameter
    name: str  # of the leaf
    dtype: torch.dtype
    shape: tuple[int, ...]
    field: str = ""  # of a moment, as torch calls it

    @property
    def nbytes(self) -> int:
        """Its length in the file."""
        return prod(self.shape) * self.dtype.itemsize


@contextmanager
def written(file: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when all of it is written."""
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as f:
            yield f
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
