"""The ranks of a save or a restore: messages through the world's store, and a pulse by which a dead rank is told from a slow one. No collective is involved."""
from __future__ import annotations

import contextlib
import json
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist

from funczero.checkpoint.arrays import CheckpointError

BEAT, DEAD = 1.0, 8.0  # seconds between two beats; without one for so long, a rank is taken for dead


class Peers:
    """This rank among those that share a checkpointer; a world of one needs no other."""

    def __init__(self) -> None:
        """Opens a connection of its own: one that waits blocks every other user of it."""
        world = dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if world else (0, 1)
        base: Any = dist.distributed_c10d._get_default_store() if world else dist.HashStore()
        self._clone, self._anchor = base.clone, base  # the anchor keeps rank 0's server up
        first = base.clone()
        self._space = f"funczero/checkpoint/{first.add(f'funczero/checkpoint/count/{self.rank}', 1)}"  # the n-th of every rank belong together
        self.store = self.connection()
        self._mine: list[str] = []  # keys that this rank has published
        self._seen: dict[int, tuple[bytes, float]] = {}

    def connection(self) -> Any:
        """A connection for another thread."""
        return dist.PrefixStore(self._space, self._clone())

    def put(self, key: str, value: Any, store: Any = None) -> None:
        """Publish JSON."""
        self._mine.append(key)
        self._ask(lambda: (store or self.store).set(key, zlib.compress(json.dumps(value).encode(), 1)))

    def put_bytes(self, key: str, value: bytes, store: Any) -> None:
        """Publish bytes."""
        self._mine.append(key)
        self._ask(lambda: store.set(key, value))

    def forget(self, number: int) -> None:
        """Take back what this rank published for calls before `number`, which all ranks have left."""
        old = lambda key: key.split("/")[0].isdigit() and int(key.split("/")[0]) < number
        for key in [k for k in self._mine if old(k)]:
            self._ask(lambda key=key: self.store.delete_key(key))
        self._mine = [k for k in self._mine if not old(k)]

    def there(self, key: str, store: Any = None) -> bool:
        """Has it been published?"""
        return self._ask(lambda: (store or self.store).check([key]))

    def get(self, key: str, store: Any = None) -> Any:
        """What was published, as JSON."""
        return json.loads(zlib.decompress(self.get_bytes(key, store or self.store)))

    def get_bytes(self, key: str, store: Any) -> bytes:
        """What was published."""
        return self._ask(lambda: store.get(key))

    def wait(self, keys: Iterable[tuple[int, str]], what: str, store: Any = None, join: float | None = None, raw: bool = False) -> list[Any]:
        """What ranks publish, in order, as JSON or as bytes.

        Args:
          keys: (the rank that will publish it, key).
          what: for the message.
          join: seconds in which a rank must come at all; None: as long as it lives.

        Raises:
          CheckpointError: a rank is dead, or did not come.
        """
        out = []
        for rank, key in keys:
            start, pause = time.monotonic(), 0.0005
            while not self.there(key, store):
                self._alive(rank, what, store, came=join is None)
                if join is not None and time.monotonic() - start > join:
                    raise CheckpointError(f"{what}: rank {rank} did not come within {join:g} s, while rank {self.rank} waits; every rank calls save and restore, at the same step")
                time.sleep(pause)
                pause = min(0.02, pause * 1.5)
            out.append(self.get_bytes(key, store or self.store) if raw else self.get(key, store))
        return out

    def _alive(self, rank: int, what: str, store: Any, came: bool) -> None:
        """Look at a rank's pulse, at most ten times a second. Of one that `came` already, the lack of any pulse is silence, too."""
        value, when = self._seen.get(rank, (None, 0.0))
        now = time.monotonic()
        if rank == self.rank or (value is not None and now - when < 0.1):
            return
        beat = self.get_bytes(f"beat/{rank}", store or self.store) if self.there(f"beat/{rank}", store) else b""
        if beat != value:
            self._seen[rank] = (beat, now)
        elif now - when > DEAD and (beat or came):
            raise CheckpointError(f"{what}: rank {rank} has not been heard of for {now - when:.0f} s; its process was ended, or its machine is lost")

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """This rank's pulse, as long as the block lasts."""
        stop, store = threading.Event(), self.connection()
        self._seen.clear()
        if self.size == 1:
            yield
            return
        store.set(f"beat/{self.rank}", repr(time.monotonic()))

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # the store is gone: nobody listens
                while not stop.wait(BEAT):
                    store.set(f"beat/{self.rank}", repr(time.monotonic()))

        thread = threading.Thread(target=beat, name="funczero-pulse")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with contextlib.suppress(RuntimeError):
                store.delete_key(f"beat/{self.rank}")  # silence is no sign of death any more

    def _ask(self, fn: Any) -> Any:
        try:
            return fn()
        except RuntimeError as e:
            raise CheckpointError(f"checkpoint: rank {self.rank} cannot reach the world's store any more, so rank 0 is gone ({str(e).splitlines()[0]})") from None


