"""Who writes what: every leaf is one logical array cut into chunks, every chunk has one writer, and the bytes are dealt
evenly.

A chunk is a full part of a rank, or a piece of it of at most 4 MiB: readers fetch whole chunks. Where cuts of nested
brackets do not divide, some rows of a chunk lie with a neighbour, who sends them to the writer. Equal parts (replicas)
are dealt by bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import ceil, prod
from typing import Any, NamedTuple

from funczero.checkpoint.names import Part
from funczero.layout.where import Where

CAP = 4 << 20  # bytes of a chunk: small enough to be decoded in a cache, large enough to count little

Coords = Mapping[str, tuple[int, int]]  # mesh axis -> (size, a rank's index)


class Box(NamedTuple):
    """A part of an array."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def meet(self, other: Box) -> Box:
        """What lies in both; a dim of 0 where nothing does."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = (min(a + n, b + m) for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True))
        return Box(start, tuple(max(0, e - a) for a, e in zip(start, stop, strict=True)))

    def slices(self, origin: tuple[int, ...] | None = None) -> tuple[slice, ...]:
        """As an index, from another origin if one is given."""
        at = self.start if origin is None else tuple(a - o for a, o in zip(self.start, origin, strict=True))
        return tuple(slice(a, a + n) for a, n in zip(at, self.shape, strict=True))


class Piece(NamedTuple):
    """What one rank gives to a chunk."""

    name: str
    key: tuple[int, ...]  # of the chunk
    box: Box
    holder: int
    writer: int


class Deal(NamedTuple):
    """A rank's share of a save."""

    chunks: dict[str, tuple[int, ...]]  # every leaf's chunk shape
    pieces: list[Piece]  # that this rank holds or writes
    boxes: dict[str, Box]  # this rank's part of every leaf


def chunk_shape(block: tuple[int, ...], shape: tuple[int, ...], itemsize: int, cap: int = CAP) -> tuple[int, ...]:
    """The chunk of an array whose full parts are `block`: the block, or a piece of it of at most `cap` bytes.

    A dim that ranks cut is halved only into equal pieces, so that chunks keep to ranks; where no dim can be, it is cut
    unevenly.

    >>> at_most = lambda cap: chunk_shape((6, 4), (12, 4), 4, cap=cap)
    >>> chunk_shape((6, 4), (12, 4), 4), at_most(48), chunk_shape((7, 4), (14, 4), 4, cap=60)
    ((6, 4), (3, 4), (7, 2))
    """
    chunk = [max(1, n) for n in block]
    while (over := ceil(prod(chunk) * itemsize / cap)) > 1:
        even = {d: q for d, n in enumerate(chunk) if (q := _divisor(n, over)) and block[d] != shape[d]}
        free = [d for d, n in enumerate(chunk) if n > 1 and block[d] == shape[d]]
        d = next(iter(even), free[0] if free else max(range(len(chunk)), key=lambda d: chunk[d]))
        chunk[d] = chunk[d] // even[d] if d in even else ceil(chunk[d] / min(over, chunk[d]))
    return tuple(chunk)


def _divisor(n: int, least: int) -> int:
    """A divisor of n that is at least `least` and at most twice that; 0 where there is none."""
    return next((q for q in range(least, min(n, 2 * least) + 1) if n % q == 0), 0)


def deal(parts: dict[str, Part], ranks: list[Coords], rank: int) -> Deal:
    """The pieces of this rank; every rank comes to the same deal from the same coordinates (what rank 0 alone knows
    of comes last).
    """
    places: dict[tuple[Any, ...], list[Where]] = {}
    load = [0] * len(ranks)
    out = Deal({}, [], {})
    for name, part in parts.items():
        boxes, block = _boxes(part, ranks, places)
        itemsize = part.value.element_size()
        chunk = out.chunks[name] = chunk_shape(block, part.shape, itemsize)
        out.boxes[name] = boxes[rank]
        holders: dict[Box, list[int]] = {}
        for r, box in enumerate(boxes):
            if prod(box.shape) and (r == 0 or not part.first):
                holders.setdefault(box, []).append(r)
        for key, pieces in sorted(_meetings(list(holders), chunk).items()):
            pieces.sort(key=lambda p: (-prod(p[0].shape), p[0].start))
            writer = min(holders[pieces[0][1]], key=lambda r: (load[r], r))
            load[writer] += sum(prod(p.shape) for p, _ in pieces) * itemsize
            for box, whole in pieces:
                holder = writer if writer in holders[whole] else holders[whole][0]
                if rank in (holder, writer):
                    out.pieces.append(Piece(name, key, box, holder, writer))
    return out


def _boxes(
    part: Part, ranks: list[Coords], places: dict[tuple[Any, ...], list[Where]]
) -> tuple[list[Box], tuple[int, ...]]:
    """Every rank's part of a leaf, and the shape of a full one."""
    if part.own:
        row = (1, *part.shape[1:])
        return [Box((r,) + (0,) * (len(row) - 1), row) for r in range(len(ranks))], row
    if part.where is None:
        return [Box((0,) * len(part.shape), part.shape)] * len(ranks), part.shape
    axes, terms = part.where.axes, tuple(a for a, _, _ in part.where.terms)
    if (id(part.where.structure), axes) not in places:
        places[id(part.where.structure), axes] = [
            Where(part.where.structure, tuple((a, *c[a]) for a in axes)) for c in ranks
        ]
    slots = [where.slots[part.leaf] for where in places[id(part.where.structure), axes]]
    first, one = [tuple(c[a][1] for a in terms) for c in ranks], (1,) * len(terms)
    boxes = [Box((*at, *s.start), (*one, *s.shape)) for at, s in zip(first, slots, strict=True)]
    return boxes, (*one, *max((s.block for s in slots), key=prod))  # of an owner, where others hold nothing


def _meetings(boxes: list[Box], chunk: tuple[int, ...]) -> dict[tuple[int, ...], list[tuple[Box, Box]]]:
    """By chunk what each of these different parts holds of it, as (piece, part)."""
    found: dict[tuple[int, ...], list[tuple[Box, Box]]] = {}
    for box in boxes:
        for key in touched(box, chunk):
            found.setdefault(key, []).append(
                (box.meet(Box(tuple(k * c for k, c in zip(key, chunk, strict=True)), chunk)), box)
            )
    return found


def touched(box: Box, chunk: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The chunks that a part lies in."""
    if prod(box.shape):
        yield from product(
            *(range(a // c, (a + n - 1) // c + 1) for a, n, c in zip(box.start, box.shape, chunk, strict=True))
        )
