"""Whole parameters that are read part by part: ties by identity and by name, units by path."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.types import Tree
from funczero.layout.cut import Rules, cuts
from funczero.layout.mesh import Coords
from funczero.layout.place import DEVICE, Place
from funczero.layout.slots import Slots
from funczero.layout.structure import Leaf, Structure, Unit
from funczero.layout.where import Where


@dataclass(frozen=True, eq=False)
class Fill:
    """A parameter that is not there yet: its shape, its dtype, and how to draw or read the whole leaf (see fz.init,
    fz.from_pretrained).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[..., Tensor]
    rows: Callable[[int, int], Tensor] | None = None  # from and to, where some can be had without the others

    def part(self, cut: tuple[slice, ...]) -> Tensor:
        """A part of it."""
        if self.rows is None or not cut:
            whole: Tensor = self.make()
            return whole[cut]
        first, last, _ = cut[0].indices(self.shape[0])
        some: Tensor = self.rows(first, max(first, last))
        return some[(slice(None), *cut[1:])]


class Lazy(NamedTuple):
    """Parameters that are read part by part: `read(leaf, slices)` returns that part of a leaf.

    Nothing whole is ever built here.
    """

    structure: Structure
    read: Callable[[int, tuple[slice, ...]], Tensor]
    device: torch.device  # the rank's own; meta for a form without memory

    def at(self, coords: Coords, dtype: torch.dtype, place: Place = DEVICE) -> Slots:
        """This rank's part as Slots of one dtype."""
        where = Where(self.structure, coords, place)
        out = Slots.zeros(where, dtype, self.device)
        for i, x in enumerate(out.leaves()):
            slot = where.slots[i]
            if x is not None and x.numel():
                x.copy_(self.read(i, slot.place))
        return out


def lazy(
    params: Tree,
    units: Sequence[str],
    rules: dict[str, Rules],
    frozen: Callable[[str], bool],
    device: torch.device,
    ties: Sequence[tuple[str, str]] = (),
) -> Lazy:
    """Whole parameters as lazy leaves: finds ties by identity and by name, units by path, and how every bracket cuts.

    Args:
      frozen: asked once a leaf, with a tree.Path of all its names.
      ties: (second name, first name) of leaves that are one, though a tree may hold two tensors.

    Raises:
      TypeError: a leaf is no floating tensor; with its path.
      ValueError: a unit is not there, a rule cannot hold, or tied leaves differ; with the leaf's path.
    """
    flat, treedef = tree.flatten(params)
    named = tree.paths(params)
    if not flat:
        raise ValueError("init: the parameters hold no tensor; give a pytree with at least one")
    found: dict[int, int] = {}
    same = _tied(dict(named), ties)
    places = tuple(found.setdefault(same.get(id(x), id(x)), len(found)) for x in flat)
    first = [places.index(i) for i in range(len(found))]
    keys = [{_unit_of(named[p][0], units) for p, leaf in enumerate(places) if leaf == i} for i in range(len(found))]
    kinds: dict[Unit, int] = {Unit("", False, False): 0}
    leaves = []
    for i, p in enumerate(first):
        shape = _shape_of(*named[p])
        path = tree.Path(*(named[q][0] for q, leaf in enumerate(places) if leaf == i))
        name = keys[i].pop() if len(keys[i]) == 1 else ""  # a leaf tied across units is gathered with the rest
        unit = kinds.setdefault(Unit(name, bool(name), frozen(path)), len(kinds))
        leaves.append(Leaf(path, shape, unit, cuts(path, shape, rules)))
    for u in units:
        if not any(k.name.startswith(u) for k in kinds):
            raise ValueError(
                f"value_and_grad: units={u!r} names no list of blocks among the parameters; "
                f"paths begin with {sorted({n.split('/')[0] for n, _ in named})[:8]}"
            )
    values = [flat[p] for p in first]

    def read(i: int, cut: tuple[slice, ...]) -> Tensor:
        x = values[i]
        if isinstance(x, Fill):
            return x.part(cut)
        if x.is_meta and device.type != "meta":
            raise ValueError(
                f"init: parameter {leaves[i].path!r} is on the meta device and has no values; give what fz.init or"
                " fz.from_pretrained returned for it"
            )
        found: Tensor = x.detach()[cut]
        return found

    return Lazy(Structure(treedef, places, tuple(leaves), tuple(kinds)), read, device)


def _shape_of(path: str, x: Any) -> tuple[int, ...]:
    """The shape of one parameter, or why it is none."""
    if not isinstance(x, (Tensor, Fill)) or not x.dtype.is_floating_point:
        what = f"a {x.dtype} tensor" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(
            f"init: parameter {path!r} is {what}; parameters are floating tensors, "
            "other values go into the batch or the loss function"
        )
    return tuple(x.shape)


def _tied(named: dict[str, Any], ties: Sequence[tuple[str, str]]) -> dict[int, int]:
    """Of leaves that are tied by name: whose place each takes, by id.

    Raises:
      ValueError: they differ, so that one of the values would be lost.
    """
    out: dict[int, int] = {}
    for second, first in ties:
        a, b = named.get(first), named.get(second)
        if a is None or b is None or a is b:
            continue
        apart = getattr(a, "shape", 0) != getattr(b, "shape", 1)
        real = [x for x in (a, b) if isinstance(x, Tensor) and not x.is_meta]
        if apart or len(real) == 2 and not torch.equal(a, b.to(a.device)):
            raise ValueError(
                f"init: {first!r} and {second!r} are one parameter of the module, but here they differ; "
                "give both the same values"
            )
        out[id(b)] = out.get(id(a), id(a))
    return out


def all_find(patterns: Sequence[tuple[str, str]], rules: dict[str, Rules], structure: Structure) -> None:
    """Refuse a regex that finds no parameter: what it should have changed would go on as if it were not there.

    Args:
      patterns: (who, regex); those of the rules come by themselves.
    """
    paths = [leaf.path for leaf in structure.leaves]
    for who, regex in (
        *patterns,
        *(
            (f"shard({axis!r}, rules=...)", regex)
            for axis, (pairs, _) in rules.items()
            if not callable(pairs)
            for regex, _ in pairs
        ),
    ):
        why = tree.unmatched(regex, paths)
        if why:
            raise ValueError(f"{who}: {why}; correct it, or leave it out")


def _unit_of(path: str, units: Sequence[str]) -> str:
    """'blocks/3' for 'blocks/3/w' under the unit 'blocks'; also with dots, as modules name their parameters."""
    for u in units:
        match = re.match(re.escape(u) + r"[/.][^/.]+", path)
        if match:
            return match.group()
    return ""
