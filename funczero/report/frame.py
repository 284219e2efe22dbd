"""What `funczero watch` shows of a run: one frame, as lines of text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import numpy as np
from rich.text import Text

from funczero.planning.words import amount, duration
from funczero.report.axis import short
from funczero.report.kept import Kept
from funczero.report.numbers import RATE
from funczero.report.series import Series
from funczero.report.spark import blocks, place, plot
from funczero.report.tables import span
from funczero.script.progress import words

LABEL = 13  # characters before a number
VALUE = 12
QUIET = 20.0  # times an update's time after which a run is silent
TONE = {"finished": "green", "failed": "red", "stopped": "yellow", "silent": "yellow", "runs": "green"}


def state(kept: Kept) -> tuple[str, str]:
    """Whether the run still lives: a word, and a sentence."""
    end, age = kept.events.end, kept.age()
    if end is not None:
        return (end["how"] if end["how"] in TONE else "stopped"), kept.ended()
    takes = update_takes(kept)
    if kept.numbers.last < 0 and kept.numbers.evaluated < 0:
        return "runs", f"nothing is logged yet; begun {span(age)} ago"
    last = f"last line {span(age)} ago"
    if takes is not None and age > max(10.0, QUIET * takes):
        return "silent", f"silent: {last}, and an update took {duration(takes)}; it may have been killed"
    return "runs", f"under way, {last}"


def update_takes(kept: Kept) -> float | None:
    """Seconds of an update lately; None: not known."""
    rate, size = kept.rate(), kept.events.about.get("amount", 0.0)
    late = [y for y in rate.late if y > 0] if rate is not None else []
    return size / median(late) if late and size > 0 else None


def frame(kept: Kept, width: int, height: int) -> list[Text]:
    """A run in lines of text.

    Args:
      width: characters of a line.
      height: lines at most; the plot takes what the others leave, and at least 3.
    """
    word, sentence = state(kept)
    head = Text.assemble((kept.name, "bold"), "  ", (sentence, TONE[word]))
    numbers = kept.numbers
    if numbers.last < 0:
        return _fitted([head, Text("no update has been made yet"), *_story(kept)], width)
    lines = [head, _progress(kept, width), *_lines(kept, width), *_story(kept)]
    tall = max(3, min(12, height - len(lines) - 3))
    return _fitted([*lines[:2], *_plot(kept, width, tall), *lines[2:]], width)


def _fitted(lines: list[Text], width: int) -> list[Text]:
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _progress(kept: Kept, width: int) -> Text:
    last, steps, takes = kept.numbers.last, kept.events.about.get("steps", 0), update_takes(kept)
    if not steps:
        return Text(f"{last:,} updates; of how many is not recorded")
    share, wide = min(1.0, last / steps), max(10, min(40, width - 50))
    left = "" if takes is None or not kept.left() else f"   about {span(kept.left() * takes)} left"
    done = round(share * wide)
    return Text.assemble(("━" * done, "cyan"), ("─" * (wide - done), "dim"), f"  {last:,} of {steps:,} updates{left}")


def _plot(kept: Kept, width: int, tall: int) -> list[Text]:
    """The loss over updates, with skips above it and what is not finite below."""
    loss, numbers = kept.numbers.updates.get("loss"), kept.numbers
    if loss is None or not loss.count:
        return [Text("loss: no finite number", "yellow")]
    over, wide = (float(numbers.first), float(max(numbers.last, numbers.first + 1))), max(10, width - LABEL)
    x, y = loss.points()
    drawn = plot(x, y, over, wide, tall)
    shown = {0: short(loss.high), tall - 1: short(loss.low)}
    out = [_row("skipped", _marks(numbers.skips, over, wide, "▼"), "yellow")] if numbers.skips else []
    out += [Text.assemble((f"{shown.get(i, ''):>{LABEL - 2}} ", "dim"), "┤", (d, "cyan")) for i, d in enumerate(drawn)]
    out += [_row("not finite", _marks([x for x, _ in loss.odd], over, wide, "×"), "red")] if loss.odd else []
    ends = f"{numbers.first:,}", f"{numbers.last:,} updates"
    return [*out, Text(f"{'loss':<{LABEL}}{ends[0]}{ends[1]:>{max(1, wide - len(ends[0]))}}", "dim")]


def _row(label: str, text: str, style: str) -> Text:
    return Text.assemble((f"{label:>{LABEL - 2}} ", "dim"), " ", (text, style))


def _marks(at: list[int], over: tuple[float, float], width: int, mark: str) -> str:
    there = {place(x, over, width) for x in at if over[0] <= x <= over[1]}
    return "".join(mark if c in there else " " for c in range(width)).rstrip()


def _lines(kept: Kept, width: int) -> Iterator[Text]:
    """A line a name: its last number, and its curve."""
    numbers, own = kept.numbers, kept.numbers.updates
    over = float(numbers.first), float(max(numbers.last, numbers.first + 1))
    rate = next((n for n in own if n.endswith(RATE)), "")
    rows = [("loss", "loss", ""), ("norm", "grad_norm", ""), ("learning rate", "lr", ""), ("scale", "scale", "")]
    rows += [(f"{words(rate.removesuffix(RATE))}/s", rate, ""), ("sent", "bytes_sent", "bytes")]
    for label, name, kind in rows:
        series = own.get(name)
        if series is not None and series.last is not None and not (name == "scale" and series.low == series.high == 1):
            yield _line(label, series, kind, over, width)
    for name, series in list(numbers.evaluations.items())[:4]:
        if series.last is not None:
            at, value = series.last
            yield Text(f"{words(name)} {short(value, 5)} after update {at:,}")


def _line(label: str, series: Series, kind: str, over: tuple[float, float], width: int) -> Text:
    assert series.last is not None
    value = series.last[1]
    shown = amount(value) if kind == "bytes" and 0 <= value < 1e30 else short(value)
    room = min(60, width - LABEL - VALUE - 3)
    x, y = series.points()
    if label == "scale" and series.low > 0:  # it moves by powers of two
        y = np.log2(y)
    curve = blocks(x, y, over, room) if room > 4 and series.low < series.high else ""
    return Text.assemble((f"{label[:LABEL]:<{LABEL}}", "dim"), f"{shown:>{VALUE}}  ", (curve, "cyan"))


def _story(kept: Kept) -> Iterator[Text]:
    """Skips, checkpoints, resumes, and what is wrong with the files."""
    events, numbers = kept.events, kept.numbers
    if numbers.skipped:
        last = numbers.skips[-1] if numbers.skipped == len(numbers.skips) else -1
        known = events.skips.get(last)
        what = f"the last: {known}" if known else f"the last is update {last:,}" if last >= 0 else ""
        yield Text(f"{numbers.skipped:,} skipped; {what}", "yellow")
    if events.checkpoints:
        name = list(events.checkpoints)[-1]
        yield Text(f"last checkpoint: {name}, {span(max(0.0, time.time() - events.saved))} ago")
    if events.resumes:
        yield Text(f"resumed after update {', '.join(f'{n:,}' for n in events.resumes[-4:])}")
    if events.said:
        yield Text(f"said after update {events.said[-1][0]:,}: {events.said[-1][1].splitlines()[0]}", "dim")
    if not kept.recorded:
        yield Text("no run.jsonl: only its numbers are known", "yellow")
    for line in kept.troubles(grows=True)[:3]:
        yield Text(line, "red")
