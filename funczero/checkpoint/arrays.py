"""Arrays on disk: zarr3 in orbax's OCDBT store, written and read with tensorstore; what a chunk's checksum is, and that
it is still that.

Facts: zarr v3's `crc32c` codec puts a checksum of four bytes behind every chunk, and a reader compares it; the bytes
themselves go into the manifest, so that a chunk of another array, or of another save, is found out, too.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.layout import Box, touched
from funczero.checkpoint.memory import nbytes, numpy_view, torch_dtype
from funczero.checkpoint.names import stored

FLIGHT = 128 << 20  # bytes under way at a time
GROUP = 64  # arrays opened at a time
CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
DESCRIPTION = 1 << 16  # bytes of an array's zarr.json
# what it may say beside shape, dtype and chunks: values of one byte have no order of bytes
FORM: dict[str, tuple[Any, ...]] = {
    "zarr_format": (3,), "node_type": ("array",), "codecs": (CODECS, [{"name": "bytes"}, CODECS[1]]),
    "chunk_key_encoding": ({"name": "default"}, {"name": "default", "configuration": {"separator": "/"}}),
}  # fmt: skip


class Array(NamedTuple):
    """One leaf as the manifest has it."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    tails: dict[str, str] = {}  # chunk -> its checksum, hexadecimal


def key_name(key: tuple[int, ...]) -> str:
    """A chunk's key in the store."""
    return "/".join(("c", *map(str, key)))


def _context() -> Any:
    import tensorstore as ts

    return ts.Context({"cache_pool#o": {"total_bytes_limit": 100_000_000}})


def _kvstore(folder: Path, path: str = "", **more: Any) -> dict[str, Any]:
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


def _metadata(a: Array) -> dict[str, Any]:
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

    context = _context()
    config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 10**8, "manifest_kind": "single"}
    kv = lambda path: _kvstore(folder, path, config=config, assume_config=True, target_data_file_size=2**31)
    opened = {}
    for name, a in arrays.items():
        spec = {
            "driver": "zarr3",
            "dtype": a.dtype,
            "kvstore": kv(stored(name) + "/"),
            "metadata": _metadata(a),
            "store_data_equal_to_fill_value": True,
        }
        opened[name] = ts.open(spec, create=True, open=True, context=context)
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
    store = ts.KvStore.open(_kvstore(folder), context=context).result()
    tails: dict[str, dict[str, str]] = {}
    read_back = [store.read(f"{stored(name)}/{key}", byte_range=slice(-4, None)) for name, key in keys]
    for (name, where), tail in zip(keys, read_back, strict=True):
        tails.setdefault(name, {})[where] = tail.result().value.hex()
    return tails


class Ask(NamedTuple):
    """A part of an array that is wanted."""

    name: str
    box: Box
    room: Callable[[], Tensor]  # where it goes, made when it is read; contiguous, on the CPU, of the array's dtype
    done: Callable[[Tensor], Any]


class Reader:
    """A committed store: `ask` for parts, then `finish` reads them, many at a time."""

    def __init__(self, folder: Path, arrays: dict[str, Array]) -> None:
        """`arrays`: what the manifest says of each."""
        import tensorstore as ts

        self._ts, self._folder, self._arrays, self._context = ts, folder, arrays, _context()
        self._asked: list[Ask] = []
        try:
            self._store = ts.KvStore.open(_kvstore(folder), context=self._context).result()
        except Exception as e:
            raise CheckpointError(f"checkpoint: the arrays in {str(folder)!r} cannot be opened ({_short(e)})") from None

    def ask(
        self, name: str, box: Box, room: Callable[[], Tensor], done: Callable[[Tensor], Any] = lambda x: None
    ) -> None:
        """Remember to read a part of an array."""
        self._asked.append(Ask(name, box, room, done))

    def finish(self) -> None:
        """Read all that was asked for.

        Raises:
          CheckpointError: an array is not the manifest's, or a checksum differs; it names the leaf.
        """
        asked, self._asked = self._asked, []
        waiting: deque[tuple[Ask, Tensor, Any]] = deque()
        looks: list[Any] = []
        under_way = 0
        try:
            for first in range(0, len(asked), GROUP):
                group = [self._start(ask) for ask in asked[first : first + GROUP]]
                looks = [look for _, said, tails in group for look in (said, *tails)]
                for ask, said, tails in group:
                    with _naming(ask.name):
                        self._check(ask, said, tails)
                        out = ask.room()
                        waiting.append((ask, out, self._read(ask, out)))
                    under_way += nbytes(out)
                    while under_way > FLIGHT:
                        under_way -= self._wait(waiting)
            while waiting:
                self._wait(waiting)
        except BaseException:
            for future in (*looks, *(future for *_, future in waiting if future is not None)):
                future.exception()  # waits: nothing is written later into memory that somebody else has by then
            raise

    def _start(self, ask: Ask) -> tuple[Ask, Any, list[Any]]:
        """Look at what the store says of an array, and at its checksums, both under way."""
        array = self._arrays[ask.name]
        # where a whole chunk ends: one that is shorter is found out before there is room for it
        end = prod(array.chunk) * torch_dtype(array.dtype).itemsize + 4
        tails = [
            self._store.read(f"{stored(name)}/{key}", byte_range=slice(end - 4, end)) for name, key in self._keys(ask)
        ]
        return ask, self._store.read(f"{stored(ask.name)}/zarr.json"), tails

    def _keys(self, ask: Ask) -> list[tuple[str, str]]:
        return [(ask.name, key_name(key)) for key in touched(ask.box, self._arrays[ask.name].chunk)]

    def _check(self, ask: Ask, said: Any, tails: list[Any]) -> None:
        """The store's array, and the checksums of the chunks under a part, against the manifest's."""
        array, text = self._arrays[ask.name], said.result().value
        if not text or len(text) > DESCRIPTION:
            raise CheckpointError(
                damaged(ask.name, f"its zarr.json is {f'of {len(text)} bytes' if text else 'missing'}")
            )
        found = json.loads(text)
        have = found.get("data_type"), found.get("shape"), found["chunk_grid"]["configuration"]["chunk_shape"]
        if have != (array.dtype, list(array.shape), list(array.chunk)):
            told = f"{have[0]} {have[1]} in chunks {have[2]}"[:200]
            raise CheckpointError(
                damaged(
                    ask.name, f"the store holds {told}; the manifest says {array.dtype} {array.shape} in {array.chunk}"
                )
            )
        if (odd := next((k for k, x in FORM.items() if found.get(k) not in x), None)) or found.get(
            "storage_transformers"
        ):
            raise CheckpointError(
                damaged(
                    ask.name,
                    f"its zarr.json has another {odd or 'storage_transformers'!r} than a save writes:"
                    f" {str(found.get(odd or 'storage_transformers'))[:100]}",
                )
            )
        for (_, key), tail in zip(self._keys(ask), tails, strict=True):
            value = tail.result().value.hex()
            if value != array.tails.get(key):
                raise CheckpointError(damaged(ask.name, f"chunk {key} is {'another one' if value else 'missing'}"))

    def _read(self, ask: Ask, out: Tensor) -> Any:
        """Read by what the manifest says: nothing that the store says of an array asks for memory."""
        if not out.numel():
            return None
        array = self._arrays[ask.name]
        spec = {
            "driver": "zarr3",
            "dtype": array.dtype,
            "kvstore": _kvstore(self._folder, stored(ask.name) + "/"),
            "metadata": _metadata(array),
        }
        opened = self._ts.open(
            spec | {"fill_missing_data_reads": False, "assume_metadata": True},
            open=True,
            read=True,
            context=self._context,
        ).result()
        source = opened[ask.box.slices()]
        return self._ts.array(numpy_view(out), copy=False, write=True).write(
            source.translate_to[(0,) * source.ndim] if source.ndim else source
        )

    def _wait(self, waiting: deque[tuple[Ask, Tensor, Any]]) -> int:
        """The oldest read, which is no longer waited for once it has ended."""
        ask, out, future = waiting[0]
        with _naming(ask.name):
            if future is not None:
                future.result()
        waiting.popleft()
        ask.done(out)
        return nbytes(out)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of the store name the leaf."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:
        raise CheckpointError(damaged(name, _short(e))) from None


def damaged(name: str, why: str) -> str:
    """The sentence on a leaf that is not what was saved."""
    return f"checkpoint: leaf {name!r} is damaged: {why}"


def _short(e: Exception) -> str:
    """An error of the store without its source locations."""
    return str(e).split(" [", 1)[0].strip() or type(e).__name__
