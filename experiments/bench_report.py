"""What `bench_step.py` has measured, as a table in a terminal, in Markdown, and as bars."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

HEAD = ["", "processes x threads", "ms", "min", "spread", "/ddp", "range", "cpu ms", "/ddp", "sent, B/param", "counted"]
HEAD += ["over, MiB", "start, s"]


class Row(NamedTuple):
    """One contender at one size, number of ranks and policy."""

    size: str
    ranks: int
    policy: str
    name: str
    parameters: int
    wall: list[float]  # milliseconds a step by round, of the slowest rank
    ratio: list[float]  # of them to DDP's within the round
    cpu: list[float]  # milliseconds a step by round, of all ranks
    cpu_ratio: list[float]
    sent: float  # bytes a step, of the rank that sends most
    counted: float | None = None  # as funczero says
    over: float | None = None  # bytes of the largest process over its imports
    start: float | None = None  # seconds

    @property
    def shape(self) -> str:
        """Processes and their threads."""
        alone = {"plain": f"1 x {self.ranks}", "plain-1t": "1 x 1", "jax": f"1 x {self.ranks}"}
        return alone.get(self.name, f"{self.ranks} x 1")


def row(heat: Any, name: str, costs: Any, base: Any, counted: float | None, parameters: int) -> Row:
    """costs, base: its visits and DDP's, [round][rank]."""
    wall, walls = ([max(v.wall for v in ranks) for ranks in by_round] for by_round in (costs, base))
    cpu, cpus = ([sum(v.cpu for v in ranks) for ranks in by_round] for by_round in (costs, base))
    over = lambda mine, theirs: [a / b for a, b in zip(mine, theirs, strict=True)]
    sent = median(max(v.sent for v in ranks) for ranks in costs)
    who = heat.size, heat.ranks, heat.policy, name, parameters
    return Row(*who, wall, over(wall, walls), cpu, over(cpu, cpus), sent, counted)


def pooled(rows: Iterable[Row]) -> list[Row]:
    """A row for each contender: DDP, which runs in every heat, has the rounds of all."""
    out: dict[str, Row] = {}
    for r in rows:
        one = out.get(r.name)
        more = {f: getattr(one, f) + getattr(r, f) for f in ("wall", "ratio", "cpu", "cpu_ratio")} if one else {}
        out[r.name] = r._replace(**more)
    return list(out.values())


def cells(r: Row) -> list[str]:
    """A row as texts."""
    low, _, high = quantiles(r.wall, n=4) if len(r.wall) > 1 else r.wall * 3
    middle, number = median(r.wall), lambda x, form: "" if x is None else f"{x:{form}}"
    return [
        r.name, r.shape, f"{middle:.2f}", f"{min(r.wall):.2f}", f"{(high - low) / middle:.0%}",
        f"{median(r.ratio):.2f}", f"{min(r.ratio):.2f}-{max(r.ratio):.2f}", f"{median(r.cpu):.2f}",
        f"{median(r.cpu_ratio):.2f}", f"{r.sent / r.parameters:.2f}",
        number(None if r.counted is None else r.counted / r.parameters, ".2f"),
        number(None if r.over is None else r.over / 2**20, ".0f"), number(r.start, ".1f"),
    ]  # fmt: skip


def title(r: Row) -> str:
    """Of a table."""
    return f"{r.size}: {r.parameters:,} parameters, {r.ranks} ranks, {r.policy}"


def text(rows: Sequence[Row], steps: int) -> str:
    """A heat for a terminal."""
    table = [HEAD, *map(cells, rows)]
    wide = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
    lines = [
        "  ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(t, wide, strict=True))) for t in table
    ]
    return "\n".join([f"\n{title(rows[0])}; {len(rows[0].wall)} rounds of {steps} steps", *lines])


def markdown(rows: Sequence[Row], missing: dict[str, str]) -> str:
    """All tables."""
    out = ["# Step times", "", "Medians over rounds; the ratio to DDP is taken within a round, and its range is given."]
    for name, group in groupby(rows, title):
        out += ["", f"## {name}", "", f"| {' | '.join(HEAD)} |", f"|---{'|--:' * (len(HEAD) - 1)}|"]
        out += [f"| {' | '.join(cells(r))} |" for r in group]
    out += ["", *(f"- not run: {name}: {why}" for name, why in missing.items())] if missing else []
    return "\n".join(out) + "\n"


def picture(rows: Sequence[Row], path: Path) -> None:
    """Bars of the ratios to DDP with their range, a panel for each table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = [(name, list(group)) for name, group in groupby(rows, title)]
    high = [0.3 * len(group) + 0.9 for _, group in tables]
    figure, panels = pyplot.subplots(
        len(tables), figsize=(8, sum(high)), squeeze=False, height_ratios=high, constrained_layout=True
    )
    for panel, (name, group) in zip(panels[:, 0], tables, strict=True):
        middle = [median(r.ratio) for r in group]
        ends = [[m - min(r.ratio), max(r.ratio) - m] for m, r in zip(middle, group, strict=True)]
        panel.barh(
            [r.name for r in group], middle, xerr=list(zip(*ends, strict=True)), color="#4878a8", ecolor="#888888"
        )
        panel.axvline(1, color="black", linewidth=0.8)
        panel.invert_yaxis()
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=8)
    panels[-1, 0].set_xlabel("time of a step, DDP = 1 (median and range over rounds)", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(folder: Path, rows: Sequence[Row], missing: dict[str, str]) -> None:
    """found.json, bench_step.md and, where matplotlib is installed, bench_step.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "found.json").write_text(json.dumps([r._asdict() for r in rows], indent=1))
    (folder / "bench_step.md").write_text(markdown(rows, missing))
    try:
        picture(rows, folder / "bench_step.png")
    except ImportError:
        print("bench_step: no picture, because matplotlib is not installed")
