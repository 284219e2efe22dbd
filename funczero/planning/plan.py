"""`plan`: bytes of memory and on the wire, and seconds, of one update, before there is a process or any memory."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from torch.distributed.device_mesh import DeviceMesh

from funczero.core.types import Layout
from funczero.planning.model import Link, Machine, Seconds, links_of, seconds_of, works_of
from funczero.planning.trace import Verb
from funczero.planning.update import bytes_of, gone_through
from funczero.planning.words import amount, columns
from funczero.step.step import Step
from funczero.world.sent import Sent


class Memory(NamedTuple):
    """Bytes of one rank in an update."""

    masters: int
    views: int  # copies of the masters that an update reads, kept or made for it; 0 where it reads the masters
    gradients: int  # what of them lies there once all micro-batches are added, before sums over ranks right of that
    moments: int  # all that optimizers and other transforms keep, numbers included
    wires: int  # what wires remember
    model_state: int
    frozen: int  # what fz.frozen keeps for the loss
    gathered: int  # the most that was gathered at once
    activations: int  # the most that forwards and backwards held at once
    peak: int  # the most that existed at once
    at_peak: dict[str, int]  # by kind

    @property
    def states(self) -> int:
        """The model states of the ZeRO paper: masters, views, gradients and moments."""
        return self.masters + self.views + self.gradients + self.moments


class Plan(NamedTuple):
    """What one rank of a mesh holds and sends in one update; printed, it is a table."""

    chain: tuple[str, ...]
    brackets: tuple[str, ...]  # axes that leaves are cut over, outermost first
    mesh: dict[str, int]
    rank: int
    parameters: int  # of the whole model, tied ones once
    memory: Memory
    sent: Sent  # by this rank: (axis, verb, dtype or wire) -> bytes, as fz.count_bytes counts them in a run
    verbs: tuple[Verb, ...]  # what it does, in order
    units: tuple[str, ...]  # names of the units that verbs speak of
    flops: int  # of this rank
    seconds: Seconds | None  # None without links
    notes: tuple[str, ...]

    def __str__(self) -> str:
        head = f"plan on {' x '.join(f'{a}={n}' for a, n in self.mesh.items()) or 'one process'}, rank {self.rank}"
        lines = [f"{head}: {self.parameters:,} parameters, {self.flops:,} FLOPs an update"]
        m = self.memory
        kinds = [(name.replace("_", " "), amount(n)) for name, n in m._asdict().items() if isinstance(n, int) and n]
        lines += columns([("bytes of a rank", ""), *kinds], indent=1)
        most = sorted(m.at_peak.items(), key=lambda kv: -kv[1])
        lines.append(f"  at the peak: {', '.join(f'{kind} {amount(n)}' for kind, n in most if n * 50 > m.peak)}")
        lines += [f"  {line}" for line in str(self.sent).splitlines()] if self.sent else ["  nothing is sent"]
        lines += [] if self.seconds is None else [f"  {line}" for line in str(self.seconds).splitlines()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def plan(
    step: Step,
    params: Any = None,
    batch: Any = None,
    mesh: Mapping[str, int] | None = None,
    link: str | Mapping[str, Link] | None = None,
    machine: str | Machine | None = None,
    rank: int = 0,
) -> Plan:
    """What an update holds, sends and takes, on any mesh, without processes and without the memory.

    The step itself runs, on tensors that have shapes and no values: its own specs, edges, wires and messages, and the
    loss with its backward. Law: bytes of states and on the wire are those of a run, to the byte. The peak is that of
    live storages (fz.count_memory). What values decide goes its ordinary course: every update counts, and no exact sum
    has parts too large for one integer.

    Args:
      step: of train_step; its own mesh may be of any size.
      params: as step.init's: tensors, meta tensors do, or whatever has a shape and a dtype; a module. None: those that
        the step was given last.
      batch: the global batch of an update, as step.local_rows takes it; shapes do. None: without activations and
        FLOPs, each unit read once, for a look at a large model in seconds.
      mesh: sizes of the step's mesh axes, up to thousands of ranks; None: the step's own.
      link: by mesh axis, as "node=100Gbit/10us,local=400Gbit/2us": rate and latency of one rank's link (see
        planning/model.py). None: no seconds.
      machine: what a rank computes with, as "300T,2TB,5us": FLOPs and memory's bytes a second, seconds an operation;
        None: nothing takes time but messages. It needs the links of all axes with more than one rank.
      rank: whose, among all. Rank 0 has the first rows of every leaf, never fewer than others; optimizers of whole
        leaves give it other leaves than others.

    Raises:
      ValueError: no parameters are known; the mesh lacks an axis of the step, or has another; the rank is not on it;
        an optimizer needs values; the loss sends something itself, and there is no batch.
      TypeError: the loss reads a value, so that nobody knows what comes next.
      ChainError: the chain cannot be built on that mesh.

    >>> import torch, funczero as fz
    >>> loss = lambda params, batch: (((batch @ params["w"]) ** 2).sum(), batch.new_tensor(len(batch)))
    >>> chain = fz.zero(fz.value_and_grad(loss, batch=fz.P("data")), fz.adamw(1e-3), stage=1)
    >>> step = fz.train_step(*chain, mesh={"data": 1})
    >>> found = plan(step, {"w": torch.empty(1024, 512, device="meta")}, torch.empty(64, 1024), mesh={"data": 64})
    >>> found.memory.masters, found.memory.views, found.flops
    (32768, 2097152, 2097152)
    >>> sum(n for (axis, verb, form), n in found.sent.items() if verb == "all_gather")
    2064384
    """
    sizes = _sizes(step, mesh)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < prod(sizes.values()):
        raise ValueError(f"plan: rank={rank!r} is not on a mesh of {prod(sizes.values())} ranks; write one from 0")
    links = links_of(link, sizes, machine)
    works = works_of(machine)
    _plannable(step, batch)
    ran = gone_through(step, params, batch, sizes, rank)
    live, own, structure = ran.trace.live, bytes_of(ran.state), ran.state.params.where.structure
    memory = Memory(
        own["masters"],
        ran.views,
        ran.trace.gradients,
        own["moments"],
        own["wires"],
        own["model state"],
        live.most("frozen"),
        live.most("gathered"),
        live.most("activations"),
        live.peak,
        live.at_peak(),
    )
    return Plan(
        ran.grad.names,
        tuple(ran.grad.env.rules),
        sizes,
        rank,
        sum(prod(x.shape) for x in structure.leaves),
        memory,
        ran.grad.env.mesh.sent,
        tuple(ran.trace.verbs),
        tuple(unit.name for unit in structure.units),
        sum(v.flops for v in ran.trace.verbs),
        None if links is None else seconds_of(ran.trace.verbs, links, works),
        _notes(batch, ran.trace.uncounted, step.grad.env.capture is not None),
    )


def _sizes(step: Step, mesh: Mapping[str, int] | DeviceMesh | None) -> dict[str, int]:
    own = step.grad.env.mesh.sizes()
    if mesh is None:
        return own
    if isinstance(mesh, DeviceMesh) or not isinstance(mesh, Mapping):
        raise TypeError(f"plan: mesh={mesh!r} is no dict of sizes; write mesh={{{next(iter(own), 'data')!r}: 1024}}")
    if set(mesh) != set(own):
        raise ValueError(f"plan: mesh={dict(mesh)} has other axes than the step, whose mesh is {own}; write its axes")
    odd = next((a for a, n in mesh.items() if not isinstance(n, int) or isinstance(n, bool) or n < 1), None)
    if odd is not None:
        raise ValueError(f"plan: mesh axis {odd!r} has size {mesh[odd]!r}; write a positive number of processes")
    return {axis: mesh[axis] for axis in own}  # ranks are numbered by the step's own order


def _plannable(step: Step, batch: Any) -> None:
    """Refuse what hangs on values, or on the loss where that does not run.

    Raises:
      ValueError: ranks open the units that their rows ask for; without a batch, the loss does what is sent for.
    """
    beside = (*step.source.beside, *["SyncBatchNorm"] * step.source.synced)
    if batch is None and beside:
        why = f"an update sends more for {', '.join(beside)} of its loss, and without a batch that does not run"
        raise ValueError(f"plan: {why}; give a batch, of which shapes do")
    layout: Layout = step.grad.layout
    if step.source.conditional and layout.rest:
        some = list(step.source.conditional)
        why = f"which blocks of {some} a rank opens hangs on its rows, and every one is a message"
        raise ValueError(f"plan: {why}; plan stage 2 of it, or a model without routed blocks")


def _notes(batch: Any, uncounted: Mapping[str, int], captured: bool) -> tuple[str, ...]:
    out = []
    if captured:
        out.append("activations and the peak are those of the loss as it is written; what fz.compile keeps may be more")
    if batch is None:
        out.append("without a batch: no activations and no FLOPs, every unit is read once, and nothing of fz.frozen is")
    if any("mkldnn_rnn_layer" in name for name in uncounted):
        why = "an LSTM's kernel keeps values for its backward whose bytes torch says only where it runs"
        out.append(f"{why}: activations and the peak are without them, and a run's are larger")
    if uncounted:
        named = ", ".join(f"{name} ({n} times)" for name, n in list(uncounted.items())[:4])
        out.append(f"torch's counter knows no FLOPs of {named}, which count as none")
    return tuple(out)
