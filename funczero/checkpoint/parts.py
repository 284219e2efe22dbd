"""Parts of arrays that are asked for, and then read many at a time; what a store must say of an array."""

from __future__ import annotations

import abc
import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from funczero.checkpoint.arrays import CODECS, FLIGHT, Array, Pending, key_name
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.layout import Box, touched
from funczero.checkpoint.memory import nbytes

GROUP = 64  # arrays looked at, at a time
DESCRIPTION = 1 << 16  # bytes of an array's zarr.json
# what it may say beside shape, dtype and chunks: values of one byte have no order of bytes
FORM: dict[str, tuple[Any, ...]] = {
    "zarr_format": (3,), "node_type": ("array",), "codecs": (CODECS, [{"name": "bytes"}, CODECS[1]]),
    "chunk_key_encoding": ({"name": "default"}, {"name": "default", "configuration": {"separator": "/"}}),
}  # fmt: skip


class Ask(NamedTuple):
    """A part of an array that is wanted."""

    name: str
    box: Box
    room: Callable[[], Tensor]  # where it goes, made when it is read; contiguous, on the CPU, of the array's dtype
    done: Callable[[Tensor], Any]


class Reader(abc.ABC):
    """A committed store: `ask` for parts, then `finish` reads them, many at a time."""

    def __init__(self, folder: Path, arrays: dict[str, Array]) -> None:
        """`arrays`: what the manifest says of each."""
        self.folder, self.arrays = folder, arrays
        self._asked: list[Ask] = []
        try:
            self.open()
        except CheckpointError:
            raise
        except Exception as e:
            raise CheckpointError(f"checkpoint: the arrays in {str(folder)!r} cannot be opened ({_short(e)})") from None

    @abc.abstractmethod
    def open(self) -> None:
        """Open the store."""

    @abc.abstractmethod
    def look(self, ask: Ask) -> Sequence[Pending]:
        """Begin to look at what the store says of an array, and at its chunks."""

    @abc.abstractmethod
    def check(self, ask: Ask, looks: Sequence[Pending]) -> None:
        """CheckpointError where that is not the manifest's; before there is memory for it."""

    @abc.abstractmethod
    def read(self, ask: Ask, out: Tensor) -> Pending | None:
        """Begin to read; what is read is not the part before all its checksums are right."""

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
        waiting: deque[tuple[Ask, Tensor, Pending | None]] = deque()
        looks: list[Pending] = []
        under_way = 0
        try:
            for first in range(0, len(asked), GROUP):
                group = [(ask, self.look(ask)) for ask in asked[first : first + GROUP]]
                looks = [look for _, found in group for look in found]
                for ask, found in group:
                    with naming(ask.name):
                        self.check(ask, found)
                        out = ask.room()
                        waiting.append((ask, out, self.read(ask, out)))
                    under_way += nbytes(out)
                    while under_way > FLIGHT:
                        under_way -= self._wait(waiting)
            while waiting:
                self._wait(waiting)
        except BaseException:
            for pending in (*looks, *(pending for *_, pending in waiting if pending is not None)):
                pending.exception()  # waits: nothing is written later into memory that somebody else has by then
            raise

    def _wait(self, waiting: deque[tuple[Ask, Tensor, Pending | None]]) -> int:
        """The oldest read, which is no longer waited for once it has ended."""
        ask, out, pending = waiting[0]
        with naming(ask.name):
            if pending is not None:
                pending.result()
        waiting.popleft()
        ask.done(out)
        return nbytes(out)

    def chunks(self, ask: Ask) -> list[tuple[str, Box]]:
        """The chunks under a part, by their keys."""
        chunk = self.arrays[ask.name].chunk
        return [
            (key_name(key), Box(tuple(k * c for k, c in zip(key, chunk, strict=True)), chunk))
            for key in touched(ask.box, chunk)
        ]


def described(name: str, array: Array, text: bytes) -> None:
    """Compare an array's zarr.json with the manifest.

    Raises:
      CheckpointError: it is missing, too long, or says something else.
    """
    if not text or len(text) > DESCRIPTION:
        raise CheckpointError(
            damaged(name, f"its zarr.json is {f'longer than {DESCRIPTION} bytes' if text else 'missing'}")
        )
    found = json.loads(text)
    have = found.get("data_type"), found.get("shape"), found["chunk_grid"]["configuration"]["chunk_shape"]
    if have != (array.dtype, list(array.shape), list(array.chunk)):
        told = f"{have[0]} {have[1]} in chunks {have[2]}"[:200]
        raise CheckpointError(
            damaged(name, f"the store holds {told}; the manifest says {array.dtype} {array.shape} in {array.chunk}")
        )
    odd = next((k for k, x in FORM.items() if found.get(k) not in x), None)
    if odd or found.get("storage_transformers"):
        odd = odd or "storage_transformers"
        raise CheckpointError(
            damaged(name, f"its zarr.json has another {odd!r} than a save writes: {str(found.get(odd))[:100]}")
        )


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
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
