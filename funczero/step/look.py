"""Values for a look: the gradient that an update would apply, and parameters that are written by their paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from funczero.comm.collectives import all_gather
from funczero.comm.integers import sum_integers
from funczero.core import rng, tree
from funczero.core.order import Dealt
from funczero.core.transform import after
from funczero.core.types import Grad, Seed, State, TrainState, Value
from funczero.layout.mesh import Mesh
from funczero.layout.slots import Slots
from funczero.step.alike import checksum
from funczero.step.fits import Fits
from funczero.transforms import mean
from funczero.transforms.chain import Source

LOOK = "look"  # where a chain that is looked at keeps the gradient


def seen(g: Grad) -> Grad:
    """The gradient as it is here, with its factor, goes into the state that a call returns."""
    g = mean.value(g, LOOK)

    def fn(out: Value, state: State) -> tuple[Value, State]:
        return out, {**state, LOOK: out.grads.map(lambda b: b * out.factor.to(b.dtype))}

    return after(g, LOOK, g.layout, fn)


def gathered(slots: Slots, mesh: Mesh) -> Slots:
    """Every leaf whole on every rank; a collective where they are cut."""
    return reduce(lambda x, a: all_gather(x, a, mesh), reversed(slots.where.axes), slots)


def by_path(slots: Slots) -> dict[str, Tensor]:
    """Copies of the leaves that are there, by path."""
    return {slots.where.structure.leaves[i].path: x.clone() for i, x in slots.present().items()}


def seed_of(state: TrainState, device: torch.device, look: bool = False) -> Seed:
    """What an update of a state hands to its gradient."""
    run, now = int(state.key), int(state.step)
    return Seed(torch.ones((), device=device), rng.fold(run, now), 0, look, (run, now))


def dealt(batch: Any, source: Source) -> tuple[Any, int | None]:
    """A rank's rows, and how many micro-batches the global batch has where that is fewer than there are places for.

    Raises:
      TypeError, RuntimeError: rows with copies among them are given to a chain in which a copy would count.
    """
    if not isinstance(batch, Dealt):
        return batch, None
    if source.name != "value_and_grad":
        why = "whose forward ran elsewhere, with rows that nobody here can leave out"
        raise TypeError(
            f"step: local_rows(batch, rows=...) is given to a {source.name}, {why}; give whole micro-batches"
        )
    if source.synced:
        why = "takes its statistics over the rows of all ranks, copies in empty places among them"
        raise RuntimeError(f"step: local_rows(batch, rows=...) leaves a place empty, but a SyncBatchNorm {why}")
    return batch.rows, batch.micros


def looking(built: Callable[[], Grad], fits: Fits, source: Source) -> Callable[[TrainState, Any], Slots]:
    """(state, batch) -> the gradient that an update would hand to its last optimizer.

    Args:
      built: the chain with `seen` before optimizers that do nothing.
      source: where it begins.
    """

    def look(state: TrainState, batch: Any) -> Slots:
        g = built()
        if g.streams:
            raise RuntimeError("step.grads: a streamed window is no one batch; look at a chain without stream=True")
        views = fits.views(state, fits.look(state))
        given = {**state.chain, "params": state.params}
        rows, micros = dealt(batch, source)
        seed = seed_of(state, g.env.mesh.device)._replace(micros=micros)
        found: Slots = g.apply(views, given, rows, seed)[1][LOOK]
        return found

    return look


def written(state: TrainState, values: Mapping[str, Any], mesh: Mesh) -> TrainState:
    """The state with whole values at some paths, the same on every rank.

    Raises:
      KeyError: there is no such parameter.
      TypeError, ValueError: a value has another shape or a wider dtype, is no tensor or number, or differs over ranks.
    """
    masters = state.params
    leaves, dtype = masters.where.structure.leaves, masters.buffers[0].dtype
    numbers = {name: i for i, leaf in enumerate(leaves) for name in tree.names(leaf.path)}
    new, sums = masters.map(torch.clone), [torch.zeros((), dtype=torch.int64, device=mesh.device)]
    for path, x in values.items():
        if path not in numbers:
            raise KeyError(f"step.set: there is no parameter {path!r}; paths are {sorted(numbers)[:6]}, ...")
        i = numbers[path]
        value = _value(path, x, leaves[i].shape, dtype, mesh.device)
        sums.append(checksum(value))
        new.write(i, value)
    own = torch.stack(sums).sum().view(1)
    if mesh.connected and bool(sum_integers(own, tuple(mesh.axes), mesh) != own * mesh.rank(tuple(mesh.axes))[1]):
        raise ValueError("step.set: ranks are given different values; give the same whole tensors on every rank")
    return state._replace(params=new)


def _value(path: str, x: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return torch.full(tuple(shape), float(x), dtype=dtype, device=device)
    if not isinstance(x, Tensor):
        raise TypeError(f"step.set: the value of {path!r} is a {type(x).__name__}; give its whole tensor, or a number")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"step.set: the value of {path!r} has shape {tuple(x.shape)}, the parameter {tuple(shape)}")
    if not x.is_floating_point() or torch.finfo(x.dtype).bits > torch.finfo(dtype).bits:
        raise TypeError(f"step.set: the value of {path!r} is {x.dtype}, but its master is {dtype}; cast it first")
    return x.detach().to(device=device, dtype=dtype)
