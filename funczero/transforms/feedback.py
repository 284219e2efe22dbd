"""What wires with memory keep from one sum to the next, as leaves of the state: `feedback@<axis>`, one a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from funczero.comm.edge import Edge
from funczero.comm.memory import Held
from funczero.comm.wire import Memory
from funczero.core.types import Env, Grad, Out, Seed, State, Tree, Updated
from funczero.layout.slots import Slots
from funczero.layout.where import Where

if TYPE_CHECKING:
    from funczero.layout.lazy import Lazy

HERE = "without terms"  # in Where.memo


class Feedback(NamedTuple):
    """What rounding has taken from the sums over an axis and goes into the next one."""

    errors: Slots  # at the place of what is summed, in policy.accumulate; every rank of the sum has its own
    count: Tensor  # type: ignore[assignment]  # sums since it was empty, in place of the tuple's method


def remembers(env: Env, axis: str) -> bool:
    """Does a sum over this axis keep errors?"""
    return env.edges[axis].scatter.memory is not None and env.mesh.axes[axis].size > 1


def name_of(axis: str) -> str:
    """Where the memory of an axis is kept."""
    return f"feedback@{axis}"


def empty(params: Lazy, env: Env, axis: str, sharded: Sequence[str], unreduced: Sequence[str]) -> State:
    """The memory of an axis before its first sum.

    Args:
      sharded, unreduced: axes that what is summed is split over, and those that it is a partial sum over.
    """
    coords, terms = env.mesh.coords(tuple(sharded)), env.mesh.coords(tuple(unreduced))
    where = Where(params.structure, coords, terms=terms)
    errors = Slots.zeros(where, env.policy.accumulate, params.device, frozen=False)
    return {name_of(axis): Feedback(errors, torch.zeros((), dtype=torch.int64))}


def held(state: State, axis: str, seed: Seed) -> Held | None:
    """The memory of an axis for a sum; None where its wire has none."""
    own = state.get(name_of(axis))
    if own is None:
        return None
    where = own.errors.where
    if HERE not in where.memo:
        where.memo[HERE] = replace(where, terms=())
    return Held(Slots(own.errors.buffers, where.memo[HERE]), seed.cotangent.detach())


def renewed(state: State, edge: Edge, errors: Slots | None) -> State:
    """The state with the memory that a sum over an axis has left."""
    if errors is None:
        return state
    assert isinstance(edge.scatter.memory, Memory)
    own: Feedback = state[name_of(edge.axis)]
    every, count = edge.scatter.memory.every, own.count + 1
    if every and int(count) >= every:
        errors, count = errors.map(torch.zeros_like), torch.zeros_like(count)
    return {**state, name_of(edge.axis): Feedback(Slots(errors.buffers, own.errors.where), count)}


def kept_where_skipped(g: Grad) -> Grad:
    """g, whose memories are as they were before an update that is skipped."""

    def apply(views: Slots, state: State, batch: Tree, seed: Seed) -> tuple[Out | None, State]:
        old = {k: x for k, x in state.items() if isinstance(x, Feedback)}
        out, new = g.apply(views, state, batch, seed)
        if isinstance(out, Updated):
            new = {**new, **{k: _chosen(out.ok, new[k], x) for k, x in old.items()}}
        return out, new

    return g._replace(apply=apply) if any(remembers(g.env, a) for a in g.env.edges) else g


def _chosen(ok: Tensor, new: Feedback, old: Feedback) -> Feedback:
    if ok.device.type == "cpu":
        return new if bool(ok) else old
    errors = new.errors.map(lambda n, o: torch.where(ok, n, o), old.errors)
    return Feedback(errors, torch.where(ok.cpu(), new.count, old.count))


def of_axes(state: State, axes: Sequence[str], seed: Seed) -> Mapping[str, Held]:
    """The memories of some axes, of those that have one."""
    return {a: x for a in axes if (x := held(state, a, seed)) is not None}
