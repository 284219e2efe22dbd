"""The static half of a tree of parameters: its form, its leaves (tied ones once), their units and their cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch.utils._pytree as pytree

from funczero.core import tree
from funczero.core.types import Tree
from funczero.layout.cut import Cut, unruled


@dataclass(frozen=True)
class Leaf:
    """One parameter: its first path, its global shape, its unit, and how each bracket's axis cuts it."""

    path: str
    shape: tuple[int, ...]
    unit: int
    cuts: tuple[tuple[str, Cut], ...]

    def cut(self, axis: str) -> Cut:
        """How a mesh axis cuts this leaf, also where no bracket says."""
        return next((c for a, c in self.cuts if a == axis), unruled(self.shape))


class Unit(NamedTuple):
    """What is gathered together: one buffer. `seam` says that the loss opens it by itself."""

    name: str
    seam: bool
    frozen: bool


@dataclass(frozen=True)
class Structure:
    """The static half of a tree of parameters: its form, its leaves (tied ones once) and their units."""

    treedef: pytree.TreeSpec
    places: tuple[int, ...]  # tree position -> leaf
    leaves: tuple[Leaf, ...]
    units: tuple[Unit, ...]

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Leaf numbers by unit."""
        return tuple(tuple(i for i, leaf in enumerate(self.leaves) if leaf.unit == u) for u in range(len(self.units)))

    @cached_property
    def values(self) -> int:
        """How many numbers all leaves have, tied ones counted once."""
        return sum(prod(leaf.shape) for leaf in self.leaves)

    def unflatten(self, leaves: Sequence[Any]) -> Tree:
        """The tree with a value a leaf; a tied one is seen at all its paths."""
        return tree.unflatten([leaves[i] for i in self.places], self.treedef)

    def frozen(self, leaf: int) -> bool:
        """Has this leaf no gradient?"""
        return self.units[self.leaves[leaf].unit].frozen

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What was worked out for this structure."""
        return {}


pytree.register_constant(Structure)
