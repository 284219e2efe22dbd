"""One leaf of a sharded state, whole: read from all ranks, or written into every copy that the state keeps of it."""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funczero.core.types import TrainState
from funczero.layout.slots import Slots
from funczero.layout.structure import Structure


def number(structure: Structure, name: str) -> int:
    """A leaf's number from one of its names."""
    names: dict[str, int] = structure.unflatten(range(len(structure.leaves)))
    return names[name]


def read_leaf(slots: Slots, name: str) -> Tensor | None:
    """A leaf as one tensor on every rank; None for what has no values (frozen). A collective where it is cut."""
    i = number(slots.where.structure, name)
    part, slot, shape = slots.leaves()[i], slots.where.slots[i], slots.where.structure.leaves[i].shape
    if part is None or tuple(part.shape) == tuple(shape) and not _cut(slots, i):
        return None if part is None else part.detach().clone()
    whole = torch.zeros(shape, dtype=part.dtype, device=part.device)
    whole[_place(slot)] = part
    dist.all_reduce(whole)  # every value is on one rank, the others add zeros
    return whole


def write_leaf(state: TrainState, name: str, value: Tensor) -> None:
    """A whole leaf into the masters, and into the views where those are kept apart; in place, and without communication."""
    for slots in (state.params, state.views) if state.views is not None else (state.params,):
        write_part(slots, name, value)


def write_part(slots: Slots, name: str, value: Tensor) -> None:
    """A whole leaf's part here."""
    i = number(slots.where.structure, name)
    part, shape = slots.leaves()[i], slots.where.structure.leaves[i].shape
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"parameter {name!r} has shape {tuple(shape)}, but the value has {tuple(value.shape)}; give one of the same shape")
    assert part is not None
    part.data.copy_(value.detach()[_place(slots.where.slots[i])])


def _cut(slots: Slots, i: int) -> bool:
    leaf = slots.where.structure.leaves[i]
    return any(size > 1 and not leaf.cut(axis).replicated for axis, size, _ in slots.where.coords)


def _place(slot: Any) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(slot.start, slot.shape, strict=True))
