"""One process's chunks into a store of its own, with the checksum of each; on disk when that is known.

Facts: an array of bytes whose chunks are four bytes longer, and which has no `crc32c` codec, has the same chunks on
disk: the values go from where they lie to the system, their checksum behind them.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.checkpoint.arrays import FLIGHT, Array, context, key_name, kvstore, metadata
from funczero.checkpoint.layout import Box
from funczero.checkpoint.memory import nbytes, numpy_view
from funczero.checkpoint.names import stored
from funczero.kernels.registry import kernel, used

LEAST = 1 << 16  # bytes of a chunk that goes past the codecs: opening an array once more costs as much as a small one
SYNCS = 8  # files that are brought to disk at a time, so that they share the file system's commits
CPU = torch.device("cpu")


class Filled(NamedTuple):
    """Values of a chunk, or of a part of it."""

    name: str
    key: tuple[int, ...]
    box: Box
    values: Tensor  # contiguous, on the CPU; they stay as they are until they are written
    row: Tensor | None = None  # [n + 4] bytes: the memory of the values, and behind it room for a checksum


def write(folder: Path, arrays: dict[str, Array], chunks: Iterable[Filled]) -> dict[str, dict[str, str]]:
    """Write pieces of arrays into a store of this process alone, and return the checksum of every chunk: name -> chunk
    -> hexadecimal.

    Args:
      folder: the process's store; orbax merges those of all.
      arrays: every array to create.
      chunks: in any order.
    """
    store = _Store(folder, arrays)
    waiting: deque[tuple[int, Any]] = deque()
    under_way = 0
    try:
        for chunk in chunks:
            waiting.append((nbytes(chunk.values), store.put(chunk)))
            under_way += nbytes(chunk.values)
            while under_way > FLIGHT:
                size, future = waiting[0]
                future.result()
                waiting.popleft()
                under_way -= size
        for _, future in waiting:
            future.result()
        for future in store.opened.values():
            future.result()
    except BaseException:
        for future in (*store.opened.values(), *(future for _, future in waiting)):
            future.exception()  # waits: what has failed writes nothing later, while its folder is removed
        raise
    tails = store.tails()
    _to_disk(folder)
    return tails


class _Store:
    """A store that is being written."""

    def __init__(self, folder: Path, arrays: dict[str, Array]) -> None:
        """Creates the arrays."""
        import tensorstore as ts

        self._ts, self._folder, self._arrays, self._context = ts, folder, arrays, context()
        self._straight = sys.byteorder == "little" and used("crc32c", CPU) == "cpu"
        self._tails: dict[str, dict[str, str]] = {}
        self._unknown: list[tuple[str, str]] = []  # chunks whose checksums tensorstore makes
        self._rows: dict[str, Any] = {}
        self.opened = {name: self._open(name, a.dtype, metadata(a), create=True) for name, a in arrays.items()}

    def put(self, c: Filled) -> Any:
        """Begin to write."""
        a, key = self._arrays[c.name], key_name(c.key)
        if c.row is None or not self._straight or len(c.row) < LEAST or c.box.shape != a.chunk or not a.shape:
            self._unknown.append((c.name, key))
            array = self.opened[c.name].result()[c.box.slices()]
            return array.write(numpy_view(c.values), can_reference_source_data_indefinitely=True)
        crc = kernel("crc32c", CPU).crc32c(c.row[:-4]).to_bytes(4, "little")
        c.row[-4:] = torch.frombuffer(bytearray(crc), dtype=torch.uint8)
        self._tails.setdefault(c.name, {})[key] = crc.hex()
        row = (*(1 for _ in a.chunk[1:]), len(c.row))
        if c.name not in self._rows:
            shape = tuple(ceil(s / k) * r for s, k, r in zip(a.shape, a.chunk, row, strict=True))
            said = metadata(Array(shape, "uint8", row)) | {"codecs": [{"name": "bytes"}]}
            self._rows[c.name] = self._open(c.name, "uint8", said, assume_metadata=True).result()
        at = tuple(slice(k * r, (k + 1) * r) for k, r in zip(c.key, row, strict=True))
        return self._rows[c.name][at].write(c.row.view(row).numpy(), can_reference_source_data_indefinitely=True)

    def tails(self) -> dict[str, dict[str, str]]:
        """The checksums of all that was written."""
        store = self._ts.KvStore.open(kvstore(self._folder), context=self._context).result()
        unknown = list(dict.fromkeys(self._unknown))
        read_back = [store.read(f"{stored(name)}/{key}", byte_range=slice(-4, None)) for name, key in unknown]
        for (name, key), tail in zip(unknown, read_back, strict=True):
            self._tails.setdefault(name, {})[key] = tail.result().value.hex()
        return self._tails

    def _open(self, name: str, dtype: str, said: dict[str, Any], **how: bool) -> Any:
        config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 10**8, "manifest_kind": "single"}
        kv = kvstore(self._folder, stored(name) + "/", config=config, assume_config=True, target_data_file_size=2**31)
        for files in (kv["base"], kv["manifest"]):
            files["file_io_sync"] = False  # once for all at the end: a commit is many
        spec = {"driver": "zarr3", "dtype": dtype, "kvstore": kv, "metadata": said}
        return self._ts.open(spec | {"store_data_equal_to_fill_value": True}, open=True, context=self._context, **how)


def _to_disk(folder: Path) -> None:
    """Return when all files of a folder, and their names, would outlast a power cut."""

    def sync(path: Path) -> None:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    with ThreadPoolExecutor(SYNCS, "funczero-sync") as pool:
        list(pool.map(sync, [*folder.rglob("*"), folder]))
