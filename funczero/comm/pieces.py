"""Where the parts of a unit's leaves lie on the wire [W, n] of one axis, and how much of a buffer travels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from funczero.comm.wire import Lengths
from funczero.layout.cut import Cut, Rows
from funczero.layout.where import Slot, Where


class Share(NamedTuple):
    """Equal shares of a leaf in the rows of the first ranks: one copy, whatever their number."""

    ranks: int
    offset: int
    numel: int  # in one row
    dim: int  # that is cut
    shape: tuple[int, ...]  # of one share

    def pair(self, x: Tensor, wire: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Views of the leaf here and of the wire."""
        n, rows = self.shape[self.dim], wire.narrow(1, self.offset, self.numel)
        if self.ranks < wire.shape[0]:
            rows = rows.narrow(0, 0, self.ranks)
        if self.ranks * n < x.shape[self.dim]:
            x = x.narrow(self.dim, 0, self.ranks * n)
        if self.dim == 0:
            return x.reshape(self.ranks, self.numel), rows
        return x.unflatten(self.dim, (self.ranks, n)).movedim(self.dim, 0), rows.unflatten(1, self.shape)


class Everywhere(NamedTuple):
    """A leaf that the axis does not cut: it goes to every row of the wire, or comes from this rank's own buffer."""

    offset: int
    numel: int

    def pair(self, x: Tensor, wire: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Views of the leaf here and of the wire, or of `own`."""
        flat, rows = x.reshape(1, self.numel), wire if own is None else own.view(1, -1)
        return flat.expand(rows.shape[0], self.numel), rows.narrow(1, self.offset, self.numel)


class Stretch(NamedTuple):
    """One rank's part of a leaf, in that rank's row of the wire."""

    rank: int
    offset: int
    numel: int
    shape: tuple[int, ...]
    narrows: tuple[tuple[int, int, int], ...]  # dims in which it is less than what is here, with start and length

    def pair(self, x: Tensor, wire: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Views of the leaf here and of the wire."""
        for narrow in self.narrows:
            x = x.narrow(*narrow)
        return x, wire[self.rank, self.offset : self.offset + self.numel].view(self.shape)


Piece = Share | Everywhere | Stretch
Wire = tuple[Tensor, ...]  # the rows [W, n] of all ranks of an axis, in stretches that follow one another


def plan_of(where: Where, unit: int, axis: str, size: int) -> list[list[Piece]]:
    """By member of a unit: how its rows here lie on the wire [W, n] one step inwards. Worked out once.

    Of cuts in rows it needs no other rank's slots, so that it takes as long on a thousand ranks as on two.
    """
    key = (unit, axis, size)
    known: list[list[Piece]] | None = where.memo.get(key)
    if known is not None:
        return known
    first, plan = where.inner(axis, size, 0).slots, list[list[Piece]]()
    for i in where.structure.members[unit]:
        cut, here, offset = where.structure.leaves[i].cut(axis), where.slots[i], first[i].offset
        n = prod(here.shape)
        if n == 0:
            plan.append([])
        elif cut.replicated:
            plan.append([Everywhere(offset, n)])
        elif isinstance(cut, Rows):
            plan.append(_in_rows(cut.dim, offset, first[i].block, here))
        else:
            plan.append(_of_all(where, i, axis, size))
    where.memo[key] = plan
    return plan


def _in_rows(dim: int, offset: int, block: tuple[int, ...], here: Slot) -> list[Piece]:
    """Full parts of the first ranks, and what is left over for the one after them."""
    full, left = divmod(here.shape[dim], block[dim])
    each = (*here.shape[:dim], block[dim], *here.shape[dim + 1 :])
    out: list[Piece] = [Share(full, offset, prod(each), dim, each)] if full else []
    if left:
        shape = (*here.shape[:dim], left, *here.shape[dim + 1 :])
        narrows = ((dim, full * block[dim], left),) if full else ()
        out.append(Stretch(full, offset, prod(shape), shape, narrows))
    return out


def _of_all(where: Where, leaf: int, axis: str, size: int) -> list[Piece]:
    """The part of every rank, of a cut of which nothing else is known."""
    here, info = where.slots[leaf], where.structure.leaves[leaf]
    parts = [where.inner(axis, size, q).slots[leaf] for q in range(size)]
    offset = parts[0].offset
    even = all((p.offset, p.length) == (offset, parts[0].length) for p in parts)
    if sum(prod(p.shape) for p in parts) != prod(here.shape) or not even:
        raise ValueError(_uneven(info.path, info.cut(axis), axis, [p.shape for p in parts], here.shape))
    return [_stretch(q, offset, p, here) for q, p in enumerate(parts) if prod(p.shape)]


def padded(where: Where, unit: int, axis: str, size: int) -> bool:
    """Is there padding in any rank's row of a unit, one step inwards?"""
    key = ("padded", unit, axis, size)
    if key not in where.memo:
        where.memo[key] = any(_padded(where, i, axis, size) for i in where.structure.members[unit])
    found: bool = where.memo[key]
    return found


def _padded(where: Where, leaf: int, axis: str, size: int) -> bool:
    cut, n = where.structure.leaves[leaf].cut(axis), prod(where.slots[leaf].shape)
    if cut.replicated or isinstance(cut, Rows):  # rows of equal slots, whose parts are the leaf
        return n != where.inner(axis, size, 0).slots[leaf].length * (1 if cut.replicated else size)
    slots = [where.inner(axis, size, q).slots[leaf] for q in range(size)]
    return any(prod(x.shape) != x.length for x in slots)


def _uneven(path: str, cut: Cut, axis: str, parts: list[tuple[int, ...]], here: tuple[int, ...]) -> str:
    what = f"{cut!r} gives the ranks of {axis!r} parts of shapes {parts}"
    remedy = "a cut's blocks are equal and its parts are the leaf, once"
    return f"parameter {path!r}: {what}, which do not make up its {here}; {remedy}"


def _stretch(rank: int, offset: int, part: Slot, here: Slot) -> Stretch:
    dims = zip(part.start, here.start, part.shape, here.shape, strict=True)
    narrows = tuple((d, a - b, n) for d, (a, b, n, m) in enumerate(dims) if n != m)
    return Stretch(rank, offset, prod(part.shape), part.shape, narrows)


def pairs(
    plan: list[list[Piece]], leaves: Sequence[Tensor], wire: Tensor, own: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Matching views of leaves (here) and of the wire, to be copied in either direction."""
    both = [p.pair(x, wire, own) for pieces, x in zip(plan, leaves, strict=True) for p in pieces]
    return [here for here, _ in both], [there for _, there in both]


class Even(NamedTuple):
    """A unit all of whose leaves lie in equal shares in every row of the wire: one split finds them."""

    sizes: list[int]  # of what follows one another in a row: shares, and the padding between them
    shares: list[int]  # by member: which of these is its own
    numels: list[int]  # by member, in one row

    def row(self, leaves: Sequence[Tensor], size: int) -> list[Tensor]:
        """What stands side by side in the rows of a wire: leaves in equal shares [W, n], zeros between them."""
        own = {k: x.reshape(size, n) for k, n, x in zip(self.shares, self.numels, leaves, strict=True)}
        return [own[k] if k in own else leaves[0].new_zeros(size, n) for k, n in enumerate(self.sizes)]

    def pairs(self, leaves: Sequence[Tensor], wire: Wire) -> tuple[list[Tensor], list[Tensor]]:
        """As `pairs`; leaves may come flat."""
        size, first = sum(map(len, wire)), 0
        rows, here, there = [x.reshape(size, n) for x, n in zip(leaves, self.numels, strict=True)], [], []
        for stretch in wire:
            n = len(stretch)
            if n:
                parts = stretch.split_with_sizes(self.sizes, 1)
                here += rows if n == size else [x.narrow(0, first, n) for x in rows]
                there += [parts[k] for k in self.shares]
            first += n
        return here, there


def even_of(where: Where, unit: int, axis: str, size: int) -> Even | None:
    """The plan of a unit that is cut evenly, None of others. Worked out once."""
    key = ("even", unit, axis, size)
    if key not in where.memo:
        plan, inner = plan_of(where, unit, axis, size), where.inner(axis, size, 0)
        firsts = [pieces[0] for pieces in plan if len(pieces) == 1]
        shares = [p for p in firsts if isinstance(p, Share) and p.ranks == size and p.dim == 0]
        where.memo[key] = None
        if plan and len(shares) == len(plan):
            sizes, places = inner.cuts[unit]
            where.memo[key] = Even(sizes, places, [share.numel for share in shares])
    found: Even | None = where.memo[key]
    return found


def on_the_wire(
    where: Where, unit: int, axis: str, leaves: Sequence[Tensor], wire: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Matching views of a unit's leaves here and of the wire [W, n] to all ranks."""
    even = even_of(where, unit, axis, wire.shape[0])
    if even is not None:
        return even.pairs(leaves, (wire,))
    return pairs(plan_of(where, unit, axis, wire.shape[0]), leaves, wire, None)


def off_the_wire(
    where: Where, unit: int, axis: str, buffer: Tensor, wire: Wire, own: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Matching views of a unit's buffer here and of the wire from all ranks; what the axis does not cut comes from
    `own`.
    """
    size = sum(map(len, wire))
    even = even_of(where, unit, axis, size)
    if even is not None:
        return even.pairs(where.parts(unit, buffer), wire)
    rows = wire[0] if len(wire) == 1 else torch.cat(wire)
    return pairs(plan_of(where, unit, axis, size), where.views(unit, buffer), rows, own)


def travels(inner: Where, unit: int, axis: str) -> int:
    """Elements of a buffer that a gather must send: up to the last slot that the axis cuts."""
    key = ("travels", unit, axis)
    if key not in inner.memo:
        leaves, members = inner.structure.leaves, inner.structure.members[unit]
        cut = [inner.slots[i] for i in members if not leaves[i].cut(axis).replicated]
        inner.memo[key] = max((slot.offset + slot.length for slot in cut), default=0)
    n: int = inner.memo[key]
    return n


def slot_lengths(inner: Where, unit: int, n: int) -> Lengths:
    """The slots of a buffer's first n elements, in their order there."""
    key = ("slot lengths", unit, n)
    if key not in inner.memo:
        found = sorted((inner.slots[i] for i in inner.structure.members[unit]), key=lambda s: s.offset)
        inner.memo[key] = tuple(s.length for s in found if s.length and s.offset < n)
    lengths: Lengths = inner.memo[key]
    return lengths
