"""What every rank publishes of itself in the world's store, and when each was last seen to be alive.

Silence is no proof by itself: a rank that is stopped, or starved, gives no sign either.
"""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

from funczero.world.entries import Context, Entry


class Sign(NamedTuple):
    """What a rank published of itself."""

    launches: int = 0
    sum: int = 0  # checksum of the launches
    inside: bool = True  # a call
    beat: int = -1  # looks so far
    gone: str = ""  # why this rank launches nothing more: its last entry, as JSON
    last: str = ""  # its last launch, in words
    failed: int = 0  # calls that raised


class Signs:
    """The latest sign of every rank that was asked for, with the time at which its beat was new."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        """store: the namespace that the checks of one world share."""
        self.store, self.rank, self.size = store, rank, size
        self.seen: dict[int, tuple[Sign, float]] = {}

    def publish(self, sign: Sign) -> None:
        """This rank's own."""
        self.store.set(f"at/{self.rank}", json.dumps(sign))

    def read(self, rank: int) -> Sign:
        """What a rank published last."""
        key = f"at/{rank}"
        sign = Sign(*json.loads(self.store.get(key))) if self.store.check([key]) else Sign()
        before = self.seen.get(rank)
        unchanged = before is not None and before[0].beat == sign.beat
        self.seen[rank] = sign, before[1] if before is not None and unchanged else time.monotonic()
        return sign

    def silent(self, seconds: float) -> list[int]:
        """Other ranks whose beat is as old as that, and which did not say that they leave."""
        now = time.monotonic()
        return [r for r, (s, since) in self.seen.items() if r != self.rank and not s.gone and now - since > seconds]


def farewell(verb: str, why: str) -> str:
    """The last entry of a rank that launches nothing more, as a sign carries it."""
    return json.dumps(Entry(Context(""), verb, text=why))
