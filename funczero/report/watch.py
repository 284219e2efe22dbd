"""`funczero watch`: a run in the terminal while it grows."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live

from funczero.report.axis import short
from funczero.report.frame import frame, state, update_takes
from funczero.report.kept import Kept
from funczero.report.tables import span

TALL, WIDE = 40, 100  # of a frame that is printed where there is no terminal


def watch(folder: Path, once: bool = False, every: float | None = None) -> int:
    """Shows a run until it is finished or somebody presses ctrl-c; one that stopped, failed or is silent may go on.

    Args:
      once: one frame as plain lines.
      every: seconds between two looks; None: 1 on a terminal, 10 elsewhere, where a look is a line.

    Raises:
      ValueError: the folder is no run.
    """
    kept, console = Kept(folder, folder.resolve().name), Console(highlight=False, markup=False, emoji=False)
    if once:
        _print(console, kept)
        return 0
    try:
        if console.is_terminal:
            _live(console, kept, 1.0 if every is None else every)
        else:
            _lines(console, kept, 10.0 if every is None else every)
    except KeyboardInterrupt:
        pass
    return 0


def _over(kept: Kept) -> bool:
    end = kept.events.end
    return end is not None and end["how"] == "finished"


def _print(console: Console, kept: Kept) -> None:
    wide = console.width if console.is_terminal else WIDE
    for line in frame(kept, wide, TALL):
        console.print(line, soft_wrap=True)


def _live(console: Console, kept: Kept, every: float) -> None:
    draw = lambda: Group(*frame(kept, console.width, console.height - 1))
    with Live(draw(), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while not _over(kept):
            time.sleep(every)
            kept.read()
            live.update(draw(), refresh=True)


def _lines(console: Console, kept: Kept, every: float) -> None:
    """A line whenever there is news."""
    before = ""
    while True:
        now = line(kept)
        if now != before:
            console.print(now, soft_wrap=True)
        before = now
        if _over(kept):
            return
        time.sleep(every)
        kept.read()


def line(kept: Kept) -> str:
    """A run in one line, which is another one when there is news."""
    numbers, steps = kept.numbers, kept.events.about.get("steps", 0)
    parts = [f"update {max(numbers.last, 0):,}" + (f" of {steps:,}" if steps else "")]
    for label, name in (("loss", "loss"), ("norm", "grad_norm"), ("scale", "scale")):
        series = numbers.updates.get(name)
        if series is not None and series.last is not None:
            parts.append(f"{label} {short(series.last[1])}")
    takes = update_takes(kept)
    if takes is not None and kept.left():
        parts.append(f"about {span(kept.left() * takes)} left")
    parts += [f"{numbers.skipped:,} skipped"] * bool(numbers.skipped)
    word, sentence = state(kept)
    parts += [sentence.partition(",")[0]] if word in ("runs", "silent") else [sentence]
    return "  ".join(parts)
