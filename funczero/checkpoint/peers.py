"""The ranks of a save or a restore: messages through the world's store, and the proof by which a dead rank is told
from a slow one. No collective is involved.
"""

from __future__ import annotations

import copy
import json
import time
import zlib
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from funczero.checkpoint import lines
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.lines import SPACE
from funczero.world import presence

INSIDE = 600.0  # seconds in which a rank that is inside a call must give its word
LOOK = 0.1  # seconds between two looks at a rank's pulse
MOST = 256 << 20  # bytes of a message


class Peers:
    """This rank among those that share a checkpointer; a world of one needs no other. Made when the world has been
    joined.
    """

    def __init__(self, alone: bool = False, silence: float = lines.SILENCE) -> None:
        """The n-th of every rank belong together; `alone`: a world of this process, whatever the other one is."""
        self.lines = lines.Lines(alone=True) if alone else lines.lines(silence)
        self.rank, self.size, self._line = self.lines.rank, self.lines.size, self.lines.front
        self._space = f"{SPACE}/{self._line.ask('add', f'{SPACE}/count/{self.rank}', 1)}"
        self.number = 0  # of this rank's last call; the same on all ranks
        self._mine: list[str] = []  # keys that this rank has published
        # a rank's last beat, since when it is the last, and when it was looked at
        self._seen: dict[int, tuple[bytes, float, float]] = {}
        self._looked = 0.0

    @property
    def current(self) -> bool:
        """Is this process still in the world in which they were made?"""
        return self.lines.world is (dist.group.WORLD if dist.is_initialized() else None)

    def aside(self) -> Peers:
        """The same, for another thread."""
        other = copy.copy(self)
        other._line, other._seen = self.lines.back, {}
        return other

    def begin(self) -> int:
        """The number of a new call."""
        self.number += 1
        self.lines.numbers[self._space] = self.number
        return self.number

    def enter(self, number: int, what: str) -> None:
        """This rank is inside a call: it may take its time now, to import or to read.

        Args:
          what: "save", "restore" or "names", as others wait for it.
        """
        self.put(f"{number}/in/{what}/{self.rank}", True)

    def over(self, number: int) -> None:
        """This rank needs nothing more of a call: whoever holds the store may go."""
        if self.rank:
            self._line.ask("set", f"{self._space}/over/{self.rank}", str(number))

    def put(self, key: str, value: Any) -> None:
        """Publish JSON."""
        self.put_bytes(key, zlib.compress(json.dumps(value).encode(), 1))

    def put_bytes(self, key: str, value: bytes) -> None:
        """Publish bytes."""
        self._mine.append(key)
        self._line.ask("set", f"{self._space}/{key}", value)

    def first(self, key: str) -> bool:
        """Is this rank the first of all that asks for a key?"""
        won: bool = self._line.ask("add", f"{self._space}/{key}", 1) == 1
        if won:
            self._mine.append(key)
        return won

    def forget(self, number: int) -> None:
        """Take back what this rank published for calls before `number`, which all ranks have left."""
        old = lambda key: key.split("/")[0].isdigit() and int(key.split("/")[0]) < number
        for key in [k for k in self._mine if old(k)]:
            self._line.ask("delete_key", f"{self._space}/{key}")
        self._mine[:] = [k for k in self._mine if not old(k)]

    def there(self, key: str) -> bool:
        """Has it been published?"""
        return self._line.ask("check", [f"{self._space}/{key}"])

    def get(self, key: str) -> Any:
        """What was published, as JSON."""
        try:
            unpack = zlib.decompressobj()
            text = unpack.decompress(self.get_bytes(key), MOST)
            if unpack.unconsumed_tail:
                raise ValueError(f"it has more than {MOST} bytes")
            return json.loads(text)
        except (zlib.error, ValueError, RecursionError) as e:
            raise CheckpointError(
                f"checkpoint: {key!r} in the world's store is no message of a rank ({type(e).__name__}: {str(e)[:80]})"
            ) from None

    def get_bytes(self, key: str) -> bytes:
        """What was published."""
        return self._line.ask("get", f"{self._space}/{key}")

    def wait(
        self, keys: Iterable[tuple[int, str]], what: str, join: float | None = None, raw: bool = False
    ) -> list[Any]:
        """What ranks publish, in order, as JSON or as bytes.

        Args:
          keys: (the rank that will publish it, key).
          what: for the message.
          join: seconds in which a rank must come at all; INSIDE, where it said by `enter` that it has; None: as long
            as it lives.

        Raises:
          CheckpointError: a rank is dead, or did not come.
        """
        out = []
        for rank, key in keys:
            start, pause, limit, came = time.monotonic(), 0.0005, join, join is None
            while not self.there(key):
                if (why := self._dead(rank, came=came)) and not self.there(key):  # what it said before counts
                    raise CheckpointError(f"{what}: {why}")
                if limit is not None and time.monotonic() - start > limit:
                    if not came and self.there(f"{key.partition('/')[0]}/in/{what}/{rank}"):
                        came, limit = True, max(limit, INSIDE)
                        continue
                    raise CheckpointError(
                        f"{what}: rank {rank} did not come within {limit:g} s, while rank {self.rank} waits; every rank"
                        " calls save and restore, at the same step"
                    )
                time.sleep(pause)
                pause = min(0.02, pause * 1.5)
            out.append(self.get_bytes(key) if raw else self.get(key))
        return out

    def _dead(self, rank: int, came: bool) -> str:
        """Why a rank will not answer any more; nothing where that is not known. Looks at most ten times a second.

        Args:
          came: is it inside the call? One that is not, and whose process is there, may be late.
        """
        now = time.monotonic()
        # this process was stopped, or did not wait: others' silence counts from now
        if now - self._looked > 2 * self.lines.beat:
            self._seen.clear()
        self._looked = now
        value, since, looked = self._seen.get(rank, (None, now, 0.0))
        if rank == self.rank or now - looked < LOOK:
            return ""
        said = lambda key: self._line.ask("get", key) if self._line.ask("check", [key]) else b""
        process, beat = said(f"{presence.KEY}/{rank}").decode(errors="replace"), said(f"{SPACE}/beat/{rank}")
        if presence.ended(process):
            return f"rank {rank} is gone: its process {presence.number(process)} has ended"
        if said(f"{SPACE}/left/{rank}"):
            return f"rank {rank} has come to the end of its program"
        since = since if beat == value else now
        self._seen[rank] = (beat, since, now)
        if now - since > self.lines.silence and (came or (beat and not self._near(process))):
            there = (
                f"its process {presence.number(process)} is there, but stopped or stuck"
                if self._near(process)
                else "its process was ended, or its machine is lost"
            )
            return f"rank {rank} has not been heard of for {now - since:.0f} s; {there}"
        return ""

    def _near(self, process: str) -> bool:
        """Is it a process whose end would be seen from here?"""
        return process.split()[:2] == presence.identity().split()[:2] != []
