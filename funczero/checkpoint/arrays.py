"""Arrays on disk: zarr3 in orbax's OCDBT store, written with tensorstore; what a chunk's checksum is.

Facts: zarr v3's `crc32c` codec puts a checksum of four bytes behind every chunk, and a reader compares it; the bytes
themselves go into the manifest, so that a chunk of another array, or of another save, is found out, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from funczero.checkpoint.layout import Box
from funczero.checkpoint.names import stored

FLIGHT = 128 << 20  # bytes under way at a time
CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


class Array(NamedTuple):
    """One leaf as the manifest has it."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    tails: dict[str, str] = {}  # chunk -> its checksum, hexadecimal


def key_name(key: tuple[int, ...]) -> str:
    """A chunk's key in the store."""
    return "/".join(("c", *map(str, key)))


def context() -> Any:
    """What stores share: a cache of the nodes of their trees."""
    import tensorstore as ts

    return ts.Context({"cache_pool#o": {"total_bytes_limit": 100_000_000}})


def kvstore(folder: Path, path: str = "", **more: Any) -> dict[str, Any]:
    """A store in a folder, or what stands in it below a path, as tensorstore is told it."""
    # written once under a name of its own: no lock and rename for the data
    base = {"driver": "file", "path": f"{folder}/"}
    return {
        "driver": "ocdbt",
        "base": {**base, "file_io_locking": {"mode": "non_atomic"}},
        "manifest": base,
        "cache_pool": "cache_pool#o",
        "path": path,
        **more,
    }


def metadata(a: Array) -> dict[str, Any]:
    """An array as zarr describes it."""
    return {
        "shape": a.shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": a.chunk}},
        "codecs": CODECS,
    }


def write(
    folder: Path, arrays: dict[str, Array], chunks: Iterable[tuple[str, tuple[int, ...], Box, np.ndarray]]
) -> dict[str, dict[str, str]]:
    """Write pieces of arrays into a store of this process alone, and return the checksum of every chunk: name -> chunk
    -> hexadecimal.

    Args:
      folder: the process's store; orbax merges those of all.
      arrays: every array to create.
      chunks: (name, chunk, place, values) in any order; the values stay as they are until this returns.
    """
    import tensorstore as ts

    shared = context()
    config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 10**8, "manifest_kind": "single"}
    kv = lambda path: kvstore(folder, path, config=config, assume_config=True, target_data_file_size=2**31)
    opened = {}
    for name, a in arrays.items():
        spec = {
            "driver": "zarr3",
            "dtype": a.dtype,
            "kvstore": kv(stored(name) + "/"),
            "metadata": metadata(a),
            "store_data_equal_to_fill_value": True,
        }
        opened[name] = ts.open(spec, create=True, open=True, context=shared)
    waiting: deque[tuple[int, Any]] = deque()
    under_way, keys = 0, []
    try:
        for name, key, box, values in chunks:
            write = opened[name].result()[box.slices()].write(values, can_reference_source_data_indefinitely=True)
            waiting.append((values.nbytes, write))
            keys.append((name, key_name(key)))
            under_way += values.nbytes
            while under_way > FLIGHT:
                size, future = waiting[0]
                future.result()
                waiting.popleft()
                under_way -= size
        for _, future in waiting:
            future.result()
        for future in opened.values():
            future.result()
    except BaseException:
        for future in (*opened.values(), *(future for _, future in waiting)):
            future.exception()  # waits: what has failed writes nothing later, while its folder is removed
        raise
    store = ts.KvStore.open(kvstore(folder), context=shared).result()
    tails: dict[str, dict[str, str]] = {}
    read_back = [store.read(f"{stored(name)}/{key}", byte_range=slice(-4, None)) for name, key in keys]
    for (name, where), tail in zip(keys, read_back, strict=True):
        tails.setdefault(name, {})[where] = tail.result().value.hex()
    return tails
