"""One leaf of a sharded state, whole: read from all ranks, or written into every copy that the state keeps of it."""

from __future__ import annotations

from torch import Tensor

from funczero.comm.collectives import gather_leaf
from funczero.core.types import TrainState
from funczero.layout.mesh import Mesh
from funczero.layout.slots import Slots
from funczero.layout.structure import Structure


def number(structure: Structure, name: str) -> int:
    """A leaf's number from one of its names."""
    names: dict[str, int] = structure.unflatten(range(len(structure.leaves)))
    return names[name]


def read_leaf(slots: Slots, name: str, mesh: Mesh) -> Tensor | None:
    """A leaf as one tensor on every rank; None for what has no values (frozen). A collective where it is cut."""
    return gather_leaf(slots, number(slots.where.structure, name), mesh)


def write_leaf(state: TrainState, name: str, value: Tensor) -> None:
    """A whole leaf into the masters, and into the views where those are kept apart, in place. Nothing is sent."""
    for slots in (state.params, state.views) if state.views is not None else (state.params,):
        write_part(slots, name, value)


def check_leaf(slots: Slots, name: str, value: Tensor) -> None:
    """Refuse a whole value that a leaf cannot take.

    Raises:
      ValueError: it has another shape.
    """
    shape = slots.where.structure.leaves[number(slots.where.structure, name)].shape
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"parameter {name!r} has shape {tuple(shape)}, but the value has {tuple(value.shape)}; "
            "give one of the same shape"
        )


def write_part(slots: Slots, name: str, value: Tensor) -> None:
    """A whole leaf's part here.

    Raises:
      ValueError: the value has another shape.
    """
    check_leaf(slots, name, value)
    slots.write(number(slots.where.structure, name), value)
