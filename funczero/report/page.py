"""The page of a report: one file of HTML that asks nothing of anybody."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from funczero.report import tables
from funczero.report.chart import Chart, Curve, Marks, chart
from funczero.report.kept import Kept, Skip, named
from funczero.report.numbers import RATE
from funczero.report.series import Array, Series
from funczero.report.tables import said, swatch
from funczero.script.progress import words

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
OWN = ("loss", "lr", "grad_norm", "ok", "scale", "bytes_sent")  # an update's numbers that have a chart of their own


def page(runs: Sequence[Kept]) -> str:
    """The whole page."""
    charts = curves(runs)
    title = ", ".join(run.name for run in runs)
    parts = [
        f"<header><p>funczero report, {tables.now()}</p><h1>{said(title)}</h1></header>",
        f'<div class="runs">{"".join(tables.card(i, run) for i, run in enumerate(runs))}</div>',
        _troubles(runs),
        _section("Bits", tables.bits(runs)) if len(runs) > 1 else "",
        _section("Curves", _legend(runs) + f'<div class="charts">{"".join(c.html for c in charts)}</div>'),
        _section("Skipped updates", tables.skips(runs)),
        _section("Bytes of an update, sent by rank 0", "".join(tables.sending(i, run) for i, run in enumerate(runs))),
        _section("Memory of rank 0", f'<div class="two">{_each(tables.memory, runs)}</div>'),
        _section("Checkpoints", tables.checkpoints(runs)),
        _section("What happened", tables.story(runs)),
        _section("Chain", tables.chains(runs)),
        _section("Mesh, policy, environment", tables.facts(runs, [_place(run) for run in runs])),
        _section("Flags", tables.flags(runs)),
        "<footer>This page is one file, and opening it asks nothing of any address.</footer>",
    ]
    here = files("funczero.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    numbers = {"runs": [run.name for run in runs], "charts": [c.data for c in charts]}
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f'<title>{said(title)}</title><style>{style}</style>'
    )
    data = f'<script type="application/json" id="numbers">{inert(numbers)}</script>'
    body = "\n".join(part for part in parts if part)
    tail = f"{data}<script>{script}</script>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}\n{tail}</body></html>\n'


def inert(value: Any) -> str:
    r"""JSON that ends no element it stands in.

    >>> inert({"a": "</script>"})
    '{"a":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, separators=(",", ":"))
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text


def _section(title: str, body: str) -> str:
    return f"<section><h2>{said(title)}</h2>{body}</section>"


def _each(part: Any, runs: Sequence[Kept]) -> str:
    return "".join(f"<div>{part(i, run)}</div>" for i, run in enumerate(runs))


def _troubles(runs: Sequence[Kept]) -> str:
    lines = [f"{run.name}: {line}" for run in runs for line in run.troubles()]
    lines += [f"{run.name}: it has no run.jsonl, so only its numbers are known" for run in runs if not run.recorded]
    if not lines:
        return ""
    items = "".join(f"<li>{said(line)}</li>" for line in lines)
    return f'<div class="trouble"><b>What these folders do not tell, or tell wrongly</b><ul>{items}</ul></div>'


def _legend(runs: Sequence[Kept]) -> str:
    names = "".join(f'<span class="key">{swatch(i)}{said(run.name)}</span>' for i, run in enumerate(runs))
    kinds = {"skip": "skipped", "odd": "not finite", "resume": "resumed", "saved": "checkpoint"}
    keys = "".join(f'<span class="key"><i class="mark {kind}"></i>{what}</span>' for kind, what in kinds.items())
    return f'<div class="legend">{names}{keys}<span class="key">all over updates</span></div>'


def _place(run: Kept) -> dict[str, str]:
    """Where and in which dtypes a run computes, by name; nothing where it was not recorded."""
    about = run.events.about
    if not about:
        return {}
    mesh = " x ".join(f"{axis}={n}" for axis, n in about["mesh"].items()) or "one process"
    return {"script": about["script"], "mesh": mesh, "policy": about["policy"], **about["environment"]}


def curves(runs: Sequence[Kept]) -> list[Chart]:
    """All charts, in the order of the page."""
    last = max((max(run.numbers.last, run.numbers.evaluated) for run in runs), default=0)
    starts = [n for run in runs for n in (run.numbers.first, 0 if run.numbers.evaluations else -1) if n >= 0]
    span = min(starts, default=0), max(last, 1)
    marks = [_marks(run) for run in runs]
    plain = [m._replace(checkpoints=()) for m in marks]
    bare = [m._replace(skips=(), checkpoints=()) for m in marks]

    def of(name: str, title: str, note: str, whose: Any = plain, evaluated: bool = False, **how: Any) -> Chart:
        return chart(title, note, _curves(runs, name, evaluated), whose, span, dots=evaluated, **how)

    out = [of("loss", "Loss", "mean over an update's weight", marks, wide=True)]
    extra = _names(runs, False)
    out += [of(name, words(name), "by update", bare) for name in extra if name not in OWN and not name.endswith(RATE)]
    out += [of(name, words(name), "evaluation", bare, True) for name in _names(runs, True)]
    shown = {"lr": ("Learning rate", ""), "grad_norm": ("Norm", "of the mean gradient, before any clip")}
    out += [of(name, *about) for name, about in shown.items() if name in extra]
    if "scale" in extra:
        still = all(s.low == s.high == 1 for s in _all(runs, "scale"))
        scales = [] if still else _curves(runs, "scale", False)
        note = "1 in every update: no loss is scaled"
        out.append(chart("Loss scale", "of the loss", scales, plain, span, base=2, instead=note))
    out.append(chart("Time of an update", "seconds", _times(runs), bare, span, "seconds"))
    for name in extra:
        if name.endswith(RATE):
            out.append(of(name, f"{words(name.removesuffix(RATE))} a second", "without evaluations", bare))
    if "bytes_sent" in extra:
        out.append(of("bytes_sent", "Bytes sent", "by rank 0, an update", bare, kind="bytes"))
    return out


def _names(runs: Sequence[Kept], evaluated: bool) -> list[str]:
    sets = [run.numbers.evaluations if evaluated else run.numbers.updates for run in runs]
    return list(dict.fromkeys(name for own in sets for name in own))


def _all(runs: Sequence[Kept], name: str) -> list[Series]:
    found = (run.numbers.updates.get(name) for run in runs)
    return [series for series in found if series is not None]


def _curves(runs: Sequence[Kept], name: str, evaluated: bool) -> list[Curve]:
    out = []
    for i, run in enumerate(runs):
        series = (run.numbers.evaluations if evaluated else run.numbers.updates).get(name)
        if series is not None:
            out.append(Curve(i, *series.points(), series.odd, series.odds))
    return out


def _times(runs: Sequence[Kept]) -> list[Curve]:
    """Seconds of updates, by their rates; extremes stay extremes."""
    out = []
    for i, run in enumerate(runs):
        series = run.rate()
        size = run.events.about.get("amount", 0)
        if series is not None and size > 0:
            x, y = series.points()
            out.append(Curve(i, x[y > 0], _inverse(size, y[y > 0])))
    return out


def _inverse(size: float, y: Array) -> Array:
    found: Array = np.minimum(size / y, 1e300)
    return found


def _marks(run: Kept) -> Marks:
    skips = [run.events.skips.get(n) or Skip(n) for n in run.numbers.skips]
    return Marks(skips, run.events.resumes, list(run.events.checkpoints.items()))


def write(runs: Sequence[Path], out: Path) -> Sequence[Kept]:
    """Reads runs and writes their page, at once or not at all.

    Raises:
      ValueError: a folder is no run; the page cannot be written.
    """
    found = [Kept(path, name) for path, name in zip(runs, named(list(runs)), strict=True)]
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_text(page(found), encoding="utf-8", errors="backslashreplace")
        part.replace(out)
    except OSError as error:
        raise ValueError(f"--out={out} cannot be written ({error.strerror}); name another file") from None
    return found
