"""`plan`: bytes of memory and on the wire, and seconds, of one update, before there is a process or any memory."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from funczero.planning.update import bytes_of, gone_through
from funczero.planning.trace import Verb
from funczero.step.step import Step
from funczero.world.sent import Sent


class Memory(NamedTuple):
    """Bytes of one rank."""

    masters: int
    views: int  # wider or narrower copies of the masters that an update reads; 0 where it reads the masters
    gradients: int  # as they are kept until the update: what lies there when the mean is taken
    moments: int  # and everything else that transforms keep, numbers included
    wires: int  # what wires remember
    model_state: int
    gathered: int  # the most that was gathered at once
    activations: int  # the most that forwards and backwards held at once
    peak: int  # of all storages that exist at once
    at_peak: dict[str, int]  # by kind

    @property
    def states(self) -> int:
        """Of the ZeRO paper's model states: masters, views, gradients and moments."""
        return self.masters + self.views + self.gradients + self.moments


class Plan(NamedTuple):
    """What one rank of a mesh holds and sends in one update."""

    mesh: dict[str, int]
    rank: int
    memory: Memory
    sent: Sent  # by this rank: (axis, verb, dtype or wire) -> bytes, as count_bytes counts them
    verbs: tuple[Verb, ...]  # what it does, in order
    units: tuple[str, ...]
    parameters: int  # of the whole model


def plan(step: Step, params: Any, batch: Any = None, mesh: Mapping[str, int] | None = None, rank: int = 0) -> Plan:
    """x"""
    sizes = dict(step.grad.env.mesh.sizes() if mesh is None else mesh)
    ran = gone_through(step, params, batch, sizes, rank)
    live, own, structure = ran.trace.live, bytes_of(ran.state), ran.state.params.where.structure
    memory = Memory(
        own["masters"], ran.views, ran.trace.gradients or 0, own["moments"], own["wires"], own["model state"],
        live.most("gathered"), live.most("activations"), live.peak, live.at_peak(),
    )
    return Plan(sizes, rank, memory, ran.grad.env.mesh.sent, tuple(ran.trace.verbs), tuple(u.name for u in structure.units),
        sum(prod(x.shape) for x in structure.leaves))
