"""Which stage do I need: stage x brackets x wires x accumulate, ranked for a given memory, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from funczero.comm.quantised import int4, int8
from funczero.core.number import number
from funczero.core.policy import Policy
from funczero.core.types import ChainError
from funczero.planning.model import Link, Machine
from funczero.planning.plan import Plan, plan
from funczero.planning.update import heaviest
from funczero.planning.words import amount, columns, duration, size
from funczero.step.step import Step
from funczero.step.train_step import train_step
from funczero.step.zero import hpz, mics, zero, zeropp
from funczero.transforms.chain import Source

WIRES: dict[str, dict[str, Any]] = {"exact": {}, "int8 views": {"gather": int8(2048)}}
WIRES["int8 views, int4 sums"] = {"gather": int8(2048), "scatter": int4(512)}


class Candidate(NamedTuple):
    """One way to run a model."""

    name: str
    wires: str
    accumulate: int
    build: Callable[[], Step]


class Found(NamedTuple):
    """A candidate, and what was planned of it."""

    candidate: Candidate
    states: int  # bytes at rest
    plan: Plan | None  # None where they do not even fit, and nothing more was planned
    fits: bool


class Ranking(NamedTuple):
    """All candidates, the best first; printed, a table."""

    memory: int | None
    mesh: dict[str, int]
    rows: tuple[Found, ...]
    left_out: tuple[str, ...]  # candidates that cannot be planned on it, each with its reason

    @property
    def best(self) -> Plan | None:
        """The plan of the first that fits."""
        return next((row.plan for row in self.rows if row.fits), None)

    def __str__(self) -> str:
        head = ("chain", "wires", "accumulate", "states", "peak", "sent", "an update", "")
        cells = [(*_words(row), "fits" if row.fits else "does not fit") for row in self.rows]
        room = "any memory" if self.memory is None else f"{amount(self.memory)} a rank"
        ranks = " x ".join(f"{axis}={n}" for axis, n in self.mesh.items())
        first = next((row for row in self.rows if row.fits), None)
        told = "nothing fits: more ranks, smaller micro-batches or a block that runs again (remat) would need less"
        if first is not None:
            told = f"first of those that fit: {first.candidate.name}, {first.candidate.wires}"
        heavy = sorted({row.plan.rank for row in self.rows if row.plan is not None and row.plan.rank})
        which = f"whole leaves are dealt among ranks: what is shown is of those that hold most, {heavy}"
        left = [which] * bool(heavy) + [f"left out: {line}" for line in self.left_out]
        return "\n".join([f"on {ranks}, {room}", *columns([head, *cells], indent=1, left=2), told, *left])


def _words(row: Found) -> tuple[str, ...]:
    c, p = row.candidate, row.plan
    took = "" if p is None or p.seconds is None else duration(p.seconds.update)
    peak, sent = ("", "") if p is None else (amount(p.memory.peak), amount(sum(p.sent.values())))
    return (c.name, c.wires, str(c.accumulate), amount(row.states), peak, sent, took)


def search_plans(
    grad: Source,
    *transforms: Any,
    params: Any,
    mesh: Mapping[str, int],
    batch: Any = None,
    memory: int | str | None = None,
    link: str | Mapping[str, Link] | None = None,
    machine: str | Machine | None = None,
    policy: str | Policy | None = None,
    accumulate: Sequence[int] = (1,),
    wires: Sequence[str] = tuple(WIRES),
) -> Ranking:
    """Stages 0 to 3, and with an axis between nodes and one within them MiCS, hpZ and ZeRO++, each with these wires and
    accumulates: the fastest that fits the memory first, without a link the one that sends least. What is planned is the
    rank that holds most, which of optimizers of whole leaves need not be the first.

    Args:
      grad, transforms: as zero's: value_and_grad over all axes of the mesh, then what works on the mean.
      params, batch, link, machine: as plan's. Without a batch the peak has no activations, and says less.
      mesh: sizes of its axes, outermost first.
      memory: of a rank, in bytes or as "24GiB"; None: all fits.
      accumulate: numbers of micro-batches a rank; those that do not divide the batch's rows are left out, by
        name.
      wires: which of "exact", "int8 views" and "int8 views, int4 sums".

    Raises:
      ValueError: no such wires, memory, mesh or accumulates; no candidate can be planned, with the reason of the first.

    >>> import torch, funczero as fz
    >>> loss = lambda params, batch: (((batch @ params["w"]) ** 2).sum(), batch.new_tensor(len(batch)))
    >>> found = search_plans(
    ...     fz.value_and_grad(loss, batch=fz.P("data")), fz.adamw(1e-3), mesh={"data": 8}, memory="80MB",
    ...     params={"w": torch.empty(1024, 4096, device="meta")}, batch=torch.empty(64, 1024), wires=("exact",))
    >>> [(row.candidate.name, row.fits) for row in found.rows]
    [('ZeRO-1', True), ('ZeRO-2', True), ('ZeRO-3', True), ('ZeRO-0', False)]
    """
    odd = next((w for w in wires if w not in WIRES), None)
    if odd is not None:
        raise ValueError(f"plan: wires {odd!r} are none of {list(WIRES)}; write some of them")
    who = "search_plans"
    room = size(memory, f"{who}: memory") if isinstance(memory, str) else memory
    room = None if room is None else int(number(who, "memory", room, above=True))
    if isinstance(accumulate, (int, str)) or not accumulate or not mesh:
        why = f"accumulate={accumulate!r} are no numbers" if mesh else "the mesh has no axis"
        raise ValueError(f"search_plans: {why}; write accumulate=(1, 2) and mesh={{'data': 8}}")
    every = list(candidates(grad, transforms, mesh, accumulate, wires, policy))
    return ranked(every, params, batch, mesh, room, link, machine)


def ranked(
    every: Sequence[Candidate],
    params: Any,
    batch: Any,
    mesh: Mapping[str, int],
    memory: int | None,
    link: str | Mapping[str, Link] | None = None,
    machine: str | Machine | None = None,
) -> Ranking:
    """Candidates by what was planned of them; one whose states alone do not fit is planned no further.

    Raises:
      ValueError: none can be planned, with the reason of the first.
    """
    found, left_out = list[Found](), dict[str, None]()
    for candidate in every:
        name = f"{candidate.name} with accumulate {candidate.accumulate}"
        try:
            step = candidate.build()
            rank, states = heaviest(step, params, dict(mesh))
            fits = memory is None or states <= memory
            made = plan(step, params, batch, mesh, link, machine, rank) if fits else None
        except (ChainError, ValueError) as error:  # as rows that this accumulate does not divide
            if not isinstance(error, ChainError) and "divide" not in str(error):
                raise
            left_out[f"{name}: {str(error).splitlines()[0]}"] = None
            continue
        if made is not None and memory is not None:
            fits = made.memory.peak <= memory
        found.append(Found(candidate, states, made, fits))
    if not found:
        why = next(iter(left_out), "there is none")
        raise ValueError(f"search_plans: no chain can be planned on {dict(mesh)}: {why}")
    return Ranking(memory, dict(mesh), tuple(sorted(found, key=_cost)), tuple(left_out))


def _cost(row: Found) -> tuple[bool, float, int]:
    """What does not fit comes last, what needs least of it first."""
    if not row.fits or row.plan is None:
        return True, float(row.states if row.plan is None else row.plan.memory.peak), 0
    took = row.plan.seconds.update if row.plan.seconds is not None else float(sum(row.plan.sent.values()))
    return False, took, row.plan.memory.peak


def candidates(
    grad: Source,
    transforms: Sequence[Any],
    mesh: Mapping[str, int],
    accumulate: Sequence[int],
    wires: Sequence[str],
    policy: str | Policy | None,
) -> Iterator[Candidate]:
    """All chains that are looked at."""
    axes = tuple(a for a in mesh if a in grad.batch) or tuple(mesh)
    over = axes if len(axes) > 1 else axes[0]
    for k in accumulate:
        for name in wires:
            for stage in range(4) if name == "exact" else range(1, 4):
                parts = zero(grad, *transforms, stage=stage, axis=over, accumulate=k, **WIRES[name])
                yield _candidate(f"ZeRO-{stage}", name, k, parts, mesh, policy)
        if len(axes) == 2 and all(mesh[a] > 1 for a in axes):
            node, local = axes
            yield _candidate(
                "MiCS", "exact", k, mics(grad, *transforms, within=local, across=node, accumulate=k), mesh, policy
            )
            yield _candidate(
                "hpZ", "exact", k, hpz(grad, *transforms, within=local, across=node, accumulate=k), mesh, policy
            )
            if "int8 views, int4 sums" in wires:
                parts = zeropp(grad, *transforms, node=node, local=local, accumulate=k)
                yield _candidate("ZeRO++", "int8 views, int4 sums", k, parts, mesh, policy)


def _candidate(
    name: str, wires: str, k: int, parts: tuple[Any, ...], mesh: Mapping[str, int], policy: str | Policy | None
) -> Candidate:
    return Candidate(name, wires, k, lambda: train_step(*parts, mesh=mesh, policy=policy))
