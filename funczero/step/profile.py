"""What a step spends its time on: a trace whose names are the printed chain's, and a table of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import profile as profiler

from funczero.core.spans import MARK
from funczero.layout.processes import world_rank, world_size
from funczero.world.entries import FORWARD, UPDATE

WAIT = "wait"
LISTED = {UPDATE: "the rest", FORWARD: "forward"}  # what is looked at: an engine runs its forward before its step
BACKENDS = re.compile(r"(gloo|nccl|mpi|ucc|xccl):\w+")


class Stretch(NamedTuple):
    """A named part of a trace, in microseconds."""

    name: str
    start: float
    end: float

    def within(self, others: Sequence[Stretch]) -> float:
        """Microseconds of it that lie in these, of which no two meet."""
        return sum(max(0.0, min(self.end, o.end) - max(self.start, o.start)) for o in others)


class Travel(NamedTuple):
    """What the collectives of one name took."""

    launches: int
    under_way: float  # microseconds in which the backend worked on them
    waited: float  # of these, the microseconds in which this rank did nothing but wait


class Profile:
    """What was seen; printed, it is a table. Empty until the `with` ends."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self.updates, self.total = 0, 0.0  # calls of steps, and microseconds in them
        self.own: dict[str, float] = {}  # microseconds of a name, less those of names inside it
        self.travels: dict[str, Travel] = {}
        self.paths: tuple[Path, ...] = ()

    def shares(self) -> dict[str, float]:
        """By name, of 1: what the steps' time went to. Blocks count under their list, waits under `wait`."""
        return {n: x / self.total for n, x in self.own.items()} if self.total else {}

    def hidden(self) -> dict[str, float]:
        """By collective and axis, of 1: how much of it ran while this rank computed; none that no backend recorded."""
        return {n: 1 - t.waited / t.under_way for n, t in self.travels.items() if t.under_way}

    def __str__(self) -> str:
        if not self.updates:
            return "profile: no step was called in it"
        each = self.updates * 1e3
        lines = [f"{self.updates} calls of a step, {self.total / each:.2f} ms each"]
        lines += [
            f"  {name:32} {self.own[name] / each:9.2f} ms {share:6.1%}"
            for name, share in sorted(self.shares().items(), key=lambda x: -x[1])
        ]
        if self.travels:
            lines.append("collectives, a call                launches  under way    hidden")
        hidden = self.hidden()
        for name, t in self.travels.items():
            seen = f"{t.under_way / each:8.2f} ms {hidden[name]:9.1%}" if name in hidden else "not recorded"
            lines.append(f"  {name:32} {t.launches / self.updates:9.1f} {seen}")
        return "\n".join(lines)


@contextmanager
def profile(path: str | Path | None = None, **more: Any) -> Iterator[Profile]:
    """Traces the steps that are called while it is open, on this rank.

    The trace opens in Perfetto or chrome://tracing, and HTA reads it: every transform, unit, optimizer and collective
    has the name there that it has in the printed chain. A gradient is its "forward" and "backward", and where a bracket
    closes it says which, as "the end of shard('data')". Of an engine its forwards count, too, which run before its
    steps. Tracing itself costs time, of small operations more than half.

    Args:
      path: where to write the trace, as "trace.json"; of several ranks each writes its own, "trace.rank1.json".
      more: for torch.profiler.profile, as record_shapes=True, profile_memory=True.

    Raises:
      OSError: the trace cannot be written.

    >>> import funczero as fz, torch
    >>> step = fz.train_step(fz.value_and_grad(lambda p, b: (((p["w"] - b) ** 2).sum(), b.sum())), fz.sgd(0.1))
    >>> state = step.init({"w": torch.zeros(2)})
    >>> with fz.profile() as seen:
    ...     state, _ = step(state, torch.ones(2))
    >>> seen.updates, sorted(seen.shares())[:3]
    (1, ['backward', 'forward', 'mean'])
    """
    out = Profile()
    with profiler(**({"acc_events": True} | more)) as traced:
        yield out
    if path is not None:
        own = Path(path)
        own = own if world_size() == 1 else own.with_name(f"{own.stem}.rank{world_rank()}{own.suffix}")
        own.parent.mkdir(parents=True, exist_ok=True)
        traced.export_chrome_trace(str(own))
        out.paths = (own,)
    _read(out, traced.events() or ())


def _read(out: Profile, events: Sequence[Any]) -> None:
    """Fill a profile from a trace's events."""
    named = [Stretch(e.name, e.time_range.start, e.time_range.end) for e in events]
    marked = sorted((x._replace(name=x.name[len(MARK) :]) for x in named if x.name.startswith(MARK)), key=_order)
    steps = [x for x in marked if x.name in LISTED]
    inside = [x for x in marked if any(s.start <= x.start and x.end <= s.end for s in steps)]
    out.updates = sum(x.name == UPDATE for x in steps)
    own: dict[str, float] = {}
    for name, time in _own_times(inside):
        name = LISTED.get(name) or _listed(name)
        own[name] = own.get(name, 0.0) + time
    out.own, out.total = own, sum(own.values())
    sent = sorted((x for x in named if BACKENDS.fullmatch(x.name)), key=_order)
    out.travels = _travels(inside, sent)


def _order(x: Stretch) -> tuple[float, float]:
    return x.start, -x.end


def _own_times(stretches: Sequence[Stretch]) -> Iterator[tuple[str, float]]:
    """Of nested stretches in order, each one's time less that of the stretches directly inside it."""
    open_: list[tuple[Stretch, list[float]]] = []
    for x in (*stretches, None):
        while open_ and (x is None or x.start >= open_[-1][0].end):
            done, inner = open_.pop()
            yield done.name, done.end - done.start - sum(inner)
        if x is not None:
            if open_:
                open_[-1][1].append(x.end - x.start)
            open_.append((x, []))


def _listed(name: str) -> str:
    """The list of a block: blocks/3 is blocks/*."""
    return re.sub(r"(?<=[/.])\d+(?=[/.]|$)", "*", name)


def _travels(marked: Sequence[Stretch], sent: Sequence[Stretch]) -> dict[str, Travel]:
    """By collective and axis what its launches took: a backend's record belongs to the last launch before it that has
    none.
    """
    waits = [x for x in marked if x.name == WAIT]
    verbs = ("all_gather ", "reduce_scatter ", "all_reduce ", "exchange ", "broadcast ")
    left = list(sent)
    found: dict[str, Travel] = {}
    for launch in (x for x in marked if x.name.startswith(verbs)):
        known = found.get(launch.name, Travel(0, 0.0, 0.0))
        record = next((x for x in left if x.start >= launch.start), None)
        if record is None:
            found[launch.name] = known._replace(launches=known.launches + 1)
            continue
        left.remove(record)
        took = record.end - record.start
        found[launch.name] = Travel(known.launches + 1, known.under_way + took, known.waited + record.within(waits))
    return found
