"""One chart: curves as SVG that is stretched to its place, words and marks as HTML, so that both stay sharp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

from funczero.planning.words import amount, duration
from funczero.report.axis import Axis, axis_of, logarithmic, short
from funczero.report.kept import Skip
from funczero.report.series import Array

SIDE = 1000  # units of the stretched picture
PLACES = 120  # marks of one kind that a chart has room for
COLOURS = 8  # of runs; further ones are dashed

WORDS: dict[str, Callable[[float], str]] = {"bytes": amount, "seconds": duration, "number": lambda x: short(x, 5)}


class Curve(NamedTuple):
    """One run's line in a chart."""

    run: int
    x: Array
    y: Array
    odd: Sequence[tuple[int, float]] = ()  # what is not finite
    odds: int = 0  # how many of them there are in all


class Marks(NamedTuple):
    """What happened to a run, by update."""

    skips: Sequence[Skip] = ()
    resumes: Sequence[int] = ()
    checkpoints: Sequence[tuple[str, int]] = ()  # name, update


class Chart(NamedTuple):
    """A chart as HTML, and what its page knows of it under a pointer."""

    html: str
    data: dict[str, Any]


def chart(
    title: str,
    note: str,
    curves: Sequence[Curve],
    marks: Sequence[Marks],
    span: tuple[int, int],
    kind: str = "number",
    base: int | None = None,
    dots: bool = False,
    wide: bool = False,
    instead: str = "",
) -> Chart:
    """Curves over updates.

    Args:
      title, note: what is shown, and its unit.
      marks: by run.
      span: the first and the last update that is shown.
      kind: number, bytes or seconds.
      base: of a logarithmic axis; 0: linear; None: whichever shows more.
      dots: few numbers far apart, each of which is a dot.
      instead: said where there is nothing to draw; by default why.
    """
    over = Axis(float(span[0]), float(max(span[1], span[0] + 1)))
    head = f'<figcaption><span class="what">{escape(title)}</span><span class="unit">{escape(note)}</span>'
    shape = f'<figure class="chart{" wide" if wide else ""}">'
    drawn = [c for c in curves if len(c.x)]
    if not drawn:
        odd = ", ".join(sorted({short(y) for c in curves for _, y in c.odd}))
        why = f"no finite number: all are {odd}" if odd else "no number"
        return Chart(f'{shape}{head}</figcaption><p class="none">{escape(instead or why)}</p></figure>', {})
    low, high = min(float(c.y.min()) for c in drawn), max(float(c.y.max()) for c in drawn)
    base = (10 if logarithmic(low, high) else 0) if base is None else base if low > 0 else 0
    up = axis_of(low, high, base)
    scale = f'<span class="unit">log axis, base {base}</span>' if base else ""
    if unmarked := sum(c.odds - len(c.odd) for c in curves if c.odds):
        scale += f'<span class="unit">{unmarked:,} more that are not finite are not marked</span>'
    ys = "".join(_tick("top", 1 - up.at(y), _words(up, y, kind)) for y in up.ticks())
    xs = "".join(_tick("left", over.at(x), f"{x:,.0f}") for x in over.ticks(4) if x == int(x))
    grid = "".join(f'<path class="grid" d="M0 {_down(up, y)}H{SIDE}"/>' for y in up.ticks())
    lines = "".join(_line(c, over, up, dots) for c in drawn)
    picture = f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">{grid}{lines}</svg>'
    inside = picture + _marks(curves, marks, over) + (_dots(drawn, over, up) if dots else "")
    said = escape(f"{title}: from {short(low)} to {short(high)}, updates {span[0]:,} to {span[1]:,}", quote=True)
    area = f'<div class="area" role="img" aria-label="{said}">{inside}<div class="cross"></div></div>'
    plot = f'<div class="plot"><div class="ys">{ys}</div>{area}<div class="xs">{xs}</div></div>'
    data = {"x": [over.low, over.high], "kind": kind, "lines": [_data(c) for c in curves]}
    return Chart(f'{shape}{head}{scale}</figcaption>{plot}<div class="tip"></div></figure>', data)


def _words(up: Axis, y: float, kind: str) -> str:
    return up.label(y) if kind == "number" else WORDS[kind](y)


def _tick(side: str, at: float, words: str) -> str:
    return f'<span style="{side}:{100 * at:.2f}%">{escape(words)}</span>'


def _down(up: Axis, y: float) -> str:
    return f"{SIDE * (1 - up.at(y)):.1f}"


def _line(c: Curve, over: Axis, up: Axis, dots: bool) -> str:
    """A path that breaks where a number between two is not finite."""
    parts, gaps, at = [], [x for x, _ in c.odd], 0
    for i, (x, y) in enumerate(zip(c.x.tolist(), c.y.tolist(), strict=True)):
        begins = i == 0
        while at < len(gaps) and gaps[at] < x:
            begins, at = True, at + 1
        parts.append(f"{'M' if begins else 'L'}{SIDE * over.at(x):.1f} {_down(up, y)}")
    single = " h0.1" if len(parts) == 1 else ""  # a point is a line of no length, with round ends
    dash = " dashed" if c.run >= COLOURS else ""
    return f'<path class="line c{c.run % COLOURS}{dash}{" thin" if dots else ""}" d="{"".join(parts)}{single}"/>'


def _dots(curves: Sequence[Curve], over: Axis, up: Axis) -> str:
    out = []
    for c in curves:
        for x, y in list(zip(c.x.tolist(), c.y.tolist(), strict=True))[-PLACES:]:
            place = f"left:{100 * over.at(x):.2f}%;top:{100 * (1 - up.at(y)):.2f}%"
            out.append(f'<i class="dot c{c.run % COLOURS}" style="{place}"></i>')
    return "".join(out)


def _marks(curves: Sequence[Curve], marks: Sequence[Marks], over: Axis) -> str:
    out = []
    for run, own in enumerate(marks):
        inside = lambda x: over.low <= x <= over.high
        for x in own.resumes:
            if inside(x):
                out.append(_mark("resume", run, over.at(x), f"resumed after update {x:,}"))
        skips = [(skip.update, str(skip)) for skip in own.skips if inside(skip.update)]
        out += _gathered("skip", run, skips, over)
        saved = [(n, f"checkpoint {name}") for name, n in own.checkpoints if inside(n)]
        out += _gathered("saved", run, saved, over)
    for c in curves:
        odd = [(x, f"update {x:,}: {short(y)}") for x, y in c.odd if over.low <= x <= over.high]
        out += _gathered("odd", c.run, odd, over)
    return "".join(out)


def _gathered(kind: str, run: int, found: Sequence[tuple[int, str]], over: Axis) -> list[str]:
    """A mark each; of those that would lie on one another one, which says what it stands for."""
    by_place: dict[int, list[tuple[int, str]]] = {}
    for x, words in found:
        by_place.setdefault(math.floor(over.at(x) * PLACES), []).append((x, words))
    out = []
    for group in by_place.values():
        words = "\n".join(text for _, text in group[:6]) + f"\nand {len(group) - 6} more" * (len(group) > 6)
        out.append(_mark(kind, run, over.at(group[0][0]), words))
    return out


def _mark(kind: str, run: int, at: float, words: str) -> str:
    title = escape(words, quote=True)
    return f'<i class="mark {kind} c{run % COLOURS}" style="left:{100 * at:.2f}%" title="{title}"></i>'


def _data(c: Curve) -> dict[str, Any]:
    """What a pointer may ask for; numbers in seven digits."""
    odd = [[x, short(y)] for x, y in c.odd]
    ys = [float(f"{y:.7g}") for y in c.y.tolist()]
    return {"run": c.run, "x": [int(x) for x in c.x.tolist()], "y": ys, "odd": odd}
