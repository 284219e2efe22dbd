"""A rank's chunks through tensorstore alone, whose codecs make the checksums: the way of a machine on which no checksum
of our own can be compiled.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from funczero.checkpoint.arrays import FLIGHT, Array, Pending, context, key_name, kvstore, metadata
from funczero.checkpoint.memory import nbytes, numpy_view
from funczero.checkpoint.names import stored
from funczero.checkpoint.ocdbt import CONFIG
from funczero.checkpoint.writing import Filled


class Coded:
    """Chunks as values of arrays, some bytes under way at a time."""

    def __init__(self, folder: Path, arrays: dict[str, Array]) -> None:
        """Begins to create the arrays."""
        self._folder, self._context = folder, context()
        self._arrays: dict[str, Any] = {name: self._created(name, a) for name, a in arrays.items()}
        self._keys: list[tuple[str, str]] = []
        self._waiting: deque[tuple[int, Pending]] = deque()
        self._under_way = 0

    def _created(self, name: str, a: Array) -> Any:
        import tensorstore as ts

        # brought to disk at the end, once for all, where every commit would be
        how = {"config": CONFIG, "assume_config": True, "target_data_file_size": 2**31}
        kv = kvstore(self._folder, stored(name) + "/", **how)
        kv |= {part: kv[part] | {"file_io_sync": False} for part in ("base", "manifest")}
        spec = {"driver": "zarr3", "dtype": a.dtype, "kvstore": kv, "metadata": metadata(a)}
        return ts.open(spec | {"store_data_equal_to_fill_value": True}, open=True, create=True, context=self._context)

    def put(self, c: Filled) -> None:
        """See `Store`."""
        self._keys.append((c.name, key_name(c.key)))
        array = self._arrays[c.name].result()[c.box.slices()]
        write = array.write(numpy_view(c.values), can_reference_source_data_indefinitely=True)
        self._waiting.append((nbytes(c.values), write))
        self._under_way += nbytes(c.values)
        while self._under_way > FLIGHT:
            size, first = self._waiting[0]
            first.result()
            self._waiting.popleft()
            self._under_way -= size

    def finish(self) -> dict[str, dict[str, str]]:
        """See `Store`; the checksums are read back: the last bytes of every chunk."""
        import tensorstore as ts

        for _, write in self._waiting:
            write.result()
        for created in self._arrays.values():
            created.result()
        out: dict[str, dict[str, str]] = {}
        store = ts.KvStore.open(kvstore(self._folder), context=self._context).result()
        keys = list(dict.fromkeys(self._keys))
        read_back = [store.read(f"{stored(name)}/{key}", byte_range=slice(-4, None)) for name, key in keys]
        for (name, key), tail in zip(keys, read_back, strict=True):
            out.setdefault(name, {})[key] = tail.result().value.hex()
        return out

    def give_up(self) -> None:
        """See `Store`."""
        for write in (*self._arrays.values(), *(write for _, write in self._waiting)):
            write.exception()
