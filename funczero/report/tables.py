"""The page's parts that are no chart: cards, tables, stacked bars, each as HTML."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import combinations

from funczero.planning.words import amount, duration
from funczero.report.axis import short
from funczero.report.compare import difference
from funczero.report.kept import METRICS, Kept, Sending
from funczero.script.progress import words

PAIRED = 5  # runs of which every pair is compared; of more, each with the first
LISTED = 60  # rows of a table of events
KINDS = ("masters", "gathered", "gradients", "moments", "model state", "views", "wires", "activations")
TONES = {name: i for i, name in enumerate(KINDS)}  # colours of classes of memory
REST = 8  # the colour of all others


def said(text: object) -> str:
    """A text as HTML."""
    return escape(str(text), quote=True)


def who(run: int, kept: Kept) -> str:
    """A run by its mark and name."""
    return f'<span class="who">{swatch(run)} {said(kept.name)}</span>'


def swatch(run: int) -> str:
    """The mark of a run."""
    return f'<i class="swatch c{run if run == REST else run % 8}"></i>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), mono: bool = False) -> str:
    """A table of cells that are HTML.

    Args:
      numbers: columns that stand right.
    """
    kind = lambda i: "n" if i in numbers else "mono" if mono else ""
    cells = lambda row, tag: "".join(f'<{tag} class="{kind(i)}">{x}</{tag}>' for i, x in enumerate(row))
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells(head, "th")}</tr>{body}</table></div>'


def when(seconds: float) -> str:
    """A time of the calendar.

    >>> when(0)
    '1970-01-01 00:00:00 UTC'
    """
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def span(seconds: float) -> str:
    """A long time in words.

    >>> span(59.4), span(3700), span(200000)
    ('59 s', '1 h 1 min', '2 d 7 h')
    """
    n = round(seconds)
    if n < 120:
        return f"{n} s"
    if n < 3600:
        return f"{n // 60} min"
    return f"{n // 3600} h {n % 3600 // 60} min" if n < 86400 else f"{n // 86400} d {n % 86400 // 3600} h"


def status(kept: Kept) -> tuple[str, str]:
    """How a run ended, or that it did not: a class of the page, and words."""
    end = kept.events.end
    if end is not None:
        how = end["how"] if end["how"] in ("finished", "stopped", "failed") else "open"
        return how, kept.ended()
    if kept.recorded:
        return "open", f"no end is written: it runs, or was killed; its last number is {span(kept.age())} old"
    return "open", f"how it ended is not known; its last number is {span(kept.age())} old"


def card(run: int, kept: Kept) -> str:
    """A run in short."""
    numbers, about = kept.numbers, kept.events.about
    steps = about.get("steps", 0)
    how, words_ = status(kept)
    share = min(1.0, numbers.last / steps) if steps and numbers.last > 0 else 0.0
    of = f" <small>of {steps:,}</small>" if steps else ""
    facts = [("updates", f"{max(numbers.last, 0):,}{of}")]
    loss = numbers.updates.get("loss")
    if loss is not None and loss.last is not None:
        facts.append(("last loss", said(short(loss.last[1], 5))))
    for name, series in list(numbers.evaluations.items())[:2]:
        if series.last is not None:
            facts.append((f"last {words(name)}", said(short(series.last[1], 5))))
    rate, seconds = kept.rate(), kept.seconds()
    if rate is not None and rate.inverse:
        unit = said(about.get("unit", "units"))
        facts.append((f"{unit} a second, on average", said(f"{rate.count / rate.inverse:,.0f}")))
    if seconds is not None:
        facts.append(("an update takes", said(duration(seconds))))
    sent = numbers.updates.get("bytes_sent")
    if sent is not None and sent.last is not None:
        facts.append(("sent by rank 0", f"{said(amount(sent.last[1]))} <small>an update</small>"))
    facts.append(("skipped", f"{numbers.skipped:,}"))
    resumes = kept.events.resumes
    often = f"{len(resumes)} times, last after update {resumes[-1]:,}" if len(resumes) > 1 else ""
    facts.append(("resumed", often or (f"after update {resumes[0]:,}" if resumes else "never")))
    cells = "".join(f"<div><dt>{said(name)}</dt><dd>{value}</dd></div>" for name, value in facts)
    bar = f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'
    state = f'<div class="status"><b class="{how}">{said(words_)}</b></div>'
    return f'<article class="run c{run % 8}"><h2>{said(kept.name)}</h2>{state}{bar}<dl>{cells}</dl></article>'


def bits(runs: Sequence[Kept]) -> str:
    """For pairs of runs the first update whose bits differ."""
    few = len(runs) <= PAIRED
    pairs = list(combinations(range(len(runs)), 2)) if few else [(0, i) for i in range(1, len(runs))]
    rows = []
    for i, j in pairs:
        found = difference(runs[i].path / METRICS, runs[j].path / METRICS)
        names = [who(k, runs[k]) for k in (i, j)]
        rows.append([*names, said(found), said(", ".join(_unlike(runs[i], runs[j])) or "none")])
    about = (
        "Compared are loss, norm, rate, scale and verdict of every update, which the logs hold to the last bit."
        " Parameters are not in them: <code>funczero diff</code> compares checkpoints."
    )
    more = "" if few else f" Of {len(runs)} runs each is compared with the first."
    head = ("run", "and", "first update whose bits differ", "flags that differ")
    return f'<p class="soft">{about}{more}</p>{table(head, rows)}'


def _unlike(a: Kept, b: Kept) -> list[str]:
    """Flags of which two runs say different things, but for their folders."""
    one, two = (run.events.about.get("flags", {}) for run in (a, b))
    if not one or not two:
        return ["not recorded"]
    odd = [n for n in dict.fromkeys((*one, *two)) if n != "out" and one.get(n, ("",))[0] != two.get(n, ("",))[0]]
    value = lambda flags, n: flags[n][0] if n in flags else "no such flag"
    return [f"{n}: {value(one, n)} and {value(two, n)}" for n in odd[:12]] + ["and more"] * (len(odd) > 12)


def skips(runs: Sequence[Kept]) -> str:
    """Every update that was not applied, with leaf and rank where the step looked for them."""
    rows, more = [], 0
    for i, run in enumerate(runs):
        known = run.events.skips
        for update in run.numbers.skips[:LISTED]:
            skip = known.get(update)
            leaf = said(skip.leaf) if skip and skip.leaf else "not looked for"
            rank = str(skip.rank) if skip and skip.rank >= 0 else ""
            why = skip.words if skip and skip.words else "the run did not say why"
            if skip and skip.searching:
                why += "; the loss scale is lowered"
            rows.append([who(i, run), f"{update:,}", leaf, rank, said(why)])
        more += max(0, run.numbers.skipped - LISTED)
    if not rows:
        return '<p class="soft">No update was skipped.</p>'
    rest = f'<p class="soft">and {more:,} more</p>' if more else ""
    hint = (
        '<p class="soft">The leaf of a skipped update is looked for at the first skip and then ever more rarely, and'
        ' not while a dynamic loss scale is on its way down. With <code>--debug</code> it is named every time.</p>'
        if any(row[2] == "not looked for" for row in rows)
        else ""
    )
    return table(("run", "update", "first leaf that is not finite", "rank", "why"), rows, (1, 3)) + rest + hint


def sending(run: int, kept: Kept) -> str:
    """Bytes of an update by axis, verb and form: planned and counted."""
    title = f"<h3>{swatch(run)}{said(kept.name)}</h3>"
    counted = kept.events.sent[-1][1] if kept.events.sent else {}
    planned: Sending | None = kept.plan.get("sent")
    if not kept.recorded:
        return f'{title}<p class="soft">Not counted by axis: the run was not recorded.</p>'
    notes = [] if planned is not None else [f"not planned: {kept.plan['why']}"]
    first = kept.events.sent[-1][0] if kept.events.sent else 0
    if len(kept.events.sent) > 1:
        others = ", ".join(f"{n:,}" for n, _ in kept.events.sent[:-1][:6])
        notes.append(
            f"the count is that of update {first:,} and later ones; others before it began at updates {others}"
        )
    if kept.events.about["flags"].get("debug", ("", False))[0] == "true":
        notes.append("the search for leaves by --debug sends a little, and is not planned")
    edges = {axis: edge for axis, edge in kept.events.about["edges"].items() if edge}
    notes += [f"what travels over {axis!r} is packed: {edge}" for axis, edge in edges.items()]
    keys = sorted({*counted, *(planned or {})})
    if not keys:
        return f'{title}<p class="soft">Nothing is sent. {said("; ".join(notes))}</p>'
    rows = []
    for key in keys:
        rows.append([*(said(x) for x in key), _bytes(planned, key), _bytes(counted, key), _gap(planned, counted, key)])
    total = lambda what: "" if what is None else f"{sum(what.values()):,}"
    rows.append(["<b>all</b>", "", "", f"<b>{total(planned)}</b>", f"<b>{total(counted)}</b>", ""])
    head = ("axis", "what", "as", "planned", "counted", "counted - planned")
    below = "".join(f'<p class="soft">{said(note)}</p>' for note in notes)
    return title + table(head, rows, (3, 4, 5)) + below


def _bytes(of: Mapping[tuple[str, str, str], int] | None, key: tuple[str, str, str]) -> str:
    return "not planned" if of is None else f"{of[key]:,}" if key in of else "0"


def _gap(planned: Sending | None, counted: Sending, key: tuple[str, str, str]) -> str:
    if planned is None:
        return ""
    gap = counted.get(key, 0) - planned.get(key, 0)
    return f"{gap:+,}" if gap else "0"


def memory(run: int, kept: Kept) -> str:
    """Bytes of rank 0 by class: planned at the peak, and counted at rest."""
    title, events = f"<h3>{swatch(run)}{said(kept.name)}</h3>", kept.events
    rest = _stack("counted at rest", events.state) if events.state else '<p class="soft">At rest: not recorded.</p>'
    if "why" in kept.plan:
        return f'{title}{rest}<p class="soft">At the peak: not planned ({said(kept.plan["why"])}).</p>'
    held = {name.replace("_", " "): n for name, n in kept.plan["memory"].items() if n and name != "peak"}
    peak = _stack("planned at the peak of an update", kept.plan["at_peak"])
    rows = [[said(name), said(amount(n)), f"{n:,}"] for name, n in held.items()]
    rows.append(["<b>peak</b>", said(amount(kept.plan["memory"].get("peak", 0))), ""])
    notes = "".join(f'<p class="soft">{said(note)}</p>' for note in kept.plan["notes"])
    each = table(("class, the most it takes", "planned", "bytes"), rows, (1, 2))
    return f"{title}{peak}{rest}<details><summary>by class</summary>{each}</details>{notes}"


def _stack(what: str, by: Mapping[str, int]) -> str:
    """Amounts as parts of one bar, the largest first."""
    total = sum(by.values())
    parts = sorted(((name, n) for name, n in by.items() if n), key=lambda kv: -kv[1])
    bar = "".join(
        f'<i class="c{TONES.get(n, REST)}" style="flex:{x}" title="{said(n)} {amount(x)}"></i>' for n, x in parts
    )
    names = "".join(
        f'<span>{swatch(TONES.get(n, REST))} {said(n)}<span class="soft">{said(amount(x))}</span></span>'
        for n, x in parts
    )
    head = f'<div class="amounts">{said(what)}: {said(amount(total))}</div>'
    return f'{head}<div class="stack">{bar}</div><div class="parts">{names}</div>'


def checkpoints(runs: Sequence[Kept]) -> str:
    """Checkpoints that were made, and which of them are still there."""
    rows = []
    for i, run in enumerate(runs):
        made, there = run.events.checkpoints, run.on_disk
        for name in list(dict.fromkeys((*made, *there)))[-LISTED:]:
            update = f"{made[name]:,}" if name in made else "not recorded"
            kept = "kept" if name in there else "not in the folder any more"
            rows.append([who(i, run), said(name), update, kept])
    return table(("run", "checkpoint", "of update", ""), rows, (2,)) if rows else '<p class="soft">None was made.</p>'


def story(runs: Sequence[Kept]) -> str:
    """Starts, what was said, and the end, in order."""
    rows = []
    for i, run in enumerate(runs):
        own, name, events = [], who(i, run), run.events
        for begin in events.begins:
            begun = f"resumed from checkpoint {begin['before']}" if begin["before"] else "started"
            own.append((begin["update"], when(begin["time"]), begun, 0))
        own += [(update, "", text, 1) for update, text in events.said]
        if events.end is not None:
            own.append((events.end["update"], when(events.end["time"]), status(run)[1], 2))
        own.sort(key=lambda row: (row[0], row[3]))
        cut = own if len(own) <= LISTED else [*own[: LISTED // 2], *own[-LISTED // 2 :]]
        rows += [[name, f"{n:,}", said(at), f"<span>{said(text)}</span>"] for n, at, text, _ in cut]
        if cut is not own:
            rows.append([name, "", "", f"and {len(own) - len(cut):,} lines between them that are not shown"])
    return table(("run", "after update", "", "what"), rows, (1,)) if rows else '<p class="soft">Not recorded.</p>'


def facts(runs: Sequence[Kept], columns: Sequence[Mapping[str, str]]) -> str:
    """A table of what runs say of themselves by name, a column a run; rows that differ first."""
    names = list(dict.fromkeys(name for own in columns for name in own))
    if not names:
        return '<p class="soft">Not recorded.</p>'
    value = lambda own, name: own.get(name, "-")
    names.sort(key=lambda name: len({value(own, name) for own in columns}) == 1)
    rows = [[said(name), *(said(value(own, name)) for own in columns)] for name in names]
    return table(("", *(who(i, run) for i, run in enumerate(runs))), rows)


def flags(runs: Sequence[Kept]) -> str:
    """The flags, a column a run: first those that differ, then those that were given, then the defaults."""
    columns = [run.events.about.get("flags", {}) for run in runs]
    names = list(dict.fromkeys(name for own in columns for name in own))
    if not names:
        return '<p class="soft">Not recorded.</p>'
    differs = lambda name: len({own.get(name, ("-", False))[0] for own in columns}) > 1
    given = lambda name: any(own.get(name, ("", False))[1] for own in columns)
    names.sort(key=lambda name: (not differs(name), not given(name)))
    cell = lambda own, name: _flag(*own[name]) if name in own else "-"
    head = ("", *(who(i, run) for i, run in enumerate(runs)))
    first, rest = [n for n in names if differs(n) or given(n)], [n for n in names if not differs(n) and not given(n)]
    rows = lambda some: [[f"--{said(name)}", *(cell(own, name) for own in columns)] for name in some]
    shown = table(head, rows(first)) if first else '<p class="soft">All are at their defaults.</p>'
    return f"{shown}<details><summary>{len(rest)} at their defaults</summary>{table(head, rows(rest))}</details>"


def _flag(value: str, given: bool) -> str:
    return f"<b>{said(value)}</b>" if given else said(value) or "(empty)"


def chains(runs: Sequence[Kept]) -> str:
    """The printed chain of every run, alike ones once."""
    by_text: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        by_text.setdefault(run.events.about.get("chain", ""), []).append(i)
    out = []
    for text, who in by_text.items():
        names = ", ".join(f"{swatch(i)}{said(runs[i].name)}" for i in who)
        body = f"<pre>{said(text)}</pre>" if text else '<p class="soft">Not recorded.</p>'
        abouts = [runs[i].events.about for i in who]
        more = "; ".join(
            dict.fromkeys(f"{a['parameters']:,} parameters, {a['about']}".removesuffix(", ") for a in abouts if a)
        )
        out.append(f"<h3>{names}</h3>{f'<p class=soft>{said(more)}</p>' if more else ''}{body}")
    return "".join(out)


def now() -> str:
    """This moment."""
    return when(time.time())
