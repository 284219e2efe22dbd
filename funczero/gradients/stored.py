"""Frozen parameters that rest in fewer bits than a forward reads them in, and are widened as it opens their unit.

Law: what a forward reads is a function of the leaf alone, on any mesh and at any stage: a row of a matrix is coded by
itself, in blocks that begin anew at every row, and rows are what is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.comm.units import Travelling, gather_units
from funczero.comm.wire import Key
from funczero.core.number import dtype_name
from funczero.core.types import Env
from funczero.gradients.arrivals import Group
from funczero.gradients.course import Course
from funczero.gradients.gathers import Gathers
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

    def leaves(self) -> list[tuple[Tensor, Tensor | None]]:
        """By leaf: what rests of it beside codes, and its codes, as views of this rank's part."""
        codes = [None] * len(self.plain.structure.leaves) if self.codes is None else self.codes.leaves()
        each = zip(self.rest.leaves(), codes, self.coded or [False] * len(codes), strict=True)
        return [(r, c if yes else None) for r, c, yes in each if r is not None]

    def gathered(self, unit: int, env: Env, key: Key = (0,)) -> tuple[Tensor, Tensor | None]:
        """A unit's two buffers, whole on every rank. A collective where they are cut."""
        rest = _gathered(self.rest, unit, env, key)
        return rest, None if self.codes is None else _gathered(self.codes, unit, env, key)

    def leaf(self, i: int, codes: Tensor | None, rest: Tensor) -> Tensor:
        """A leaf's values, or those of some of its rows, from what rests of them."""
        if codes is None or not self.coded[i]:
            return rest.to(self.dtype)
        width = prod(codes.shape[1:])
        tops = rest.reshape(-1).to(torch.promote_types(rest.dtype, torch.float32))
        read = kernel("block_quantise", codes.device).dequantise
        flat: Tensor = read(codes.reshape(-1), tops, *blocks(len(codes), width), "int8", self.dtype)
        return flat.view(codes.shape)


def empty(structure: Structure, coords: Coords, dtype: torch.dtype, coded: Sequence[bool], device: Any) -> Stored:
    """A place for this rank's part, of zeros.

    Args:
      structure: of leaves that are all frozen.
      dtype: in which a forward reads them, and in which vectors and scales rest.
      coded: by leaf, has it codes? Empty: all rest in bfloat16.
    """
    plain = Where(structure, coords)
    if not coded:
        return Stored(plain, Slots.zeros(plain, torch.bfloat16, device), None, (), dtype)
    scales, shapes = [], []
    for x, yes in zip(structure.leaves, coded, strict=True):
        lengths, block = blocks(1, prod(x.shape[1:]))
        scales.append((x.shape[0], sum(-(-n // block) for n in lengths)) if yes else x.shape)
        shapes.append(x.shape if yes else (0,))
    rest = Slots.zeros(Where(_shaped(structure, scales), coords), dtype, device)
    return Stored(plain, rest, Slots.zeros(Where(_shaped(structure, shapes), coords), torch.uint8, device),
                  tuple(coded), dtype)  # fmt: skip


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
    most = lambda x: len(x.shape) > 1 and prod(x.shape) > 0 and not keep(x.path)
    coded = [most(x) for x in structure.leaves] if storage == "int8" else []
    out = empty(structure, coords, dtype, coded, own.device)
    write = kernel("block_quantise", own.device).quantise
    for i, (r, c) in enumerate(out.leaves()):
        if not r.numel():
            continue
        x = own.read(i, out.plain.slots[i].place).to(own.device)
        if c is None:
            r.copy_(x)
            continue
        flat = x.to(dtype).contiguous().view(-1)
        codes, tops = write(flat, *blocks(len(x), prod(x.shape[1:])), "int8")
        if not bool(torch.isfinite(tops).all()):
            what = f"{structure.leaves[i].path!r} holds inf or nan in {dtype_name(dtype)}"
            raise ValueError(f"frozen: {what}, which no code of int8 stands for; leave it out by keep=")
        c.copy_(codes.view(c.shape))
        r.copy_(tops.view(r.shape))
    return out


def blocks(rows: int, width: int) -> tuple[tuple[int, ...], int]:
    """Lengths and block of so many rows, each of which begins a new block.

    >>> blocks(3, 512), blocks(2, 300), blocks(2, 8)
    (((1536,), 256), ((300, 300), 256), ((16,), 8))
    """
    block = min(BLOCK, max(1, width))
    return ((rows * width,) if width % block == 0 else (width,) * rows), block


def _shaped(structure: Structure, shapes: list[tuple[int, ...]]) -> Structure:
    """The structure with leaves of other shapes."""
    leaves = tuple(replace(x, shape=tuple(s)) for x, s in zip(structure.leaves, shapes, strict=True))
    return replace(structure, leaves=leaves)


class StoredGathers(Gathers):
    """Whole buffers that are made as they are asked for: gathered as they rest, and widened."""

    def __init__(self, stored: Stored, views: Slots, env: Env, key: Key) -> None:
        """views: where the wide units lie; the others as of StoredTape."""
        super().__init__(views, env, key)
        self.stored, self.whole = stored, Where.whole(views.where.structure)

    def launch(self, units: Iterable[int]) -> None:
        """Make a message of what is not here; it is asked for at once."""
        new = self.away(units)
        if new:
            self.start(new)

    def ahead(self, units: Group) -> None:
        """Nothing is started ahead: nobody would wait for it where a loss stops early."""

    def sent(self, units: Group) -> Travelling:
        """Nothing travels before it is waited for."""
        return Travelling(lambda: [self._wide(u) for u in units])

    def outwards(self, units: Group, buffers: list[Tensor]) -> list[Tensor]:
        """They are whole."""
        return buffers

    def _wide(self, unit: int) -> Tensor:
        own = self.stored
        rest, codes = own.gathered(unit, self.env, self.at)
        if own.codes is None or codes is None:
            return rest.to(own.dtype)
        parts = Where.whole(own.codes.where.structure).views(unit, codes)
        others = Where.whole(own.rest.where.structure).views(unit, rest)
        out = torch.zeros(self.whole.lengths[unit], dtype=own.dtype, device=rest.device)
        members = self.whole.structure.members[unit]
        for i, x, c, r in zip(members, self.whole.views(unit, out), parts, others, strict=True):
            x.copy_(own.leaf(i, c, r))
        return out


class StoredTape(Tape):
    """A tape whose units are made as they are opened, each by itself."""

    def __init__(self, stored: Stored, env: Env, key: Key) -> None:
        """stored: what is opened; env: where it is gathered; key: of wires, none of which draws here."""
        empty = tuple(torch.empty(0, dtype=stored.dtype, device=env.mesh.device) for _ in stored.plain.lengths)
        views = Slots(empty, stored.plain)
        super().__init__(views, (), env, False, True, key)
        self.seam, self.gathers = True, StoredGathers(stored, views, env, key)
        self.course = Course(self.whole.memo, self.whole.structure.units, self.whole.lengths, 0)


def _gathered(slots: Slots, unit: int, env: Env, key: Key) -> Tensor:
    where, buffer = slots.where, slots.buffers[unit]
    for axis in reversed(where.axes):
        where = where.outer
        if slots.where.lengths[unit]:
            (buffer,) = gather_units(where, (unit,), env.edges[axis], env.mesh, (buffer,), key).wait()
    return buffer
