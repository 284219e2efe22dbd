"""Leaf coordinates: which part of every leaf a rank holds, and where it lies in that rank's buffers.

A rank holds ceil(rows / W) neighbouring rows of a leaf's dim (late ranks may hold none); a nested bracket cuts the outer shard
again. In memory each part lies in a zero-padded slot of 16-element multiples, at W = 1 too, and the slots of a unit are one
buffer: one gather a unit, elementwise kernels without tails, the same bits on any cut. In every spec there is only the logical array.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funczero.core import tree
from funczero.layout.mesh import P

GRAIN = 16  # elements; a slot is a multiple of it, so that no vector kernel meets a tail


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
    def whole(self) -> Where:
        """Every leaf whole."""
        return Where(self, ())


class Slot(NamedTuple):
    """Where one leaf's part lies."""

    offset: int
    length: int  # padded
    shape: tuple[int, ...]  # of the part
    start: tuple[int, ...]  # of the part in the leaf
    block: tuple[int, ...]  # shape of a full part; that of a late rank may be less


@dataclass(frozen=True)
class Where:
    """One rank's part of a structure: `coords` are (axis, size, index), outermost first."""

    structure: Structure
    coords: tuple[tuple[str, int, int], ...]

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes this is split over."""
        return tuple(a for a, _, _ in self.coords)

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What was worked out for this place: neighbours, and plans of what travels."""
        return {}

    def inner(self, axis: str, size: int, index: int) -> Where:
        """One step inwards."""
        key = (axis, size, index)
        if key not in self.memo:
            self.memo[key] = Where(self.structure, (*self.coords, key))
        return self.memo[key]

    @cached_property
    def outer(self) -> Where:
        """One step outwards."""
        return Where(self.structure, self.coords[:-1])

    def replicas(self, leaf: int) -> tuple[str, ...]:
        """Axes of this place that hold the same part of a leaf on all their ranks."""
        return tuple(a for a, n, _ in self.coords if n > 1 and self.structure.leaves[leaf].dim(a) is None)

    @cached_property
    def sections(self) -> tuple[tuple[tuple[tuple[str, ...], int, int], ...], ...]:
        """By unit: runs of slots with the same replicas, as (axes, start, stop); what is cut over all axes comes first."""
        out = []
        for members in self.structure.members:
            kinds = sorted({self.replicas(i) for i in members}, key=lambda axes: (len(axes), axes))
            spans = [(k, [self.slots[i] for i in members if self.replicas(i) == k]) for k in kinds]
            out.append(tuple((k, min(s.offset for s in ss), max(s.offset + s.length for s in ss)) for k, ss in spans))
        return tuple(out)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Elements of every unit's buffer, the same on every rank."""
        return tuple(max((self.slots[i].offset + self.slots[i].length for i in m), default=0) for m in self.structure.members)

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
        start, stop, per = [0] * len(leaf.shape), list(leaf.shape), list(leaf.shape)
        for axis, size, index in self.coords:
            d = leaf.dim(axis)
            if d is not None:
                per[d] = -(-per[d] // size)
                start[d], stop[d] = min(start[d] + index * per[d], stop[d]), min(start[d] + (index + 1) * per[d], stop[d])
        shape = tuple(b - a for a, b in zip(start, stop, strict=True))
        return Slot(offset, -(-prod(per) // GRAIN) * GRAIN, shape, tuple(start), tuple(per))

    @cached_property
    def gaps(self) -> tuple[bool, ...]:
        """By unit: does its buffer hold padding?"""
        return tuple(any(prod(self.slots[i].shape) != self.slots[i].length for i in m) for m in self.structure.members)

    @cached_property
    def _cuts(self) -> tuple[tuple[list[int], list[int]], ...]:
        """By unit: sizes that split its buffer into parts and padding, and which pieces are the members' parts, in their order."""
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
        sizes, pieces = self._cuts[unit]
        parts = buffer.split_with_sizes(sizes)
        return [parts[p].view(self.slots[i].shape) for p, i in zip(pieces, self.structure.members[unit], strict=True)]

    def zeros(self, dtype: torch.dtype, device: torch.device, frozen: bool = True) -> Slots:
        """All-zero buffers; with frozen=False those of frozen units are empty."""
        units = self.structure.units
        return Slots(tuple(torch.zeros(n if frozen or not u.frozen else 0, dtype=dtype, device=device) for n, u in zip(self.lengths, units, strict=True)), self)

    def pack(self, leaves: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> Slots:
        """Leaves of this place copied into buffers; units of None (frozen) are empty, a None among others is zero."""
        buffers = []
        for u, members in enumerate(self.structure.members):
            mine = [leaves[i] for i in members]
            if all(x is None for x in mine):
                frozen = self.structure.units[u].frozen
                buffers.append(torch.zeros(0 if frozen else self.lengths[u], dtype=dtype, device=device))
                continue
            make = torch.zeros if self.gaps[u] or any(x is None for x in mine) else torch.empty
            buffer = make(self.lengths[u], dtype=dtype, device=device)
            pairs = [(v, x) for v, x in zip(self.views(u, buffer), mine, strict=True) if x is not None and x.numel()]
            if pairs:
                torch._foreach_copy_([v for v, _ in pairs], [x for _, x in pairs])
            buffers.append(buffer)
        return Slots(tuple(buffers), self)

    def spec(self, leaf: int) -> P:
        """The PartitionSpec of one leaf's part here."""
        info = self.structure.leaves[leaf]
        names = [tuple(a for a in self.axes if info.dim(a) == d) for d in range(len(info.shape))]
        entries: list[Any] = [None if not n else n[0] if len(n) == 1 else n for n in names]
        while entries and entries[-1] is None:
            entries.pop()
        return P(*entries)


for _static in (Structure, Where):
    pytree.register_constant(_static)


class Slots(NamedTuple):
    """A tree of parameters as this rank holds it: one buffer a unit, and where its leaves lie. A pytree whose leaves are the buffers."""

    buffers: tuple[Tensor, ...]
    where: Where

    def leaves(self) -> list[Tensor | None]:
        """This rank's part of every leaf, as views in their logical shapes; None for what a gradient does not have (frozen)."""
        out: list[Tensor | None] = [None] * len(self.where.structure.leaves)
        for u, (buffer, n) in enumerate(zip(self.buffers, self.where.lengths, strict=True)):
            if buffer.numel() == n:
                for i, x in zip(self.where.structure.members[u], self.where.views(u, buffer), strict=True):
                    out[i] = x
        return out

    def tree(self) -> Any:
        """This rank's parts as the tree the user gave; what a gradient does not have (frozen) is an empty tensor."""
        return self.where.structure.unflatten([self.buffers[0].new_empty(0) if x is None else x for x in self.leaves()])

    def map(self, fn: Callable[..., Tensor], *others: Slots) -> Slots:
        """fn on buffers; padding must stay zero."""
        return Slots(tuple(fn(*b) for b in zip(self.buffers, *(o.buffers for o in others), strict=True)), self.where)

    def to(self, dtype: torch.dtype) -> Slots:
        """Cast; the same memory where nothing changes."""
        return self if all(b.dtype == dtype for b in self.buffers) else self.map(lambda b: b.to(dtype))

    def trainable(self) -> Slots:
        """Without the frozen units' values: what gradients and moments look like."""
        frozen = self.where.structure.units
        return Slots(tuple(b[:0] if u.frozen else b for b, u in zip(self.buffers, frozen, strict=True)), self.where)


@dataclass(frozen=True, eq=False)
class Fill:
    """A parameter that is not there yet: its shape, its dtype, and how to draw the whole leaf (see fz.init)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[..., Tensor]


class Lazy(NamedTuple):
    """Parameters that are read part by part: `read(leaf, slices)` returns that part of a leaf. Nothing whole is ever built here."""

    structure: Structure
    read: Callable[[int, tuple[slice, ...]], Tensor]
    device: torch.device

    def at(self, coords: tuple[tuple[str, int, int], ...], dtype: torch.dtype) -> Slots:
        """This rank's part as Slots of one dtype."""
        where = Where(self.structure, coords)
        out = where.zeros(dtype, self.device)
        for i, x in enumerate(out.leaves()):
            slot = where.slots[i]
            if x is not None and x.numel():
                x.copy_(self.read(i, tuple(slice(a, a + n) for a, n in zip(slot.start, slot.shape, strict=True))))
        return out


def lazy(
    params: Any,
    units: Sequence[str],
    rules: dict[str, Rules],
    frozen: Callable[[str], bool],
    device: torch.device,
    ties: Sequence[tuple[str, str]] = (),
) -> Lazy:
    """Whole parameters as lazy leaves: finds ties by identity and by name, units by path, and the dim that every bracket cuts.

    Args:
      frozen: asked once a leaf, with a tree.Path of all its names.
      ties: (second name, first name) of leaves that are one, though a tree may hold two tensors.

    Raises:
      TypeError, ValueError: a leaf is no floating tensor, a unit is not there, a rule cannot hold; with the leaf's path.
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
        path, x = named[p]
        if not isinstance(x, (Tensor, Fill)) or not x.dtype.is_floating_point:
            what = f"a {x.dtype} tensor" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise TypeError(f"init: parameter {path!r} is {what}; parameters are floating tensors, other values go into the batch or the loss function")
        path = tree.Path(*(named[q][0] for q, leaf in enumerate(places) if leaf == i))
        name = keys[i].pop() if len(keys[i]) == 1 else ""  # a leaf tied across units is gathered with the rest
        unit = kinds.setdefault(Unit(name, bool(name), frozen(path)), len(kinds))
        leaves.append(Leaf(path, tuple(x.shape), unit, _dims(path, tuple(x.shape), rules)))
    for u in units:
        if not any(k.name.startswith(u) for k in kinds):
            raise ValueError(f"value_and_grad: units={u!r} names no list of blocks among the parameters; paths begin with {sorted({n.split('/')[0] for n, _ in named})[:8]}")
    values = [flat[p] for p in first]

    def read(i: int, cut: tuple[slice, ...]) -> Tensor:
        x = values[i]
        return (x.make() if isinstance(x, Fill) else x.detach())[cut]

    return Lazy(Structure(treedef, places, tuple(leaves), tuple(kinds)), read, device)


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
            raise ValueError(f"init: {first!r} and {second!r} are one parameter of the module, but here they differ; give both the same values")
        out[id(b)] = out.get(id(a), id(a))
    return out


def all_find(patterns: Sequence[tuple[str, str]], rules: dict[str, Rules], structure: Structure) -> None:
    """Refuse a regex that finds no parameter: what it should have changed would go on as if it were not there.

    Args:
      patterns: (who, regex); those of the rules come by themselves.
    """
    paths = [leaf.path for leaf in structure.leaves]
    for who, regex in (*patterns, *((f"shard({axis!r}, rules=...)", regex) for axis, (pairs, _) in rules.items() for regex, _ in pairs)):
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


def _dims(path: str, shape: tuple[int, ...], rules: dict[str, Rules]) -> tuple[tuple[str, int | None], ...]:
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
