"""One process's chunks into a store of its own, with the checksum of each; on disk when that is known.

Facts: an array of bytes whose chunks are four bytes longer, and which has no `crc32c` codec, has the same chunks on
disk: the values go from where they lie to the system, their checksum behind them. Opening an array costs a third of a
millisecond, so small chunks are put as plain values.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from funczero.checkpoint.arrays import FLIGHT, Array, Pending, context, key_name, kvstore, metadata
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.layout import Box
from funczero.checkpoint.memory import nbytes, numpy_view
from funczero.checkpoint.names import stored
from funczero.kernels.registry import kernel, used

LARGE = 1 << 20  # bytes of a chunk from which on a copy costs more than opening an array
SYNCS = 8  # files that are brought to disk at a time, so that they share the file system's commits
CPU = torch.device("cpu")
CONFIG = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 10**8, "manifest_kind": "single"}


class Filled(NamedTuple):
    """Values of a chunk, or of a part of it."""

    name: str
    key: tuple[int, ...]
    box: Box
    values: Tensor  # on the CPU; they stay as they are until they are written
    row: Tensor | None = None  # [n + 4] bytes: the memory of the values, and behind it room for a checksum


class Store(Protocol):
    """A store that is being written; its arrays are created as it begins."""

    created: list[Pending]

    def put(self, c: Filled) -> list[Pending]:
        """Begin to write."""

    def tails(self) -> dict[str, dict[str, str]]:
        """The checksums of all that was written: name -> chunk -> hexadecimal."""


def write(folder: Path, arrays: dict[str, Array], chunks: Iterable[Filled]) -> dict[str, dict[str, str]]:
    """Write pieces of arrays into a store of this process alone, and return the checksum of every chunk: name -> chunk
    -> hexadecimal.

    Law: both ways, with a checksum of our own and without, write the same chunks.

    Args:
      folder: the process's store; orbax merges those of all.
      arrays: every array to create.
      chunks: in any order.
    """
    straight = sys.byteorder == "little" and used("crc32c", CPU) == "cpu"
    store: Store = (Straight if straight else Coded)(folder, arrays)
    waiting: deque[tuple[int, list[Pending]]] = deque()
    under_way = 0
    try:
        for chunk in chunks:
            waiting.append((nbytes(chunk.values), store.put(chunk)))
            under_way += nbytes(chunk.values)
            while under_way > FLIGHT:
                size, writes = waiting[0]
                _done(writes)
                waiting.popleft()
                under_way -= size
        for _, writes in waiting:
            _done(writes)
        _done(store.created)
    except BaseException:
        for write in (*store.created, *(write for _, writes in waiting for write in writes)):
            write.exception()  # waits: what has failed writes nothing later, while its folder is removed
        raise
    tails = store.tails()
    _to_disk(folder)
    return tails


class Coded:
    """Through zarr's codecs, which make the checksums."""

    def __init__(self, folder: Path, arrays: dict[str, Array]) -> None:
        self._folder, self._context = folder, context()
        self._arrays = {name: _array(folder, name, a, self._context, create=True) for name, a in arrays.items()}
        self.created: list[Pending] = list(self._arrays.values())
        self._keys: list[tuple[str, str]] = []

    def put(self, c: Filled) -> list[Pending]:
        """See `Store`."""
        self._keys.append((c.name, key_name(c.key)))
        array = self._arrays[c.name].result()[c.box.slices()]
        return [array.write(numpy_view(c.values), can_reference_source_data_indefinitely=True)]

    def tails(self) -> dict[str, dict[str, str]]:
        """Read back: the last bytes of every chunk."""
        import tensorstore as ts

        out: dict[str, dict[str, str]] = {}
        store = ts.KvStore.open(kvstore(self._folder), context=self._context).result()
        keys = list(dict.fromkeys(self._keys))
        read_back = [store.read(f"{stored(name)}/{key}", byte_range=slice(-4, None)) for name, key in keys]
        for (name, key), tail in zip(keys, read_back, strict=True):
            out.setdefault(name, {})[key] = tail.result().value.hex()
        return out


class Straight:
    """Rows of bytes, each a chunk and its checksum."""

    def __init__(self, folder: Path, arrays: dict[str, Array]) -> None:
        import tensorstore as ts

        self._folder, self._arrays, self._context = folder, arrays, context()
        self._store = ts.KvStore.open(_files(folder, ""), context=self._context).result()
        self._large: dict[str, Any] = {}  # arrays of rows
        self._parts: dict[tuple[str, tuple[int, ...]], tuple[Tensor, int]] = {}  # rows, and how many values they lack
        self._tails: dict[str, dict[str, str]] = {}
        described = {f"{stored(name)}/zarr.json": _description(a) for name, a in arrays.items()}
        self.created: list[Pending] = [self._store.write(key, text) for key, text in described.items()]

    def put(self, c: Filled) -> list[Pending]:
        """See `Store`."""
        a = self._arrays[c.name]
        row = c.row if c.row is not None and c.box.shape == a.chunk else self._pasted(c, a)
        if row is None:
            return []
        crc = kernel("crc32c", CPU).crc32c(row[:-4]).to_bytes(4, "little")
        row[-4:] = torch.frombuffer(bytearray(crc), dtype=torch.uint8)
        self._tails.setdefault(c.name, {})[key_name(c.key)] = crc.hex()
        if len(row) < LARGE or not a.shape:
            return [self._store.write(f"{stored(c.name)}/{key_name(c.key)}", row.numpy().tobytes())]
        return [self._row(c.name, c.key, a, row)]

    def _row(self, name: str, key: tuple[int, ...], a: Array, row: Tensor) -> Pending:
        """Begin to write one from where it lies."""
        long = (*(1 for _ in a.chunk[1:]), len(row))
        if name not in self._large:
            shape = tuple(ceil(n / c) * r for n, c, r in zip(a.shape, a.chunk, long, strict=True))
            rows = Array(shape, "uint8", long)
            codecs = [{"name": "bytes"}]
            self._large[name] = _array(self._folder, name, rows, self._context, codecs, assume_metadata=True).result()
        at = tuple(slice(k * r, (k + 1) * r) for k, r in zip(key, long, strict=True))
        return self._large[name][at].write(row.view(long).numpy(), can_reference_source_data_indefinitely=True)

    def _pasted(self, c: Filled, a: Array) -> Tensor | None:
        """The row of a chunk that comes in parts, or reaches over the array's end, once it is complete."""
        n, where = prod(a.chunk) * c.values.element_size(), (c.name, c.key)
        start = tuple(k * s for k, s in zip(c.key, a.chunk, strict=True))
        if where not in self._parts:
            inside = Box(start, a.chunk).meet(Box((0,) * len(a.shape), a.shape))
            new = torch.empty if c.box.shape == a.chunk else torch.zeros
            self._parts[where] = new(n + 4, dtype=torch.uint8), prod(inside.shape)
        row, lacks = self._parts.pop(where)
        row[:n].view(c.values.dtype).view(a.chunk)[c.box.slices(start)] = c.values
        if lacks > c.values.numel():
            self._parts[where] = row, lacks - c.values.numel()
            return None
        return row

    def tails(self) -> dict[str, dict[str, str]]:
        """See `Store`."""
        if self._parts:
            (name, key), (_, lacks) = next(iter(self._parts.items()))
            raise CheckpointError(f"save: {lacks} values of chunk {key_name(key)} of leaf {name!r} have not come")
        return self._tails


def _files(folder: Path, path: str) -> dict[str, Any]:
    """What is written of a store; it is brought to disk at the end, once for all, where every commit would be."""
    kv = kvstore(folder, path, config=CONFIG, assume_config=True, target_data_file_size=2**31)
    return kv | {part: kv[part] | {"file_io_sync": False} for part in ("base", "manifest")}


def _array(folder: Path, name: str, a: Array, shared: Any, codecs: Any = None, **how: Any) -> Any:
    """Begin to open an array that is to be written."""
    import tensorstore as ts

    said = metadata(a) | ({} if codecs is None else {"codecs": codecs})
    spec = {"driver": "zarr3", "dtype": a.dtype, "kvstore": _files(folder, stored(name) + "/"), "metadata": said}
    return ts.open(spec | {"store_data_equal_to_fill_value": True}, open=True, context=shared, **how)


def _description(a: Array) -> bytes:
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


def _done(writes: list[Pending]) -> None:
    for write in writes:
        write.result()


def _to_disk(folder: Path) -> None:
    """Return when all files of a folder, and their names, would outlast a power cut.

    Raises:
      OSError: the disk does not take them.
    """

    def sync(path: Path) -> None:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        except OSError as e:
            if not (path.is_dir() and e.errno in (errno.EINVAL, errno.ENOTSUP)):  # file systems that keep names anyway
                raise
        finally:
            os.close(file)

    with ThreadPoolExecutor(SYNCS, "funczero-sync") as pool:
        list(pool.map(sync, [*folder.rglob("*"), folder, folder.parent]))
