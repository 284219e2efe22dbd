"""The values of a rank's pieces while they are written: copied into memory that is kept, or where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.checkpoint.layout import Deal, Piece, deal
from funczero.checkpoint.memory import give_back, nbytes, room
from funczero.checkpoint.names import Names

PASSED = 32 << 20  # bytes that go by until memory that is not used is given back


class Held(NamedTuple):
    """A piece that this rank holds."""

    piece: Piece
    values: Tensor


class Staging:
    """Host memory that is kept from save to save, and the deal of a state of the same form."""

    def __init__(self) -> None:
        self._deal: tuple[Any, Deal] | None = None
        self._arena = torch.empty(0, dtype=torch.uint8)

    def dealt(self, found: Names, coords: list[Any], rank: int) -> Deal:
        """This rank's pieces; the same as last time for a state of the same form."""
        form = (coords, [(n, p.shape, p.value.dtype, p.where) for n, p in found.parts.items()])
        if self._deal is None or self._deal[0] != form:
            self._deal = (form, deal(found.parts, [{a: tuple(c) for a, c in r.items()} for r in coords], rank))
        return self._deal[1]

    def copied(self, found: Names, own: Deal, rank: int) -> list[Held]:
        """The values of this rank's pieces, in host memory that is kept from save to save."""
        held = [p for p in own.pieces if p.holder == rank]
        sizes = [-(-(prod(p.box.shape) * found.parts[p.name].value.element_size()) // 64) * 64 for p in held]
        pinned = any(x.value.device.type == "cuda" for x in found.parts.values())
        if self._arena.numel() < sum(sizes):
            memory = room(sum(sizes))
            self._arena = memory.pin_memory() if pinned else memory
        out, sources, at = [], [], 0
        for piece, size in zip(held, sizes, strict=True):
            source = found.parts[piece.name].value.detach()[piece.box.slices(own.boxes[piece.name].start)]
            n = nbytes(source)
            out.append(Held(piece, self._arena[at : at + n].view(source.dtype).view(source.shape)))
            sources.append(source)
            at += size
        if out:
            torch._foreach_copy_([x.values for x in out], sources)
        return out


@dataclass(frozen=True)
class Values:
    """Pieces of leaves of one process, where they lie, or made as they are gone through: leaf by leaf, or, of those
    whose rows can be had without the others, piece by piece.
    """

    found: Names
    own: Deal
    read: Mapping[str, Callable[[], Tensor]]
    rows: Mapping[str, Callable[[int, int], Tensor]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Held]:
        passed = 0
        for name, pieces in groupby(self.own.pieces, key=lambda p: p.name):
            if name in self.rows:
                for p in pieces:
                    x = self._part(p)
                    passed += nbytes(x)
                    yield Held(p, x)
                    del x
                    if passed > PASSED:  # tensorstore copies what it writes, in threads whose memory malloc keeps apart
                        give_back()
                        passed = 0
                continue
            x = (self.read[name]() if name in self.read else self.found.parts[name].value).detach().contiguous()
            yield from (Held(p, x[p.box.slices()]) for p in pieces)
            del x  # before the next is made

    def _part(self, piece: Piece) -> Tensor:
        first, *others = piece.box.slices()
        return self.rows[piece.name](first.start, first.stop)[(slice(None), *others)].contiguous()
