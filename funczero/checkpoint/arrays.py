"""Arrays on disk: zarr3 in orbax's OCDBT store, as tensorstore is told of them.

Facts: zarr v3's `crc32c` codec puts a checksum of four bytes behind every chunk, and a reader compares it; the bytes
themselves go into the manifest, so that a chunk of another array, or of another save, is found out, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

FLIGHT = 128 << 20  # bytes under way at a time
CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


class Array(NamedTuple):
    """One leaf as the manifest has it."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    tails: dict[str, str] = {}  # chunk -> its checksum, hexadecimal


class Pending(Protocol):
    """What is under way: both wait, one raises."""

    def result(self) -> Any: ...

    def exception(self) -> Any: ...


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
