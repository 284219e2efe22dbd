"""One launch with the call that made it, and all launches of a process as a log."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

UPDATE = "step(state, batch)"
BEGINS = "begins with"


class Context(NamedTuple):
    """The call that launches, as all ranks must make it."""

    call: str
    step: int = 0
    key: int = 0
    scalars: tuple[Any, ...] = ()  # rates, counters and scales of the state, as far as they lie on the CPU
    spec: int = 0  # checksum of the chain and the leaves
    names: tuple[str, ...] = ()  # of scalars; not compared, nor is what follows
    rows: str = ""  # of the call's batch
    units: tuple[str, ...] = ()  # their names


class Entry(NamedTuple):
    """One launch with its call; or what a rank began with; or that it left, or raised."""

    context: Context
    verb: str
    axis: str = ""
    dtype: str = ""
    nbytes: int = 0
    units: tuple[int, ...] = ()
    text: str = ""  # not compared

    @property
    def compared(self) -> tuple[Any, ...]:
        """What must be the same on all ranks."""
        return (*self.context[:5], *self[1:6])

    def __str__(self) -> str:
        c = self.context
        if self.text:
            return f"{self.verb} {self.text}"
        if self.verb == BEGINS:
            return f"{BEGINS} {self.axis}" + f" of {self.dtype}" * bool(self.dtype)
        names = [c.units[u] or "the rest" if u < len(c.units) else str(u) for u in self.units[:3]]
        unit = (
            f" of {', '.join(map(repr, names))}{' ...' * (len(self.units) > 3)}"
            if any(c.units[u : u + 1] != ("",) for u in self.units)
            else ""
        )
        size = f" of {self.nbytes} bytes of {self.dtype}" if self.dtype else ""
        rows = f" with {c.rows} rows" if c.rows else ""
        return f"launched {self.verb}{unit} over {self.axis!r}{size} in {c.call}{rows} at step {c.step}"

    @classmethod
    def read(cls, values: Sequence[Any]) -> Entry:
        """An entry as JSON gives it back."""
        context: Any = [tuple(x) if isinstance(x, list) else x for x in values[0]]
        verb, axis, dtype, nbytes, units, text = values[1:]
        return cls(Context(*context), verb, axis, dtype, nbytes, tuple(units), text)


class Log:
    """All launches of this process, over all meshes: what watch.py compares where no sum is reached any more."""

    def __init__(self, kept: int) -> None:
        self.count, self.sum = 0, 0
        self.entries: deque[tuple[int, int, Entry]] = deque(maxlen=kept)  # (number, checksum so far, entry)

    def append(self, entry: Entry, number: int) -> None:
        """One more launch; `number` is its own checksum. By the main thread alone."""
        total = hash((self.sum, number))
        self.entries.append((self.count + 1, total, entry))
        self.sum, self.count = total, self.count + 1
