"""What a person sees while a run is on: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

LINES = 20  # of a whole run, where there is no terminal


class Clock:
    """How many rows or tokens a second: a smooth rate over updates, without what is no training."""

    def __init__(self, amount: float) -> None:
        """amount: of an update."""
        self.amount, self.smooth, self._seen, self._then = amount, 0.0, 0, time.perf_counter()

    def update(self) -> float:
        """An update has ended: its own rate."""
        now = time.perf_counter()
        rate, self._then, self._seen = self.amount / max(now - self._then, 1e-9), now, self._seen + 1
        self.smooth = rate if self._seen < 3 else 0.9 * self.smooth + 0.1 * rate
        return rate

    def pause(self) -> None:
        """What happened since the last update was no training."""
        self._then = time.perf_counter()


class Shown:
    """The bar of rank 0, and lines above it; nothing on other ranks."""

    def __init__(self, speaks: bool, start: int, steps: int) -> None:
        """start: updates that are made already."""
        self._steps, self._first = steps, start + 1
        console = Console(quiet=not speaks, soft_wrap=True, highlight=False, markup=False)
        self._print = console.print
        whole = Column(no_wrap=True)  # on a narrow terminal the numbers take a second line, the rest stays
        left, right = MofNCompleteColumn(table_column=whole), TimeRemainingColumn(table_column=whole)
        text = TextColumn("{task.description}", table_column=Column())
        self.bar = Progress(
            BarColumn(20), left, right, text, console=console, disable=not (speaks and console.is_terminal)
        )
        self._task = self.bar.add_task("", total=steps, completed=start)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._print(text)

    def update(self, number: int, text: str) -> None:
        """An update has been made."""
        self.bar.update(self._task, completed=number, description=text)
        if self.bar.disable and (number == self._first or number % max(1, self._steps // LINES) == 0):
            self.say(f"step {number:5d}  {text}")

    def evaluated(self, number: int, values: Mapping[str, float]) -> None:
        """An evaluation after an update."""
        self.say(f"step {number:5d}  " + "  ".join(f"{words(name)} {x:.4f}" for name, x in values.items()))


def words(name: str) -> str:
    """A name of a log as a person reads it.

    >>> words("bits_per_byte")
    'bits per byte'
    """
    return name.replace("_", " ")


def line(values: Mapping[str, Any], own: Mapping[str, Any], unit: str, rate: float) -> str:
    """An update's numbers as a line of text.

    Args:
      values: loss, grad_norm, scale, bytes_sent, lr, ok.
      own: those of the experiment.
      rate: units a second.

    >>> line(dict(loss=0.5, grad_norm=2.0, scale=1.0, bytes_sent=1e6, lr=0.001, ok=True), {"accuracy": 0.25}, "rows", 7)
    'loss 0.500  accuracy 0.250  7 rows/s  norm 2.00  sent 1.00 MB/step  lr 1.0e-03'
    """
    parts = [f"loss {values['loss']:.3f}", *(f"{words(name)} {x:.3f}" for name, x in own.items())]
    parts += [f"{rate:,.0f} {unit}/s", f"norm {values['grad_norm']:.2f}"]
    parts += [f"scale {values['scale']:g}"] * (values["scale"] != 1)
    parts += [f"sent {values['bytes_sent'] / 1e6:.2f} MB/step", f"lr {values['lr']:.1e}"]
    return "  ".join(parts + ["skipped"] * (not values["ok"]))
