"""Frozen parameters that rest in fewer bits than a forward reads them in, and are widened as it opens their unit.

Law: what a forward reads is a function of the leaf alone, on any mesh and at any stage: a row of a matrix is coded by
itself, in blocks that begin anew at every row, and rows are what is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from funczero.comm.units import gather_units
from funczero.comm.wire import Key
from funczero.core.types import Env
from funczero.gradients.tape import Tape
from funczero.kernels.registry import kernel
from funczero.layout.lazy import Lazy
from funczero.layout.mesh import Coords
from funczero.layout.slots import Slots
from funczero.layout.structure import Structure
from funczero.layout.where import Where

STORAGES = "int8", "bfloat16"
BLOCK = 256  # values that share a scale


class Stored(NamedTuple):
    """A rank's part of frozen parameters, as they rest."""

    plain: Where  # the part itself: how its leaves lie once they are wide
    rest: Slots  # leaves that have no codes, and of the others the largest magnitude of every block
    codes: Slots | None  # uint8: of int8's bits; leaves without codes are empty there
    coded: tuple[bool, ...]  # by leaf
    dtype: torch.dtype  # in which a forward reads them

    @property
    def nbytes(self) -> int:
        """Bytes that rest on this rank."""
        return sum(b.nbytes for slots in (self.rest, self.codes) if slots is not None for b in slots.buffers)

    def leaf(self, i: int, codes: Tensor | None, rest: Tensor) -> Tensor:
        """A leaf's values, or those of some of its rows, from what rests of them."""
        if codes is None or not self.coded[i]:
            return rest.to(self.dtype)
        width = prod(codes.shape[1:])
        tops = rest.reshape(-1).to(torch.promote_types(rest.dtype, torch.float32))
        read = kernel("block_quantise", codes.device).dequantise
        flat: Tensor = read(codes.reshape(-1), tops, *_blocks(len(codes), width), "int8", self.dtype)
        return flat.view(codes.shape)


def stored(
    own: Lazy, structure: Structure, coords: Coords, dtype: torch.dtype, storage: str, keep: Callable[[str], bool]
) -> Stored:
    """Reads this rank's part of whole parameters, leaf by leaf, into the form in which it rests.

    Args:
      structure: own's, of leaves that are all frozen.
      dtype: in which a forward reads them.
      storage: "int8": matrices, and whatever else has two dims or more, in codes of 8 bits; vectors stay in `dtype`.
        "bfloat16": everything is rounded to it.
      keep: paths of leaves that have no codes.

    Raises:
      ValueError: a block to be coded holds inf or nan.
    """
    plain = Where(structure, coords)
    if storage != "int8":
        return Stored(plain, own.at(coords, torch.bfloat16)._replace(where=plain), None, (), dtype)
    coded = tuple(len(x.shape) > 1 and prod(x.shape) > 0 and not keep(x.path) for x in structure.leaves)
    scales = [
        (x.shape[0], sum(-(-n // block) for n in lengths)) if yes else x.shape
        for x, yes in zip(structure.leaves, coded, strict=True)
        for lengths, block in (_blocks(1, prod(x.shape[1:])),)
    ]
    shapes = [x.shape if yes else (0,) for x, yes in zip(structure.leaves, coded, strict=True)]
    rest, codes = (
        Slots.zeros(Where(_shaped(structure, each), coords), kind, own.device)
        for each, kind in ((scales, dtype), (shapes, torch.uint8))
    )
    views = zip(rest.leaves(), codes.leaves(), strict=True)
    for i, (r, c) in enumerate(views):
        place = plain.slots[i].place
        if r is None or c is None or not r.numel():
            continue
        x = own.read(i, place).to(own.device, dtype)
        if not coded[i]:
            r.copy_(x)
            continue
        write = kernel("block_quantise", own.device).quantise
        found, tops = write(x.contiguous().view(-1), *_blocks(len(x), prod(x.shape[1:])), "int8")
        if not bool(torch.isfinite(tops).all()):
            raise ValueError(f"frozen: {structure.leaves[i].path!r} holds inf or nan, which no code of int8 stands for")
        c.copy_(found.view(c.shape))
        r.copy_(tops.view(r.shape))
    return Stored(plain, rest, codes, coded, dtype)


def _blocks(rows: int, width: int) -> tuple[tuple[int, ...], int]:
    """Lengths and block of so many rows, each of which begins a new block."""
    block = min(BLOCK, max(1, width))
    return ((rows * width,) if width % block == 0 else (width,) * rows), block


def _shaped(structure: Structure, shapes: list[tuple[int, ...]]) -> Structure:
    """The structure with leaves of other shapes."""
    leaves = tuple(replace(x, shape=tuple(s)) for x, s in zip(structure.leaves, shapes, strict=True))
    return replace(structure, leaves=leaves)


class StoredTape(Tape):
    """A tape whose units are made as they are opened: gathered as they rest, and widened."""

    def __init__(self, stored: Stored, env: Env, key: Key) -> None:
        """stored: what is opened; env: where it is gathered; key: of wires, none of which draws here."""
        empty = tuple(torch.empty(0, dtype=stored.dtype, device=env.mesh.device) for _ in stored.plain.lengths)
        super().__init__(Slots(empty, stored.plain), (), env, False, True, key)
        self.stored, self.seam, self.rest = stored, True, self.rest or ("storage",)

    def launch(self, *group: int) -> None:
        """Nothing is started ahead: nobody would wait for it where a loss stops early."""

    def ahead(self, *group: int) -> None:
        """As launch."""

    def take(self, unit: int) -> Tensor:
        """A unit's whole buffer, wide."""
        for other in tuple(self.kept):
            self.drop(other)
        self.count(1)
        if unit in self.open:
            return self.open[unit]
        own = self.stored
        rest = self._arrived(own.rest, unit)
        if own.codes is None:
            return rest.to(own.dtype)
        codes = self._arrived(own.codes, unit)
        parts = Where.whole(own.codes.where.structure).views(unit, codes)
        others = Where.whole(own.rest.where.structure).views(unit, rest)
        out = torch.zeros(self.whole.lengths[unit], dtype=own.dtype, device=rest.device)
        members = self.whole.structure.members[unit]
        for i, x, c, r in zip(members, self.whole.views(unit, out), parts, others, strict=True):
            x.copy_(own.leaf(i, c, r))
        return out

    def _arrived(self, slots: Slots, unit: int) -> Tensor:
        where, buffer = slots.where, slots.buffers[unit]
        for axis in reversed(where.axes):
            where = where.outer
            if slots.where.lengths[unit]:
                (buffer,) = gather_units(where, (unit,), self.env.edges[axis], self.env.mesh, (buffer,), self.at).wait()
        return buffer
