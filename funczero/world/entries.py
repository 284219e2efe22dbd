"""One launch with the call that made it, and all launches of a process as a log."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

UPDATE = "step(state, batch)"
FORWARD = "engine(batch)"
BEGINS = "begins with"
GIVEN = "was given"
RETURNED = "returned"
TAIL = 1 << 10  # entries that a rank publishes on doubt
SUMS = 1 << 14  # checksums remembered: a neighbour's sign is up to some seconds old


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
        if self.verb in (BEGINS, GIVEN, RETURNED):
            return f"{self.verb} {self.axis}" + f" of {self.dtype}" * bool(self.dtype)
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
    """All launches of this process, over all meshes: what watch.py compares where no sum is reached any more.

    Law: `entries` are the last `TAIL`, as a rank publishes them on doubt; checksums reach further back, in memory that
    is there from the start.

    >>> log = Log(sums=4, tail=2)
    >>> for n in range(1, 6):
    ...     log.append(Entry(Context("a call"), "all_gather"), n)
    >>> log.count, [n for n, *_ in log.entries], [log.sum_at(n) is None for n in range(7)]
    (5, [4, 5], [True, True, True, False, False, False, True])
    """

    def __init__(self, sums: int = SUMS, tail: int = TAIL) -> None:
        self.count, self.sum = 0, 0
        self.entries: deque[tuple[int, int, Entry]] = deque(maxlen=tail)  # (number, checksum so far, entry)
        self._sums = array("q", bytes(8 * sums))  # after launch n, at n modulo their number

    def append(self, entry: Entry, number: int) -> None:
        """One more launch; `number` is its own checksum. By the main thread alone."""
        count, total = self.count + 1, hash((self.sum, number))
        self._sums[count % len(self._sums)] = total
        self.entries.append((count, total, entry))
        self.sum, self.count = total, count

    def sum_at(self, count: int) -> int | None:
        """The checksum after so many launches, None where it is not remembered; the main thread goes on meanwhile."""
        found = self._sums[count % len(self._sums)]
        # the oldest one is given up: the next launch may be taking its place now
        return found if max(0, self.count + 1 - len(self._sums)) < count <= self.count else None
