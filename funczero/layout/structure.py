"""The static half of a tree of parameters: its form, its leaves (tied ones once), their units, and the dim that every bracket cuts."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch.utils._pytree as pytree

from funczero.core import tree
from funczero.layout.mesh import P


class Rules(NamedTuple):
    """How one bracket cuts leaves: the first matching `(regex, P)` by path, else dim 0; leaves under `threshold` elements stay whole."""

    rules: tuple[tuple[str, P], ...] = ()
    threshold: int = 0


@dataclass(frozen=True)
class Leaf:
    """One parameter: its first path, its global shape, its unit, and the tensor dim that each mesh axis cuts (None: not cut)."""

    path: str
    shape: tuple[int, ...]
    unit: int
    dims: tuple[tuple[str, int | None], ...]

    def dim(self, axis: str) -> int | None:
        """The dim that a mesh axis cuts; dim 0 where no bracket says."""
        return next((d for a, d in self.dims if a == axis), 0 if self.shape else None)


class Unit(NamedTuple):
    """What is gathered together: one buffer. `seam` says that the loss opens it by itself."""

    name: str
    seam: bool
    frozen: bool


@dataclass(frozen=True)
class Structure:
    """The static half of a tree of parameters: its form, its leaves (tied ones once) and their units."""

    treedef: Any
    places: tuple[int, ...]  # tree position -> leaf
    leaves: tuple[Leaf, ...]
    units: tuple[Unit, ...]

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Leaf numbers by unit."""
        return tuple(tuple(i for i, leaf in enumerate(self.leaves) if leaf.unit == u) for u in range(len(self.units)))

    def unflatten(self, leaves: Sequence[Any]) -> Any:
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


def dims_cut(path: str, shape: tuple[int, ...], rules: dict[str, Rules]) -> tuple[tuple[str, int | None], ...]:
    out: dict[str, int | None] = {}
    bound: dict[str, int] = {}  # what outer brackets' rules say of inner axes
    default: int | None = 0 if shape else None
    for axis, (pairs, threshold) in rules.items():
        spec: P | None = tree.rule(pairs, path, None)
        if spec is not None:
            if len(spec) > len(shape):
                raise ValueError(f"shard({axis!r}): rule {spec} has {len(spec)} dims, but parameter {path!r} has shape {shape}; write at most {len(shape)} entries")
            own = dict(spec.axes())
            for name, d in own.items():
                if bound.setdefault(name, d) != d or name in out and out[name] != d:
                    raise ValueError(f"shard({axis!r}): rule {spec} cuts dim {d} of {path!r} over {name!r}, but an outer bracket's rule says otherwise; change one of them")
            out[axis] = default = own.get(axis)
        elif axis in bound:
            out[axis] = default = bound[axis]
        else:
            out[axis] = None if prod(shape) < threshold else default
    return tuple(out.items())
