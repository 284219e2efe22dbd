"""Gradients as integers, which add in any order: the units they are counted in, and what one sum of them finds."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from funczero.kernels.grid.reference import BAD, HALF, OFFSET
from funczero.kernels.registry import kernel
from funczero.layout.slots import Slots
from funczero.layout.structure import Structure
from funczero.layout.where import Where

FAR = 900  # shifts stay within this: 2 ** 900 is a float64, and so is what it is multiplied with


class Grid:
    """The units of one update: a value of a leaf is counted in units of 2 ** -shift."""

    def __init__(self, exponents: Tensor, bits: int, cotangent: Tensor, structure: Structure) -> None:
        """Units for gradients of about 2 ** exponent, with `bits` bits each.

        Args:
          exponents: int64 [leaves], of gradients whose cotangent is one.
          cotangent: 0-d, of these gradients; the unit follows its power of two.
        """
        self.scale = torch.frexp(cotangent.detach().double())[1].to(torch.int64) - 1
        self.shifts = (bits - exponents - self.scale).clamp(-FAR, FAR)
        order, sizes = _by_unit(structure)
        self.by_unit = (self.shifts if order is None else self.shifts[order]).split(sizes)

    def wide(self, unit: int, codes: Tensor) -> bool:
        """May a unit hold values that need more than one integer? On an accelerator nobody asks, and it may."""
        return codes.device.type != "cpu" or any(_split(codes, self.by_unit[unit]))


def _by_unit(structure: Structure) -> tuple[list[int] | None, list[int]]:
    """The leaves in the order of units, None where that is their own, and how many each unit has. Worked out once."""
    key = "leaves by unit"
    if key not in structure.memo:
        order = [i for members in structure.members for i in members]
        own = order == list(range(len(order)))
        structure.memo[key] = None if own else order, [len(members) for members in structure.members]
    found: tuple[list[int] | None, list[int]] = structure.memo[key]
    return found


def _split(codes: Tensor, shifts: Tensor) -> list[bool]:
    """By leaf: is its largest value one that is split?"""
    both = zip(codes.tolist(), shifts.tolist(), strict=True)
    return [bool(code) and code - OFFSET + shift > HALF for code, shift in both]


class Tally:
    """What one sum finds while floats become integers: large parts apart, and how large the largest values are."""

    def __init__(self, grid: Grid) -> None:
        """Nothing was counted."""
        self.grid = grid
        self.where: Where | None = None  # the place at which floats become integers
        self.high: dict[int, Tensor] = {}  # by unit: multiples of 2 ** 46 units, where there are any
        self.codes: list[tuple[int, Tensor]] = []  # (unit, the codes of its members)

    def count(self, where: Where, unit: int, rows: Tensor, low: Tensor | None = None) -> Tensor:
        """The sum of a unit's rows [R, n] as integers, added to `low` in place; new ones without it."""
        self.where, bounds, shifts = where, bounds_of(where, unit), self.grid.by_unit[unit]
        if low is None:
            low = torch.zeros(rows.shape[-1], dtype=torch.int64, device=rows.device)
        grid = kernel("grid", rows.device)
        for row in rows.unbind() if rows.dim() > 1 else (rows,):
            codes = grid.to_grid_add(row, bounds, shifts, low)
            self.codes.append((unit, codes))
            if self.grid.wide(unit, codes):
                if unit not in self.high:
                    self.high[unit] = torch.zeros_like(low)
                grid.add_high(row, bounds, shifts, self.high[unit])
        return low

    def count_all(self, x: Slots, low: Slots | None = None) -> Slots:
        """All units of a tree; those without values (frozen) stay so."""
        to = [None] * len(x.buffers) if low is None else low.buffers
        both = enumerate(zip(x.buffers, to, strict=True))
        return Slots(tuple(self.count(x.where, u, b, t) if b.numel() else b.long() for u, (b, t) in both), x.where)

    def tops(self, structure: Structure) -> Tensor:
        """int64 [leaves]: the code of every leaf's largest value so far."""
        out = torch.zeros_like(self.grid.shifts)
        if self.codes:
            places = [i for unit, _ in self.codes for i in structure.members[unit]]
            index = torch.tensor(places, device=out.device)
            out.scatter_reduce_(0, index, torch.cat([codes for _, codes in self.codes]), "amax")
        return out

    def apart(self, where: Where) -> Slots:
        """The large parts, at the place of the count (`where`, if there was none); a unit without one has an empty
        buffer.
        """
        none = torch.zeros(0, dtype=torch.int64, device=self.grid.shifts.device)
        return Slots(tuple(self.high.get(u, none) for u in range(len(where.structure.units))), self.where or where)


def bounds_of(where: Where, unit: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of every member of a unit in its buffer, padding left out."""
    key = ("bounds", unit)
    if key not in where.memo:
        slots = [where.slots[i] for i in where.structure.members[unit]]
        where.memo[key] = tuple((s.offset, s.offset + prod(s.shape)) for s in slots)
    found: tuple[tuple[int, int], ...] = where.memo[key]
    return found


def values_of(low: Slots, high: Slots, grid: Grid, dtype: torch.dtype) -> Slots:
    """The values of integer sums, in dtype."""
    out, from_grid = [], kernel("grid", low.buffers[0].device).from_grid
    for u, (x, large) in enumerate(zip(low.buffers, high.buffers, strict=True)):
        more = large if large.numel() else None
        bounds = bounds_of(low.where, u)
        out.append(from_grid(x, more, bounds, grid.by_unit[u], dtype) if x.numel() else x.to(dtype))
    return Slots(tuple(out), low.where)


# --- codes that travel ------------------------------------------------------------------------------------------------
FIELDS, BITS = 5, 12  # codes in a word, and their bits: ranks write into words of their own, so that nothing carries


def packed(codes: Tensor, place: int, size: int) -> Tensor:
    """A rank's codes among those of all, as words to be added over the ranks: int64, flat."""
    words = -(-len(codes) // FIELDS)
    padded = torch.cat([codes, codes.new_zeros(words * FIELDS - len(codes))]).view(words, FIELDS)
    table = codes.new_zeros(size, words)
    table[place] = (padded << _places(codes)).sum(1)
    return table.view(-1)


def unpacked(flat: Tensor, size: int, leaves: int) -> Tensor:
    """The largest codes of all ranks, int64 [leaves]."""
    table = flat.view(size, -1, 1) >> _places(flat) & (1 << BITS) - 1
    return table.view(size, -1)[:, :leaves].amax(0)


def _places(like: Tensor) -> Tensor:
    return torch.arange(0, FIELDS * BITS, BITS, device=like.device)


def both(a: Slots, b: Slots) -> Slots:
    """The sum of large parts, of which a unit may have none."""
    pairs = zip(a.buffers, b.buffers, strict=True)
    return Slots(tuple(x + y if x.numel() and y.numel() else x if x.numel() else y for x, y in pairs), a.where)


def exponents_of(codes: Tensor, old: Tensor, grid: Grid) -> Tensor:
    """The exponents of an update's largest gradients, cotangent one; the old one where a leaf has none that counts."""
    return torch.where((codes > 0) & (codes < BAD), codes - OFFSET - grid.scale, old)


def units_of(codes: Tensor, structure: Structure, grid: Grid) -> list[int]:
    """The units in which some rank may have large parts."""
    wide = _split(codes, grid.shifts)
    return [u for u, members in enumerate(structure.members) if any(wide[i] for i in members)]
