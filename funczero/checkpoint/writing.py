"""A store of one process that is being written: what is put there, and what it says of its arrays."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from funczero.checkpoint.arrays import Array, metadata
from funczero.checkpoint.layout import Box


class Filled(NamedTuple):
    """Values of a chunk, or of a part of it."""

    name: str
    key: tuple[int, ...]
    box: Box
    values: Tensor  # on the CPU; they stay as they are until they are written


class Store(Protocol):
    """A store that is being written; its arrays are created as it begins."""

    def put(self, c: Filled) -> None:
        """Write, or begin to."""

    def finish(self) -> dict[str, dict[str, str]]:
        """Return when all is written, with the checksums: name -> chunk -> hexadecimal."""

    def give_up(self) -> None:
        """After an error: what was begun writes nothing later, while its folder is removed."""


def description(a: Array) -> bytes:
    """An array's zarr.json, as tensorstore writes it."""
    grid = {"name": "regular", "configuration": {"chunk_shape": a.chunk}}
    return json.dumps(
        _form(a.dtype) | {"shape": a.shape, "chunk_grid": grid}, sort_keys=True, separators=(",", ":")
    ).encode()


@cache
def _form(dtype: str) -> dict[str, Any]:
    """What a zarr.json says beside sizes."""
    import tensorstore as ts

    store = ts.KvStore.open("memory://").result()
    spec = {
        "driver": "zarr3",
        "dtype": dtype,
        "kvstore": store.spec().to_json(),
        "metadata": metadata(Array((1,), dtype, (1,))),
    }
    made = ts.open(spec, create=True).result()
    assert made.kvstore is not None
    return json.loads(made.kvstore.read("zarr.json").result().value)
