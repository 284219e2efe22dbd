"""Reading straight from a store's files into the memory where the values belong, each byte once, checked while it is in
a cache.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from funczero.checkpoint.arrays import Array
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.layout import Box
from funczero.checkpoint.memory import torch_dtype
from funczero.checkpoint.names import stored
from funczero.checkpoint.parts import DESCRIPTION, Ask, Pending, Reader, damaged, described
from funczero.checkpoint.places import Place, Places
from funczero.kernels.registry import kernel

THREADS = 4  # that read: a disk answers several at once


class Chunk(NamedTuple):
    """One that is to be read."""

    leaf: str
    key: str
    array: Array
    place: Place | bytes
    inside: tuple[slice, ...]  # what of it is wanted
    into: Tensor  # of that shape

    def fill(self) -> None:
        """Read it, and compare it with the checksum behind it and with the manifest's.

        Raises:
          CheckpointError: it is another one.
        """
        shape, dtype = self.array.chunk, torch_dtype(self.array.dtype)
        whole = self.into.shape == shape and self.into.is_contiguous()
        values = self.into if whole else torch.empty(shape, dtype=dtype)
        crc, tail = _read(self.place, values.view(-1).view(torch.uint8))
        want = self.array.tails[self.key]
        if tail.hex() != want:
            raise CheckpointError(damaged(self.leaf, f"chunk {self.key} is another one"))
        if crc.to_bytes(4, "little").hex() != want:
            raise CheckpointError(damaged(self.leaf, f"the values of chunk {self.key} have another checksum"))
        if not whole:
            self.into.copy_(values[self.inside])


class Chunks(NamedTuple):
    """Those of one part, under way."""

    reads: list[Future[None]]

    def result(self) -> None:
        """Waits for all, and raises the first's error."""
        self.exception()
        for read in self.reads:
            read.result()

    def exception(self) -> None:
        """Waits for all."""
        for read in self.reads:
            read.exception()


class Direct(Reader):
    """A store by the places of its values."""

    def open(self) -> None:
        """See `Reader`."""
        self._places = Places(self.folder, sum(1 + len(a.tails) for a in self.arrays.values()))

    def finish(self) -> None:
        """See `Reader`."""
        with ThreadPoolExecutor(THREADS, "funczero-read") as self._pool:
            super().finish()

    def look(self, ask: Ask) -> Sequence[Pending]:
        """Nothing is under way: the tree of keys is in memory."""
        return ()

    def check(self, ask: Ask, looks: Sequence[Pending]) -> None:
        """See `Reader`."""
        array, path = self.arrays[ask.name], stored(ask.name)
        described(ask.name, array, _text(self._places.of(f"{path}/zarr.json")))
        size = prod(array.chunk) * torch_dtype(array.dtype).itemsize + 4
        for key, _ in self.chunks(ask):
            place = self._places.of(f"{path}/{key}")
            if place is None or key not in array.tails:
                raise CheckpointError(damaged(ask.name, f"chunk {key} is missing"))
            if _size(place) != size:
                raise CheckpointError(damaged(ask.name, f"chunk {key} is another one"))

    def read(self, ask: Ask, out: Tensor) -> Pending | None:
        """See `Reader`."""
        return Chunks([self._pool.submit(self._chunk(ask, out, key, box).fill) for key, box in self.chunks(ask)])

    def _chunk(self, ask: Ask, out: Tensor, key: str, box: Box) -> Chunk:
        place, part = self._places.of(f"{stored(ask.name)}/{key}"), box.meet(ask.box)
        assert place is not None  # `check` has seen it
        into = out.detach()[part.slices(ask.box.start)]
        return Chunk(ask.name, key, self.arrays[ask.name], place, part.slices(box.start), into)


def _size(place: Place | bytes) -> int:
    return len(place) if isinstance(place, bytes) else place.size


def _text(place: Place | bytes | None) -> bytes:
    """A short value; of one that is too long as much as tells that."""
    if not isinstance(place, Place):
        return place or b""
    out = torch.empty(min(place.size, DESCRIPTION + 1), dtype=torch.uint8)
    file = _open(place)
    try:
        kernel("crc32c", out.device).read(file, place.start, out)
    finally:
        os.close(file)
    return out.numpy().tobytes()


def _read(place: Place | bytes, out: Tensor) -> tuple[int, bytes]:
    """Fill memory with a chunk's values; their checksum, and the one that stands behind them."""
    forms = kernel("crc32c", out.device)
    if isinstance(place, bytes):
        out.copy_(torch.frombuffer(bytearray(place[:-4]), dtype=torch.uint8))
        return forms.crc32c(out), place[-4:]
    file = _open(place)
    try:
        return forms.read(file, place.start, out), os.pread(file, 4, place.start + len(out))
    finally:
        os.close(file)


def _open(place: Place) -> int:
    """A file's descriptor; OSError where it is no regular file (a reader of a pipe would wait)."""
    file = os.open(place.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(f"{str(place.file)!r} is no regular file")
    return file
