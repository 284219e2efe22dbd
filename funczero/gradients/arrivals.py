"""The gradients of one apply's units: uses are summed as they arrive, and leave in one order that every rank keeps.

A message carries no name, so two ranks that open different units (routed experts, dropped layers) must still send the
same ones in the same order. Units leave the last one first, as backwards produce them, and neighbours that are small
share a message: one that is early waits for the others and for their turn, and one that no backward reached sends
zeros. The last message takes what is left, and the leaves outside the units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from funczero.comm.collectives import with_units
from funczero.comm.exact import Grid, Tally
from funczero.comm.memory import Held
from funczero.comm.units import Travelling, scatter_units
from funczero.comm.wire import Key
from funczero.core.exhausted import amid
from funczero.core.types import Env
from funczero.layout.slots import Slots
from funczero.layout.where import Where

Group = tuple[int, ...]  # the units of one block: one, or two where some of its leaves are frozen


class Collected(NamedTuple):
    """The gradients of one backward."""

    grads: Slots
    bad: Tensor | None = None  # [leaves]: values that are not finite, where they were counted
    tally: Tally | None = None  # what was found as they became integers; None: they are as born


class Arrivals:
    """Which gradients have arrived, what travels, and what is here. Nothing is booked but inside `collecting`."""

    def __init__(
        self,
        whole: Where,
        axes: tuple[str, ...],
        env: Env,
        dtype: torch.dtype,
        device: torch.device,
        key: Key = (0,),
        held: Mapping[str, Held] | None = None,
        grid: Grid | None = None,
    ) -> None:
        """Nothing has arrived.

        Args:
          axes: what gradients are scattered over at the seam, outermost first.
          dtype: in which they are born.
          key: (of the update, the micro-batch's index): what wires draw from.
          held: by axis, the memory of wires that have one.
          grid: units in which gradients are counted as they arrive; None: they are added as they are.
        """
        self.key, self.held, self.grid = key, held or {}, grid
        self.errors: dict[str, dict[int, Tensor]] = {a: {} for a in self.held}  # their new memory, by unit
        self.whole, self.axes, self.env, self.dtype, self.device = whole, axes, env, dtype, device
        self.here: Where = whole  # where gradients end up
        self.used: set[int] = set()  # leaves that this rank's rows had a gradient for
        digits, stride = list[int](), 1
        for a in axes:
            size, index, _ = env.mesh.axes[a]
            self.here = self.here.inner(a, size, index)
            digits, stride = [*digits, index * stride], stride * size
        # of the micro-batch's index, digits of axes that are summed later
        self.later = [sum(digits[i + 1 :]) for i in range(len(axes))]
        self.messages = _messages_of(whole, dtype.itemsize, env.link.together)
        self.uses: dict[int, int] = {}  # forwards of a unit whose gradient has not arrived
        self.booking = self.look = self.void = False
        self.agreed = False  # do gradients leave when all ranks have agreed on it (agree.py)?
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[int, list[Tensor]] = {}  # of units of which more uses will arrive
        self.ready: dict[int, list[Tensor]] = {}  # complete, and waiting for their turn
        self.turn, self.number = 0, 0  # how many messages have left; how many gradients have arrived
        self.latest = -1  # unit of the last one
        self.scattering: tuple[Group, Callable[[], list[Tensor]]] | None = None
        self.grads: dict[int, Tensor] = {}
        self.bad: dict[int, Tensor] = {}
        self.tally = None if self.grid is None else Tally(self.grid)

    @contextmanager
    def collecting(
        self,
        look: bool = False,
        retain: bool = False,
        key: Key | None = None,
        void: bool = False,
        grid: Grid | None = None,
    ) -> Iterator[None]:
        """While the backward that the chain asked for runs. Other backwards, as a loss may take on its way, book
        nothing.

        Args:
          look: count non-finite values.
          retain: the same graph will run backward once more.
          key: of this backward, where it was not known when the tape was made.
          void: what arrives counts as zero.
          grid: of this backward, where it was not known when the tape was made.
        """
        if grid is not None:
            self.grid, self.tally = grid, Tally(grid)
        self.key = self.key if key is None else key
        before = dict(self.uses)
        self.booking, self.look, self.void = True, look, void
        try:
            with self.or_nothing():
                yield
        finally:
            self.booking = False
            self.uses = before if retain else self.uses

    @contextmanager
    def or_nothing(self) -> Iterator[None]:
        """What arrives inside is here afterwards, or where it fails nothing is: no part of the next backward's."""
        try:
            yield
        except BaseException:
            self._clear()
            raise

    def amid(self) -> str:
        """Where a backward is, as far as gradients of units have told."""
        name = self.whole.structure.units[self.latest].name if self.latest >= 0 else ""
        return amid(f", after the gradients of unit {name!r}" if name else "")

    def use(self, group: Group) -> None:
        """One more use of units in this forward: a gradient is complete after the last one."""
        for unit in group:
            self.uses[unit] = self.uses.get(unit, 0) + 1

    def arrive(self, unit: int, grads: Sequence[Tensor | None]) -> None:
        """A use's gradient, in the dtype it was born in: uses are summed here, in the order of arrival."""
        if not self.booking:
            return
        grads = [None] * len(grads) if self.void else grads
        self.used.update(m for m, g in zip(self.whole.structure.members[unit], grads, strict=True) if g is not None)
        zeros = self._zeros(unit, [i for i, g in enumerate(grads) if g is None])
        full = [zeros[i] if g is None else g for i, g in enumerate(grads)]
        if not all(g.layout == torch.strided for g in full):
            i = next(
                i for i, g in zip(self.whole.structure.members[unit], full, strict=True) if g.layout != torch.strided
            )
            raise TypeError(sparse(self.whole.structure.leaves[i].path))
        if unit in self.sums:
            full = [a + b for a, b in zip(self.sums.pop(unit), full, strict=True)]
        self.uses[unit] -= 1
        self.number, self.latest = self.number + 1, unit
        if self.uses[unit] > 0:
            self.sums[unit] = full
        else:
            self.put(unit, full)

    def put(self, unit: int, leaves: list[Tensor]) -> None:
        """A unit's complete gradient: it leaves when its turn has come."""
        if unit in self.ready:  # a checkpointed block is known here when it runs again, one use at a time
            leaves = [a + b for a, b in zip(self.ready[unit], leaves, strict=True)]
        elif any(unit in message for message in self.messages[: self.turn]):
            name = self.whole.structure.units[unit].name
            why = "has a gradient once more, after it was sent: a reentrant checkpoint runs it again, and uses it twice"
            raise RuntimeError(f"value_and_grad(units=...): unit {name!r} {why}; write use_reentrant=False")
        self.ready[unit] = leaves
        while not self.agreed and self.turn < len(self.messages) and self.ready.keys() >= {*self.messages[self.turn]}:
            self._next()

    def due(self) -> int:
        """How many messages could have left by now: of units that are complete, or that no forward here used."""
        n = self.turn
        while self.booking and n < len(self.messages) and all(map(self._whole, self.messages[n])):
            n += 1
        return n

    def _whole(self, unit: int) -> bool:
        seam = self.whole.structure.units[unit].seam  # what lies outside comes at the end
        return unit in self.ready or seam and not self.uses.get(unit, 0) and unit not in self.sums

    def leave(self, turn: int) -> None:
        """The messages before this turn are sent; all ranks have agreed on it."""
        while self.turn < turn:
            self._next()

    def _next(self) -> None:
        units = self.messages[self.turn]
        self.turn += 1
        self._send(units, [self._taken(u) for u in units])

    def _taken(self, unit: int) -> list[Tensor]:
        leaves = self.ready.pop(unit, None)
        if leaves is None:  # no backward reached it on this rank
            zeros = self._zeros(unit, range(len(self.whole.structure.members[unit])))
            leaves = list(zeros.values())
        if self.look:
            self.bad[unit] = torch.stack([(~x.isfinite()).sum() for x in leaves])
        return leaves

    def _zeros(self, unit: int, which: Sequence[int]) -> dict[int, Tensor]:
        info, members = self.whole.structure.leaves, self.whole.structure.members[unit]
        return {i: torch.zeros(info[members[i]].shape, dtype=self.dtype, device=self.device) for i in which}

    def _send(self, units: Group, leaves: list[list[Tensor]]) -> None:
        """Over all axes, outermost first; the message before this one is finished meanwhile."""
        mesh, edges, where = self.env.mesh, self.env.edges, self.whole
        counts = next((a for a in self.axes if mesh.axes[a].size > 1), None)  # the first sum of more than one part
        tally = self.tally if counts == self.axes[0] else None
        first = scatter_units(
            where, units, edges[self.axes[0]], mesh, leaves, self._key_over(0), self.held.get(self.axes[0]), tally
        )
        self._remember(self.axes[0], units, first)

        def finish() -> list[Tensor]:
            buffers, here = first.wait(), where
            for i, (outer, axis) in enumerate(zip(self.axes, self.axes[1:], strict=False), 1):
                here = here.inner(outer, mesh.axes[outer].size, mesh.index(outer))
                if mesh.axes[axis].size > 1:
                    parts = [here.views(u, b) for u, b in zip(units, buffers, strict=True)]
                    tally = self.tally if axis == counts else None
                    later = self.tally is not None and tally is None
                    edge = edges[axis]._replace(adds=torch.int64) if later else edges[axis]
                    sent = scatter_units(here, units, edge, mesh, parts, self._key_over(i), self.held.get(axis), tally)
                    self._remember(axis, units, sent)
                    buffers = sent.wait()
            return buffers

        before, self.scattering = self.scattering, (units, finish)
        self._finish(before)

    def _remember(self, axis: str, units: Group, sent: Travelling) -> None:
        if sent.errors:
            self.errors[axis] |= dict(zip(units, sent.errors, strict=True))

    def memory(self, axis: str) -> Slots | None:
        """What the wire of an axis remembers after this backward; None where it has no memory."""
        return with_units(self.held[axis].errors, self.errors[axis]) if axis in self.held else None

    def _key_over(self, i: int) -> Key:
        """Of the sum over axis number i: its micro-batch's index with the digits of the axes that are summed after
        it.
        """
        *rest, index = self.key
        return (*rest, index + self.later[i])

    def _finish(self, sent: tuple[Group, Callable[[], list[Tensor]]] | None) -> None:
        if sent is not None:
            self.grads |= dict(zip(sent[0], sent[1](), strict=True))

    def close(self, loose: Mapping[int, list[Tensor | None]]) -> Collected:
        """This rank's gradients of all units; ready for another backward.

        Args:
          loose: whole gradients of the units outside the seam, by leaf; None is zero.
        """
        for unit in list(self.sums):  # fewer backwards than forwards came
            self.ready[unit] = self.sums.pop(unit)
        for u, grads in loose.items():
            zeros = self._zeros(u, [i for i, g in enumerate(grads) if g is None])
            self.ready[u] = [zeros[i] if g is None else g for i, g in enumerate(grads)]
        while self.turn < len(self.messages):
            self._next()
        self._finish(self.scattering)
        found, bad, tally = self.grads, self._bad_by_leaf(), self.tally
        self._clear()
        return Collected(
            Slots(tuple(self._of(u, found) for u in range(len(self.whole.structure.units))), self.here), bad, tally
        )

    def _of(self, unit: int, found: dict[int, Tensor]) -> Tensor:
        """A unit's gradient; a unit without leaves that learn has none."""
        if unit in found:
            return found[unit]
        some = next(iter(found.values()), None)
        n = 0 if self.whole.structure.units[unit].frozen else self.here.lengths[unit]
        return torch.zeros(n, dtype=self.dtype if some is None else some.dtype, device=self.device)

    def _bad_by_leaf(self) -> Tensor | None:
        if not self.look:
            return None
        bad = torch.zeros(len(self.whole.structure.leaves), dtype=torch.int64, device=self.device)
        for u, counts in self.bad.items():
            bad[list(self.whole.structure.members[u])] = counts
        return bad


def _messages_of(whole: Where, wide: int, limit: int) -> list[Group]:
    """Of all that learns, the units outside the seam last. Worked out once."""
    key = "messages", wide, limit
    if key not in whole.memo:
        learning = [(u, unit.seam) for u, unit in enumerate(whole.structure.units) if not unit.frozen]
        seam, loose = ([u for u, at_seam in learning if at_seam == here] for here in (True, False))
        order = [*reversed(seam), *(u for u in loose if whole.lengths[u])]
        whole.memo[key] = messages(order, [wide * n for n in whole.lengths], limit)
    found: list[Group] = whole.memo[key]
    return found


def messages(units: Sequence[int], nbytes: Sequence[int], limit: int) -> list[Group]:
    """Neighbours that travel together, up to `limit` bytes; a larger unit travels by itself.

    >>> messages([3, 2, 1, 0], [1, 2, 9, 4], limit=5)
    [(3,), (2,), (1, 0)]
    """
    out: list[list[int]] = []
    size = 0
    for u in units:
        if not out or size + nbytes[u] > limit:
            out.append([])
            size = 0
        out[-1].append(u)
        size += nbytes[u]
    return [tuple(message) for message in out]


def sparse(path: str = "") -> str:
    """Why a gradient by coordinates is refused."""
    what = repr(path) if path else "a parameter"
    return (
        f"value_and_grad: the gradient of {what} is sparse, but gradients are added and cut as dense rows; write"
        " sparse=False in its embedding"
    )
