"""A rank's chunks straight into one file, each with its checksum behind it; the tree of their keys follows."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from funczero.checkpoint import ocdbt
from funczero.checkpoint.arrays import Array, key_name
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.layout import Box
from funczero.checkpoint.names import stored
from funczero.checkpoint.ocdbt import INLINE, Span
from funczero.checkpoint.writing import Filled, description
from funczero.kernels.registry import kernel


class Straight:
    """The values go from where they lie to the system, in pieces that are in a cache since they were checked."""

    def __init__(self, folder: Path, arrays: dict[str, Array]) -> None:
        """Makes the folder, inside one that is there, and a file in it."""
        self._folder, self._arrays, self._path = folder, arrays, f"d/{uuid.uuid4().hex}"
        folder.mkdir()
        (folder / "d").mkdir()
        self._file, self._end = (folder / self._path).open("xb"), 0
        self._values: dict[str, bytes | Span] = {f"{stored(n)}/zarr.json": description(a) for n, a in arrays.items()}
        self._parts: dict[tuple[str, tuple[int, ...]], tuple[Tensor, int]] = {}  # chunks, and how many values they lack
        self._tails: dict[str, dict[str, str]] = {}

    def put(self, c: Filled) -> None:
        """See `Store`."""
        a = self._arrays[c.name]
        whole = c.values if c.box.shape == a.chunk else self._pasted(c, a)
        if whole is not None:
            row = whole.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
            key = key_name(c.key)
            self._tails.setdefault(c.name, {})[key] = self._written(f"{stored(c.name)}/{key}", row)

    def _written(self, key: str, row: Tensor) -> str:
        """Write a chunk; its checksum, hexadecimal."""
        forms = kernel("crc32c", row.device)
        if len(row) + 4 <= INLINE:
            tail = forms.crc32c(row).to_bytes(4, "little")
            self._values[key] = row.numpy().tobytes() + tail
            return tail.hex()
        with self._naming():
            crc = forms.write(self._file.fileno(), self._end, row)
        self._values[key] = Span(self._end, len(row) + 4)
        self._end += len(row) + 4
        return crc.to_bytes(4, "little").hex()

    def _pasted(self, c: Filled, a: Array) -> Tensor | None:
        """A chunk that comes in parts, or reaches over the array's end, once it is complete."""
        where, start = (c.name, c.key), tuple(k * s for k, s in zip(c.key, a.chunk, strict=True))
        if where not in self._parts:
            inside = Box(start, a.chunk).meet(Box((0,) * len(a.shape), a.shape))
            self._parts[where] = torch.zeros(a.chunk, dtype=c.values.dtype), prod(inside.shape)
        whole, lacks = self._parts.pop(where)
        whole[c.box.slices(start)] = c.values
        if lacks > c.values.numel():
            self._parts[where] = whole, lacks - c.values.numel()
            return None
        return whole

    def finish(self) -> dict[str, dict[str, str]]:
        """See `Store`."""
        if self._parts:
            (name, key), (_, lacks) = next(iter(self._parts.items()))
            raise CheckpointError(f"save: {lacks} values of chunk {key_name(key)} of leaf {name!r} have not come")
        node = ocdbt.node(self._path, self._values)
        with self._naming(), self._file:
            self._file.seek(self._end)
            self._file.write(node)
        manifest = ocdbt.manifest(self._path, Span(self._end, len(node)), self._values)
        (self._folder / "manifest.ocdbt").write_bytes(manifest)
        return self._tails

    def give_up(self) -> None:
        """See `Store`."""
        with contextlib.suppress(OSError):
            self._file.close()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """An error of the system is told with the file."""
        try:
            yield
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self._folder / self._path)) from None
