"""Leaf coordinates: which part of every leaf a rank holds, in which memory, and where it lies in that rank's buffers.

Every bracket cuts what the bracket around it left (cut.py). In memory each part lies in a zero-padded slot of
16-element multiples, at W = 1 too, and the slots of a unit are one buffer: one gather a unit, elementwise kernels
without tails, the same bits on any cut. In every spec there is only the logical array.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch.utils._pytree as pytree
from torch import Tensor

from funczero.layout.cut import Extent
from funczero.layout.mesh import Coords
from funczero.layout.place import DEVICE, Place
from funczero.layout.spec import P
from funczero.layout.structure import Structure

GRAIN = 16  # elements; a slot is a multiple of it, so that no vector kernel meets a tail


class Slot(NamedTuple):
    """Where one leaf's part lies."""

    offset: int
    length: int  # padded
    shape: tuple[int, ...]  # of the part
    start: tuple[int, ...]  # of the part in the leaf
    block: tuple[int, ...]  # shape of a full part; that of a late rank may be less

    @property
    def place(self) -> tuple[slice, ...]:
        """Of the part in the leaf, to index it with."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))


@dataclass(frozen=True)
class Where:
    """One rank's part of a structure and the memory it lies in: `coords` are (axis, size, index), outermost first.

    Along the axes of `terms` every rank has values of its own, as a part of a sum has; they are leading dims of the
    logical array. `memory` says of wider copies of parameters that they are values of their own, because a wire with
    memory made them, and do not follow from the masters.
    """

    structure: Structure
    coords: Coords
    place: Place = DEVICE
    terms: Coords = ()
    memory: bool = False

    @classmethod
    def whole(cls, structure: Structure, place: Place = DEVICE) -> Where:
        """Every leaf whole: one value a structure and place, so that what is worked out for it is kept."""
        key = ("whole", place)
        if key not in structure.memo:
            structure.memo[key] = cls(structure, (), place)
        found: Where = structure.memo[key]
        return found

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes this is split over."""
        return tuple(a for a, _, _ in self.coords)

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What was worked out for this part: neighbours, and plans of what travels."""
        return {}

    def __reduce__(self) -> Any:
        """For pickles, without what was worked out."""
        return Where, (self.structure, self.coords, self.place, self.terms, self.memory)

    def inner(self, axis: str, size: int, index: int) -> Where:
        """One step inwards."""
        key = (axis, size, index)
        if key not in self.memo:
            self.memo[key] = replace(self, coords=(*self.coords, key))
        found: Where = self.memo[key]
        return found

    @cached_property
    def outer(self) -> Where:
        """One step outwards."""
        return replace(self, coords=self.coords[:-1])

    def replicas(self, leaf: int) -> tuple[str, ...]:
        """Axes of this part that hold the same part of a leaf on all their ranks."""
        return tuple(a for a, n, _ in self.coords if n > 1 and self.structure.leaves[leaf].cut(a).replicated)

    @cached_property
    def sections(self) -> tuple[tuple[tuple[tuple[str, ...], int, int], ...], ...]:
        """By unit: runs of slots with the same replicas, as (axes, start, stop).

        What is cut over all axes comes first.
        """
        out = []
        for members in self.structure.members:
            kinds = sorted({self.replicas(i) for i in members}, key=lambda axes: (len(axes), axes))
            spans = [(k, [self.slots[i] for i in members if self.replicas(i) == k]) for k in kinds]
            out.append(tuple((k, min(s.offset for s in ss), max(s.offset + s.length for s in ss)) for k, ss in spans))
        return tuple(out)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Elements of every unit's buffer, the same on every rank."""
        return tuple(
            max((self.slots[i].offset + self.slots[i].length for i in m), default=0) for m in self.structure.members
        )

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Every leaf's slot."""
        found: dict[int, Slot] = {}
        for members in self.structure.members:
            offset = 0
            for i in sorted(members, key=lambda i: (len(self.replicas(i)), self.replicas(i), i)):
                found[i] = self._slot(i, offset)
                offset += found[i].length
        return tuple(found[i] for i in range(len(self.structure.leaves)))

    def _slot(self, i: int, offset: int) -> Slot:
        leaf = self.structure.leaves[i]
        part = Extent((0,) * len(leaf.shape), leaf.shape, leaf.shape)
        for axis, size, index in self.coords:
            part = leaf.cut(axis).part(part, size, index)
        return Slot(offset, -(-prod(part.block) // GRAIN) * GRAIN, part.shape, part.start, part.block)

    @cached_property
    def gaps(self) -> tuple[bool, ...]:
        """By unit: does its buffer hold padding?"""
        return tuple(any(prod(self.slots[i].shape) != self.slots[i].length for i in m) for m in self.structure.members)

    @cached_property
    def cuts(self) -> tuple[tuple[list[int], list[int]], ...]:
        """By unit: sizes that split its buffer into parts and padding, and which pieces are the members' parts.

        The parts are in the members' order.
        """
        out = []
        for members in self.structure.members:
            sizes: list[int] = []
            piece: dict[int, int] = {}
            for i in sorted(members, key=lambda i: self.slots[i].offset):
                piece[i], n = len(sizes), prod(self.slots[i].shape)
                sizes += [n] + [self.slots[i].length - n] * (self.slots[i].length > n)
            out.append((sizes, [piece[i] for i in members]))
        return tuple(out)

    def views(self, unit: int, buffer: Tensor) -> list[Tensor]:
        """A unit's leaves as views of its buffer, each in its logical shape."""
        slots = self.slots
        return [
            x.view(slots[i].shape) for x, i in zip(self.parts(unit, buffer), self.structure.members[unit], strict=True)
        ]

    def parts(self, unit: int, buffer: Tensor) -> list[Tensor]:
        """The same, flat."""
        sizes, pieces = self.cuts[unit]
        found = buffer.split_with_sizes(sizes)
        return [found[p] for p in pieces]

    def spec(self, leaf: int) -> P:
        """The PartitionSpec of one leaf's part here."""
        info = self.structure.leaves[leaf]
        names = [tuple(a for a in self.axes if info.cut(a).dim == d) for d in range(len(info.shape))]
        entries: list[str | tuple[str, ...] | None] = [a for a, _, _ in self.terms]
        entries += [None if not n else n[0] if len(n) == 1 else n for n in names]
        while entries and entries[-1] is None:
            entries.pop()
        return P(*entries)


pytree.register_constant(Where)


def apart(masters: Where, rest: Where) -> Where | None:
    """Where views are kept between updates: `rest`, if its coordinates or its place differ from those of the masters.

    None where they do not: a view is then the cast master, and nothing is kept.
    """
    return None if (masters.coords, masters.place) == (rest.coords, rest.place) else rest
