"""Buffers: a tree of parameters, or of anything shaped like it, as this rank holds it, one buffer a unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from funczero.core.types import Tree
from funczero.layout.place import Place
from funczero.layout.where import Where


class Slots(NamedTuple):
    """A tree of parameters as this rank holds it: one buffer a unit, and where its leaves lie.

    A pytree whose leaves are the buffers.
    """

    buffers: tuple[Tensor, ...]
    where: Where

    def leaves(self) -> list[Tensor | None]:
        """This rank's part of every leaf, as views in their logical shapes.

        None stands for what a gradient does not have (frozen).
        """
        out: list[Tensor | None] = [None] * len(self.where.structure.leaves)
        for u, (buffer, n) in enumerate(zip(self.buffers, self.where.lengths, strict=True)):
            if buffer.numel() == n:
                for i, x in zip(self.where.structure.members[u], self.where.views(u, buffer), strict=True):
                    out[i] = x
        return out

    def tree(self) -> Tree:
        """This rank's parts as the tree the user gave; what a gradient does not have (frozen) is an empty tensor."""
        return self.where.structure.unflatten([self.buffers[0].new_empty(0) if x is None else x for x in self.leaves()])

    def present(self) -> dict[int, Tensor]:
        """The leaves that are there, by number."""
        return {i: x for i, x in enumerate(self.leaves()) if x is not None}

    def write(self, leaf: int, whole: Tensor) -> None:
        """A whole leaf's part, in place."""
        self.present()[leaf].data.copy_(whole.detach()[self.where.slots[leaf].place])

    def versions(self) -> list[int] | None:
        """How often each buffer was written to; None where torch does not count (inference mode)."""
        return None if any(b.is_inference() for b in self.buffers) else [b._version for b in self.buffers]

    def begin_writing(self) -> None:
        """Counts one write in every buffer, before the first is made."""
        torch.autograd.graph.increment_version([b for b in self.buffers if not b.is_inference()])

    def map(self, fn: Callable[..., Tensor], *others: Slots) -> Slots:
        """fn on buffers; padding must stay zero."""
        return Slots(tuple(fn(*b) for b in zip(self.buffers, *(o.buffers for o in others), strict=True)), self.where)

    def to(self, dtype: torch.dtype) -> Slots:
        """Cast; the same memory where nothing changes."""
        return self if all(b.dtype == dtype for b in self.buffers) else self.map(lambda b: b.to(dtype))

    def placed(self, place: Place, device: torch.device) -> Slots:
        """The same values in another place; the same memory where nothing changes.

        Args:
          device: the rank's own.
        """
        if place == self.where.place:
            return self
        buffers = tuple(place.empty(b.numel(), b.dtype, device).copy_(b) for b in self.buffers)
        return Slots(buffers, replace(self.where, place=place))

    def trainable(self) -> Slots:
        """Without the frozen units' values: what gradients and moments look like."""
        frozen = self.where.structure.units
        return Slots(tuple(b[:0] if u.frozen else b for b, u in zip(self.buffers, frozen, strict=True)), self.where)

    def with_frozen(self, old: Slots) -> Slots:
        """These, with the frozen units' values of others."""
        units = old.where.structure.units
        return Slots(
            tuple(o if u.frozen else n for n, o, u in zip(self.buffers, old.buffers, units, strict=True)), old.where
        )

    @staticmethod
    def zeros(where: Where, dtype: torch.dtype, device: torch.device, frozen: bool = True) -> Slots:
        """All-zero buffers; with frozen=False those of frozen units are empty."""
        units = where.structure.units
        return Slots(
            tuple(
                torch.zeros(n if frozen or not u.frozen else 0, dtype=dtype, device=device)
                for n, u in zip(where.lengths, units, strict=True)
            ),
            where,
        )

    @staticmethod
    def pack(
        where: Where, leaves: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device, spent: bool = False
    ) -> Slots:
        """Leaves of this place copied into buffers; units of None (frozen) are empty, a None among others is zero.

        Args:
          spent: the list is given away, and a unit's leaves are let go as soon as they are copied.
        """
        buffers = []
        for u, members in enumerate(where.structure.members):
            mine = [leaves[i] for i in members]
            if all(x is None for x in mine):
                frozen = where.structure.units[u].frozen
                buffers.append(torch.zeros(0 if frozen else where.lengths[u], dtype=dtype, device=device))
                continue
            make = torch.zeros if where.gaps[u] or any(x is None for x in mine) else torch.empty
            buffer = make(where.lengths[u], dtype=dtype, device=device)
            pairs = [(v, x) for v, x in zip(where.views(u, buffer), mine, strict=True) if x is not None and x.numel()]
            if pairs:
                torch._foreach_copy_([v for v, _ in pairs], [x for _, x in pairs])
            buffers.append(buffer)
            if spent:
                assert isinstance(leaves, list)
                for i in members:
                    leaves[i] = None
        return Slots(tuple(buffers), where)
