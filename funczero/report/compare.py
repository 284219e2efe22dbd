"""The first update whose bits differ between two runs, by what both logged of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from funczero.report.lines import Lines

NAMES = ("loss", "grad_norm", "lr", "ok", "scale")  # of an update, exact in a log, and no measure of time or of bytes


class Difference(NamedTuple):
    """Where two logs part; printed, it is a sentence."""

    common: int  # updates that both logged, up to the first difference
    last: int  # the last of them that is the same in both; -1: none
    update: int  # the first that differs; -1: none
    values: dict[str, tuple[Any, Any]]  # what differs there
    gap: bool  # are there updates between these two that only one run logged, or none?
    ends: tuple[int, int]  # the last update of each, as far as they were read

    def __str__(self) -> str:
        if self.update < 0 and not self.common:
            return "no update is in both logs, so nothing can be said of their bits"
        if self.update < 0:
            longer = f"; the longer one goes on to update {max(self.ends):,}" if len(set(self.ends)) > 1 else ""
            return f"the same bits in all {self.common:,} updates that both logged{longer}"
        shown = "; ".join(f"{name} {_shown(a)} and {_shown(b)}" for name, (a, b) in self.values.items())
        late = " at the latest" if self.gap else ""
        same = f"{self.last:,} is the last that is the same" if self.last >= 0 else "none before it is in both"
        return f"update {self.update:,}{late} ({same}): {shown}"


def difference(a: Path, b: Path) -> Difference:
    """Compares two metrics files line by line, in no memory to speak of.

    What is compared are the loss, norm, rate, scale and verdict of every update, which a log holds exactly; parameters
    are not in it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     one, two = Path(folder, "1"), Path(folder, "2")
    ...     _ = one.write_text('{"step": 1, "loss": 0.5}\\n{"step": 2, "loss": 0.25}\\n')
    ...     _ = two.write_text('{"step": 1, "loss": 0.5}\\n{"step": 2, "loss": 0.125}\\n')
    ...     print(difference(one, two))
    update 2 (1 is the last that is the same): loss 0.25 and 0.125
    """
    left, right = _updates(a), _updates(b)
    x, y = next(left, None), next(right, None)
    common, last, ends, between = 0, -1, [-1, -1], False
    while x is not None and y is not None:
        ends = [x[0], y[0]]
        if x[0] != y[0]:
            between = True
            if x[0] < y[0]:
                x = next(left, None)
            else:
                y = next(right, None)
            continue
        common += 1
        odd = {n: (x[1].get(n), y[1].get(n)) for n in NAMES if _bits(x[1].get(n)) != _bits(y[1].get(n))}
        if odd:
            gap = between or (x[0] > last + 1 if last >= 0 else x[0] > 1)
            return Difference(common, last, x[0], odd, gap, (x[0], y[0]))
        last, between = x[0], False
        x, y = next(left, None), next(right, None)
    for i, (rest, head) in enumerate(((left, x), (right, y))):
        for now in (head, *rest) if head is not None else ():
            ends[i] = now[0]
    return Difference(common, last, -1, {}, False, (ends[0], ends[1]))


def _updates(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every update's line once, in order, as the curves show them."""
    before = -1
    for _, record in Lines(path).new():
        step = record.get("step")
        if type(step) is int and step > before and "loss" in record:
            before = step
            yield step, record


def _bits(x: Any) -> str:
    """Equal for equal bits: a float's repr is exact, and tells -0.0 from 0.0; one nan is another."""
    return repr(float(x)) if type(x) is float or type(x) is int and abs(x) < 2**53 else repr(x)


def _shown(x: Any) -> str:
    return "nothing" if x is None else repr(x)[:40]
