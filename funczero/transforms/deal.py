"""Who computes which leaf where an optimizer needs whole ones, and states that lie with the leaf's owner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.optimizer import Across
from funczero.core.types import Tree
from funczero.layout.cut import Cut, Extent, Rows, Whole
from funczero.layout.slots import Slots
from funczero.layout.structure import Structure
from funczero.layout.where import Where
from funczero.transforms.partition import OTHERS, SUBSETS, holds

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Owned:
    """One rank of an axis has all of it, and the others nothing: no slot either, so it is for states alone.

    >>> [Owned(1).part(Extent((0,), (5,), (5,)), 2, i).shape for i in range(2)]
    [(0,), (5,)]
    """

    owner: int
    dim = None
    replicated = False

    def part(self, of: Extent, size: int, index: int) -> Extent:
        """All of it, or nothing."""
        return of if index == self.owner else of._replace(shape=(0,) * len(of.shape), block=(0,) * len(of.block))


class Seat(NamedTuple):
    """Where a leaf is computed."""

    axes: tuple[str, ...]  # over which its rows travel, outermost first; () where it stays
    owner: int | None  # among the ranks along those axes; None: each of them computes it


class Deal(NamedTuple):
    """The leaves of one optimizer, the dearest first."""

    seats: dict[int, Seat]
    loads: dict[tuple[str, ...], list[float]]  # cost by rank along some axes


def trained(where: Where, held: tuple[int, ...] | None) -> tuple[int, ...]:
    """The numbers of the leaves that an optimizer moves; those without values anywhere are left out."""
    leaves = range(len(where.structure.leaves)) if held is None else held
    return tuple(
        i for i in leaves if not where.structure.frozen(i) and holds(where.structure, i) and where.slots[i].length
    )


def dealt(where: Where, held: tuple[int, ...] | None, across: Across) -> Deal:
    """Who computes which leaf: the dearest first, each to the rank that has least so far.

    Law: a function of shapes, cuts and sizes, so that all ranks come to the same one.
    """
    leaves = trained(where, held)
    key = ("dealt", leaves, across.cost, across.dims, across.small)
    if key not in where.memo:
        where.memo[key] = _dealt(where, leaves, across)
    found: Deal = where.memo[key]
    return found


def _dealt(where: Where, leaves: tuple[int, ...], across: Across) -> Deal:
    sizes, deal = {a: n for a, n, _ in where.coords}, Deal({}, {})
    shapes = {i: where.structure.leaves[i].shape for i in leaves}
    for i in sorted(leaves, key=lambda i: (-across.cost(shapes[i]), i)):
        axes, owner = travels(where, i, across.dims), None
        if axes and prod(shapes[i]) >= across.small:
            loads = deal.loads.setdefault(axes, [0.0] * prod(sizes[a] for a in axes))
            owner = loads.index(min(loads))
            loads[owner] += across.cost(shapes[i])
        deal.seats[i] = Seat(axes, owner)
    return deal


def travels(where: Where, leaf: int, dims: Callable[[Shape], int]) -> tuple[str, ...]:
    """The axes over which a leaf's rows must travel so that its last dims are whole."""
    info = where.structure.leaves[leaf]
    batch = len(info.shape) - dims(info.shape)
    return tuple(a for a, n, _ in where.coords if n > 1 and _parts(info.cut(a), batch))


def _parts(cut: Cut, batch: int) -> bool:
    """Does a cut go through what is computed as one?"""
    return not cut.replicated and not (isinstance(cut, Rows) and cut.dim < batch)


def extents(where: Where, leaf: int, axes: tuple[str, ...]) -> tuple[Extent, list[Extent]]:
    """What is whole once a leaf's rows have travelled over some axes, and the part of it of every rank along them."""
    key = ("extents", leaf, axes)
    if key not in where.memo:
        info = where.structure.leaves[leaf]
        sizes = {a: n for a, n, _ in where.coords}

        def part(index: dict[str, int], over: Sequence[str]) -> Extent:
            out = Extent((0,) * len(info.shape), info.shape, info.shape)
            for a, n, own in where.coords:
                out = info.cut(a).part(out, n, index.get(a, own)) if a in over else out
            return out

        places = product(*(range(sizes[a]) for a in axes))
        every = [part(dict(zip(axes, place, strict=True)), where.axes) for place in places]
        where.memo[key] = part({}, [a for a in where.axes if a not in axes]), every
    found: tuple[Extent, list[Extent]] = where.memo[key]
    return found


def slices(part: Extent, of: Extent) -> tuple[slice, ...]:
    """A part as an index into what it is a part of; of a part without values, nothing."""
    starts = [a - b if n else 0 for a, b, n in zip(part.start, of.start, part.shape, strict=True)]
    return tuple(slice(a, a + n) for a, n in zip(starts, part.shape, strict=True))


def told(where: Where, held: tuple[int, ...] | None, across: Across) -> str:
    """Who computes how much, and how many values travel, in words."""
    deal, words = dealt(where, held, across), list[str]()
    for axes, loads in deal.loads.items():
        mine = [i for i, seat in deal.seats.items() if seat.axes == axes and seat.owner is not None]
        away = sum(prod(where.slots[i].block) for i in mine) * (len(loads) - 1)
        words.append(
            f"{len(mine)} leaves are dealt among {len(loads)} ranks of {list(axes)}, of which the busiest has"
            f" {max(loads) / sum(loads):.0%} of the work, and {away:,} values travel each way"
        )
    every = sum(bool(seat.axes) and seat.owner is None for seat in deal.seats.values())
    here = sum(not seat.axes for seat in deal.seats.values())
    words += [f"{every} small ones are sent to all and computed by each"] * bool(every)
    return "; ".join(words + [f"{here} are whole where they lie"] * bool(here))


# --- states of owners -------------------------------------------------------------------------------------------------
def owned(
    name: str, params: Tree, across: Across, shape: Callable[[Shape], Shape | None], dtype: torch.dtype | None = None
) -> Tree:
    """A state of zeros that lies whole with each leaf's owner; a dict by path where the parameters are no Slots.

    Law: on disk every leaf is a whole array by its parameter's path, whoever owns it, so that another world reads it.

    Args:
      name: of the state, one for each of an optimizer.
      shape: shape of a leaf -> that of its state, with as many leading dims of a batch; None for a leaf without one.
      dtype: by default the parameters'.
    """
    if not isinstance(params, Slots):
        found = ((path, p, shape(tuple(p.shape))) for path, p in tree.paths(params) if p.numel())
        return {path: torch.zeros(s, dtype=dtype or p.dtype, device=p.device) for path, p, s in found if s is not None}
    where = placed(name, params.where, across, shape)
    return Slots.zeros(where, dtype or params.buffers[0].dtype, params.buffers[0].device, frozen=False)


def placed(name: str, where: Where, across: Across, shape: Callable[[Shape], Shape | None]) -> Where:
    """The place of such a state."""
    known: dict[Any, Where] = where.memo.setdefault(SUBSETS, {})
    key = (name, across.cost, across.dims, across.small, shape)
    if key not in known:
        full, deal, out = where.structure, dealt(where, None, across), []
        for i, leaf in enumerate(full.leaves):
            new = shape(leaf.shape) if i in deal.seats else None
            if new is None:
                out.append(leaf if full.frozen(i) else replace(leaf, unit=len(full.units)))
            else:
                out.append(replace(leaf, shape=new, cuts=_cuts(where, i, deal.seats[i])))
        units = (*full.units, OTHERS)
        known[key] = Where(Structure(full.treedef, full.places, tuple(out), units), where.coords, where.place)
    return known[key]


def _cuts(where: Where, leaf: int, seat: Seat) -> tuple[tuple[str, Cut], ...]:
    """How the state of a leaf is cut: it lies with the owner, or like the leaf along the dims of a batch."""
    info, left, place = where.structure.leaves[leaf], seat.owner, dict[str, int]()
    for a in reversed(seat.axes if left is not None else ()):
        assert left is not None
        left, place[a] = divmod(left, next(n for b, n, _ in where.coords if b == a))
    return tuple(
        (a, Owned(place[a]) if a in place else Whole() if a in seat.axes else info.cut(a)) for a, _, _ in where.coords
    )


def states_of(states: Sequence[Slots], leaf: int) -> list[Tensor]:
    """The owner's states of one leaf, as views in their shapes; those that the leaf does not have are left out."""
    out = []
    for s in states:
        info = s.where.structure.leaves[leaf]
        if not s.where.structure.units[info.unit].frozen:
            slot, n = s.where.slots[leaf], prod(s.where.slots[leaf].shape)
            out.append(s.buffers[info.unit].narrow(0, slot.offset, n).view(slot.shape))
    return out
