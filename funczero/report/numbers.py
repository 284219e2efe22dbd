"""metrics.jsonl as curves: the numbers of updates and of evaluations, by name."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from funczero.report.lines import Lines
from funczero.report.series import Series
from funczero.world.plain import plain

CHUNK = 1 << 14  # lines that are gathered before they are added
NAMES, LENGTH = 100, 80  # curves of a run, and characters of a name
KINDS = {bool, int, float}
MOST = 2**53  # updates
RATE = "_per_second"  # how the name of a rate ends
SKIPS = 1 << 12  # whose places are kept

Rows = defaultdict[tuple[Any, ...], list[tuple[Any, ...]]]  # (of updates?, *names) -> the numbers of lines


class Numbers:
    """The numbers of a run, read as its file grows."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self._lines = Lines(path)
        self._forget()

    def _forget(self) -> None:
        self.updates: dict[str, Series] = {}  # by name: those of every update
        self.evaluations: dict[str, Series] = {}
        self.made, self.first, self.last = 0, -1, -1  # updates that have a line; the first and the last of them
        self.evaluated = -1
        self.skips: list[int] = []
        self.skipped = 0
        self._left_out = set[str]()

    def read(self) -> bool:
        """Reads what is new; did the file begin anew?"""
        anew = self._lines.began_anew()
        if anew:
            self._forget()
        rows: Rows = defaultdict(list)
        for count, (number, record) in enumerate(self._lines.new(), 1):
            self._line(number, record, rows)
            if count % CHUNK == 0:
                self._add(rows)
        self._add(rows)
        return anew

    def troubles(self, grows: bool = False) -> list[str]:
        """What was wrong with the file, line by line.

        Args:
          grows: a last line that is not whole may still become so.
        """
        name = self._lines.path.name
        half = f"{name}: its last line is half-written, and was passed over"
        many = f"{name}: more than {NAMES} names; {len(self._left_out)} more are left out"
        out = self._lines.told() + [half] * (self._lines.half and not grows) + [many] * bool(self._left_out)
        more = self.skipped - len(self.skips)
        return out + [f"{name}: of {self.skipped:,} skips the last {more:,} are marked nowhere"] * (more > 0)

    def _line(self, number: int, record: Mapping[str, Any], rows: Rows) -> None:
        step, update = record.get("step"), "loss" in record
        if type(step) is not int or not 0 <= step <= MOST:
            self._lines.wrong(number, "no number of updates called step")
            return
        before = self.last if update else self.evaluated
        if step <= before:
            again = f"update {step} after update {before}; what is told twice is passed over"
            self._lines.wrong(number, again)
            return
        if update:
            self.made, self.last, self.first = self.made + 1, step, step if self.first < 0 else self.first
            if record.get("ok") is False:
                self.skipped += 1
                self.skips += [step] * (len(self.skips) < SKIPS)
        else:
            self.evaluated = step
        if not KINDS.issuperset(map(type, record.values())):
            record = self._of_numbers(number, record)
        rows[update, *record].append(tuple(record.values()))

    def _of_numbers(self, number: int, record: Mapping[str, Any]) -> dict[str, Any]:
        """A line without what is no number, which is told."""
        for name, x in record.items():
            if type(x) not in KINDS:
                self._lines.wrong(number, f"{plain(name)[:LENGTH]!r} is {plain(repr(x))[:40]}, no number")
        return {name: x for name, x in record.items() if type(x) in KINDS}

    def _add(self, rows: Rows) -> None:
        """Lines of the same names at a time, then every name's numbers in the order of their updates."""
        found: dict[tuple[bool, str], list[Any]] = defaultdict(list)
        for (update, *names), values in rows.items():
            try:
                table = np.array(values, np.float64)
            except OverflowError:  # an integer of hundreds of digits
                table = np.array([[number_in(x) for x in row] for row in values], np.float64)
            at = table[:, names.index("step")]
            for name, column in zip(names, table.T, strict=True):
                if name != "step":
                    found[update, plain(name)[:LENGTH]].append((at, column))
        rows.clear()
        for (update, name), parts in found.items():
            among = self.updates if update else self.evaluations
            if name not in among and len(self.updates) + len(self.evaluations) >= NAMES:
                self._left_out |= {name} if len(self._left_out) < 10 * NAMES else set()
                continue
            x, y = (np.concatenate(column) for column in zip(*parts, strict=True))
            order = np.argsort(x, kind="stable")
            among.setdefault(name, Series()).add(x[order], y[order])


def number_in(x: float) -> float:
    """A number of a log as a float.

    >>> number_in(True), number_in(3), number_in(-(10**400))
    (1.0, 3.0, -inf)
    """
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf
