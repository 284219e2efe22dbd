"""Reading through tensorstore alone, which finds, checks and decodes the chunks: the way of a machine on which no
checksum of our own can be compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from funczero.checkpoint.arrays import context, kvstore, metadata
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.memory import numpy_view, torch_dtype
from funczero.checkpoint.names import stored
from funczero.checkpoint.parts import Ask, Pending, Reader, damaged, described


class Decoded(Reader):
    """A store as tensorstore reads it, with checksums that it compares, too."""

    def open(self) -> None:
        """See `Reader`."""
        import tensorstore as ts

        self._ts, self._context = ts, context()
        self._store = ts.KvStore.open(kvstore(self.folder), context=self._context).result()

    def look(self, ask: Ask) -> Sequence[Any]:
        """See `Reader`."""
        array, path = self.arrays[ask.name], stored(ask.name)
        # where a whole chunk ends: one that is shorter is found out before there is room for it
        end = prod(array.chunk) * torch_dtype(array.dtype).itemsize + 4
        tails = [self._store.read(f"{path}/{key}", byte_range=slice(end - 4, end)) for key, _ in self.chunks(ask)]
        return [self._store.read(f"{path}/zarr.json"), *tails]

    def check(self, ask: Ask, looks: Sequence[Any]) -> None:
        """See `Reader`."""
        array, (said, *tails) = self.arrays[ask.name], looks
        described(ask.name, array, said.result().value)
        for (key, _), tail in zip(self.chunks(ask), tails, strict=True):
            value = tail.result().value.hex()
            if value != array.tails.get(key):
                raise CheckpointError(damaged(ask.name, f"chunk {key} is {'another one' if value else 'missing'}"))

    def read(self, ask: Ask, out: Tensor) -> Pending | None:
        """By what the manifest says: nothing that the store says of an array asks for memory."""
        if not out.numel():
            return None
        array = self.arrays[ask.name]
        spec = {
            "driver": "zarr3",
            "dtype": array.dtype,
            "kvstore": kvstore(self.folder, stored(ask.name) + "/"),
            "metadata": metadata(array),
            "fill_missing_data_reads": False,
        }
        opened = self._ts.open(spec, open=True, assume_metadata=True, read=True, context=self._context).result()
        source = opened[ask.box.slices()]
        return self._ts.array(numpy_view(out), copy=False, write=True).write(
            source.translate_to[(0,) * source.ndim] if source.ndim else source
        )
