"""Optimizers that read more of a leaf than one place: exact norms of leaves, and leaves made whole where they are
computed.

Moments rest in rows. A formula's `ready` runs on them, then integers of squares are summed, and rows are sent to the
leaf's owner, who computes with the very shape of an unsharded run in fresh memory, so that the bits do not depend on
the world; rows of what comes out go back.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from funczero.comm.integers import sum_integers
from funczero.comm.norm import folds, norm_of, square_bins
from funczero.comm.owners import from_owners, to_owners
from funczero.core.optimizer import Asked, Formula, Found, Reading
from funczero.core.types import Tree
from funczero.layout.mesh import Mesh
from funczero.layout.slots import Slots
from funczero.layout.where import Where
from funczero.transforms.deal import Deal, dealt, extents, slices, states_of, trained

MESSAGE = 1 << 22  # bytes of a rank's rows that share one message


class Work(NamedTuple):
    """One group of leaves, as its formula has made them ready."""

    leaves: tuple[int, ...]
    columns: list[list[Tensor]]  # params, grads, moments
    scalars: Tree
    asked: Asked


def run_across(
    formula: Formula,
    read: Reading,
    trees: tuple[Slots, ...],
    own: Tree,
    scalars: list[Tree],
    held: tuple[int, ...] | None,
    mesh: Mesh,
) -> None:
    """A formula that needs whole leaves, in place on params, grads, moments and the owners' states.

    Every rank sends alike, whatever it holds and owns.

    Args:
      trees: params, grads and moments.
      held: numbers of the leaves that the optimizer has; None: all.
    """
    across, where, work = formula.across, trees[0].where, list[Work]()
    assert across is not None
    mine = trained(where, held)
    for group, each in zip(read.groups, scalars, strict=True):
        leaves = mine if group.leaves is None else tuple(i for i in mine if i in group.leaves)
        columns = [[padded(t, i) for i in leaves] for t in trees]
        work.append(Work(leaves, columns, each, across.ready(columns[0], columns[1], columns[2:], each)))
    norms, rows = _norms(where, work, mesh), dict[int, Tensor]()
    if across.whole is not None:
        asked = {i: [c[k] for c in w.asked.rows] for w in work for k, i in enumerate(w.leaves)}
        compute = computing(across.whole, across.own(own), {i: w.scalars for w in work for i in w.leaves})
        rows = Exchange(where, dealt(where, held, across), asked, compute, mesh).run()
    for w in work:
        shapes = [where.structure.leaves[i].shape for i in w.leaves]
        by_what = [[norms[i][k] for i in w.leaves] for k in range(len(w.asked.norms))]
        found = Found(shapes, by_what, [rows[i] for i in w.leaves if i in rows])
        formula.leaf(w.columns[0], w.columns[1], w.columns[2:], w.scalars, found)


def computing(
    whole: Callable[[list[Tensor], list[Tensor], Tree], Tensor], states: list[Slots], scalars: dict[int, Tree]
) -> Callable[[int, list[Tensor]], Tensor]:
    """`whole` of a formula by a leaf's number."""
    return lambda i, values: whole(values, states_of(states, i), scalars[i])


def padded(x: Slots, leaf: int) -> Tensor:
    """A leaf's padded slot."""
    slot = x.where.slots[leaf]
    return x.buffers[x.where.structure.leaves[leaf].unit].narrow(0, slot.offset, slot.length)


# --- norms ------------------------------------------------------------------------------------------------------------
def _norms(where: Where, work: list[Work], mesh: Mesh) -> dict[int, list[Tensor]]:
    """By leaf the norms that were asked for, exact on any mesh: integers of squares, one sum for all of them."""
    asked = [(i, x) for w in work for column in w.asked.norms for i, x in zip(w.leaves, column, strict=True)]
    out: dict[int, list[Tensor]] = {i: [] for w in work for i in w.leaves}
    if not asked:
        return out
    first = {i: not any(mesh.index(a) for a in where.replicas(i)) for i, _ in asked}
    most = max(prod(where.structure.leaves[i].shape) for i, _ in asked)  # one width for all that travel together
    bins = torch.stack([square_bins(x if first[i] else x[:0], of=most) for i, x in asked])
    axes = tuple(a for a, n, _ in where.coords if n > 1)
    total = sum_integers(bins.view(-1), axes, mesh).view(bins.shape) if axes else bins
    for (i, x), row in zip(asked, total.unbind(), strict=True):
        out[i].append(torch.where(row[0] == 0, norm_of(row, folds(x.dtype)), torch.inf))
    return out


# --- whole leaves -----------------------------------------------------------------------------------------------------
class Message(NamedTuple):
    """Leaves whose rows travel together."""

    axes: tuple[str, ...]
    leaves: list[int]
    units: tuple[int, ...]


class Exchange:
    """Rows out, whole leaves computed by their owners, rows back."""

    def __init__(
        self,
        where: Where,
        deal: Deal,
        rows: dict[int, list[Tensor]],
        compute: Callable[[int, list[Tensor]], Tensor],
        mesh: Mesh,
    ) -> None:
        """rows: by leaf the padded slots that are wanted whole, of one dtype; compute: (leaf, those whole) -> one
        tensor like the leaf.
        """
        self.where, self.deal, self.rows, self.compute, self.mesh = where, deal, rows, compute, mesh

    def run(self) -> dict[int, Tensor]:
        """By leaf this rank's part of what was computed, as its padded slot."""
        out: dict[int, Tensor] = {}
        # all are under way before the first is computed
        flying = [(m, self._out(m)) for m in self._messages()]
        for i in self.rows:
            if not self.deal.seats[i].axes:
                base, _ = extents(self.where, i, ())
                n = prod(base.shape)
                out[i] = self._slot(i, self._whole(i, [x[:n].reshape(base.shape).clone() for x in self.rows[i]]))
        back: list[tuple[Message, Callable[[], list[Tensor]]]] = []
        for m, arrived in flying:
            computed = self._computed(m, arrived())
            for i in m.leaves:
                seat = self.deal.seats[i]
                if seat.owner is None:
                    base, parts = extents(self.where, i, m.axes)
                    out[i] = self._slot(i, computed[i][slices(parts[self._place(m.axes)], base)])
            if any(self._lengths(m, 1, shared=False)):
                back.append((m, self._back(m, computed)))
        for m, arrive in back:
            for p, flat in enumerate(arrive()):
                theirs = [i for i in m.leaves if self.deal.seats[i].owner == p]
                for i, x in zip(theirs, flat.split([self._block(i) for i in theirs]), strict=True):
                    out[i] = self._slot(i, x[: prod(self.where.slots[i].shape)])
        return out

    def _place(self, axes: tuple[str, ...]) -> int:
        return self.mesh.rank(axes)[0]

    def _block(self, i: int) -> int:
        """Elements of a leaf's rows on the wire, the same on every rank."""
        return prod(self.where.slots[i].block)

    def _slot(self, i: int, x: Tensor) -> Tensor:
        out = x.new_zeros(self.where.slots[i].length)
        out[: x.numel()] = x.reshape(-1)
        return out

    def _messages(self) -> list[Message]:
        """Leaves in the order of the deal, whose neighbours have other owners, so that each message is work for all."""
        out, room = list[Message](), 0
        for i in (i for i in self.deal.seats if i in self.rows and self.deal.seats[i].axes):
            axes, nbytes = self.deal.seats[i].axes, self._block(i) * sum(x.itemsize for x in self.rows[i])
            last = next((m for m in reversed(out) if m.axes == axes), None)
            if last is None or nbytes > room:
                last, room = Message(axes, [], ()), MESSAGE
                out.append(last)
            last.leaves.append(i)
            room -= nbytes
        units = self.where.structure.leaves
        return [m._replace(units=tuple(sorted({units[i].unit for i in m.leaves}))) for m in out]

    def _lengths(self, m: Message, columns: int, shared: bool = True) -> list[int]:
        """Elements for each of the ranks along a message's axes, or from each where nothing is computed by all."""
        seats = self.deal.seats
        return [
            sum(self._block(i) * columns for i in m.leaves if seats[i].owner == q or shared and seats[i].owner is None)
            for q in range(prod(self.mesh.axes[a].size for a in m.axes))
        ]

    def _out(self, m: Message) -> Callable[[], Tensor]:
        """Rows of a message's leaves to those who compute them."""
        empty, parts = self.rows[m.leaves[0]][0][:0], []
        for q in range(prod(self.mesh.axes[a].size for a in m.axes)):
            wanted = [i for i in m.leaves if self.deal.seats[i].owner in (q, None)]
            parts.append(torch.cat([empty, *(x[: self._block(i)] for i in wanted for x in self.rows[i])]))
        return to_owners(parts, m.axes, self.mesh, m.units)

    def _computed(self, m: Message, arrived: Tensor) -> dict[int, Tensor]:
        """What this rank has to compute of a message."""
        here = self._place(m.axes)
        wanted = [i for i in m.leaves if self.deal.seats[i].owner in (here, None)]
        columns = [(i, k) for i in wanted for k in range(len(self.rows[i]))]
        split = dict(zip(columns, arrived.split([self._block(i) for i, _ in columns], 1), strict=True))
        return {i: self._whole(i, [self._joined(i, m, split[i, k]) for k in range(len(self.rows[i]))]) for i in wanted}

    def _joined(self, i: int, m: Message, rows: Tensor) -> Tensor:
        """A leaf out of the rows of all ranks, in memory of its own."""
        base, parts = extents(self.where, i, m.axes)
        out = rows.new_empty(base.shape)
        for row, part in zip(rows.unbind(), parts, strict=True):
            out[slices(part, base)] = row[: prod(part.shape)].view(part.shape)
        return out

    def _whole(self, i: int, values: list[Tensor]) -> Tensor:
        if not values[0].numel():
            return values[0]
        out = self.compute(i, values)
        if out.shape != values[0].shape or out.dtype != values[0].dtype:
            path = self.where.structure.leaves[i].path
            raise TypeError(
                f"leafwise: what was computed of parameter {path!r} is {out.dtype} of shape {tuple(out.shape)}; return"
                f" {values[0].dtype} of shape {tuple(values[0].shape)}"
            )
        return out

    def _back(self, m: Message, computed: dict[int, Tensor]) -> Callable[[], list[Tensor]]:
        """Rows of what this rank owns to those whose they are."""
        lengths, here = self._lengths(m, 1, shared=False), self._place(m.axes)
        mine = [i for i in m.leaves if self.deal.seats[i].owner == here]
        rows = self.rows[m.leaves[0]][0].new_zeros(len(lengths), lengths[here])
        at = 0
        for i in mine:
            base, parts = extents(self.where, i, m.axes)
            for row, part in zip(rows, parts, strict=True):
                row[at : at + prod(part.shape)] = computed[i][slices(part, base)].reshape(-1)
            at += self._block(i)
        return from_owners(rows, lengths, m.axes, self.mesh, m.units)


def on_whole(
    formula: Formula,
    columns: list[list[Tensor]],
    leaves: list[int],
    states: list[dict[int, Tensor]],
    scalars: Tree,
) -> None:
    """The same in place on whole leaves without a mesh, as the plain pair runs it.

    Args:
      columns: params, grads and moments of these leaves, in their shapes.
      states: those of owners, by leaf.
    """
    across, shapes = formula.across, [tuple(x.shape) for x in columns[0]]
    assert across is not None
    flat = [[x.view(-1) for x in column] for column in columns]
    asked = across.ready(flat[0], flat[1], flat[2:], scalars)
    norms = [[norm_of(square_bins(x, of=x.numel()), folds(x.dtype)) for x in column] for column in asked.norms]
    rows = []
    for k, (i, shape) in enumerate(zip(leaves, shapes, strict=True) if across.whole is not None else ()):
        values = [column[k].reshape(shape).clone() for column in asked.rows]
        assert across.whole is not None
        own = [s[i] for s in states if i in s]
        rows.append((across.whole(values, own, scalars) if values[0].numel() else values[0]).reshape(-1))
    formula.leaf(flat[0], flat[1], flat[2:], scalars, Found(shapes, norms, rows))
