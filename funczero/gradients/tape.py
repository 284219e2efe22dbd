"""One apply's units for a forward: what is gathered, what is under way, and the leaves that a loss reads."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.comm.exact import Grid
from funczero.comm.memory import Held
from funczero.comm.wire import Key
from funczero.core.types import Env
from funczero.gradients.agree import Agreement
from funczero.gradients.arrivals import Arrivals, Group
from funczero.gradients.course import Course, Visit
from funczero.gradients.gathers import Gathers
from funczero.gradients.loss import written
from funczero.gradients.node import node
from funczero.gradients.ref import Ref
from funczero.layout.slots import Slots
from funczero.layout.where import Where


class Lent(NamedTuple):
    """A leaf in the hands of a loss."""

    leaf: int
    itself: weakref.ref[Tensor]
    writes: Tensor  # its version counter, which outlives it


class Tape:
    """What one forward and its backward hold of the units (`gathers`), and where their gradients go (`arrivals`)."""

    def __init__(
        self,
        views: Slots,
        scatter: tuple[str, ...],
        env: Env,
        look: bool,
        differentiate: bool = True,
        at: Key = (0,),
        key: Key = (0,),
        held: Mapping[str, Held] | None = None,
        conditional: bool = False,
        grid: Grid | None = None,
    ) -> None:
        """One apply's units, closed.

        Args:
          views: parameters at rest.
          scatter: axes that gradients are scattered over at the seam beyond those of rest.
          at, key: what wires of views, and of gradients, draw from.
          held: by axis, what wires of gradients remember.
          conditional: may ranks open other units than others?
          grid: units in which gradients are counted, where sums are exact.
        """
        self.at = at
        self.env, self.views, self.rest = env, views, views.where.axes
        self.whole = Where.whole(views.where.structure)
        self.dtype = views.buffers[0].dtype
        axes = (*self.rest, *scatter)  # outermost first
        self.seam = any(env.mesh.axes[a].size > 1 for a in axes)  # over axes of size 1 there is nothing to do
        self.differentiate, self.look = differentiate, look
        self.port = torch.zeros((), device=views.buffers[0].device, requires_grad=differentiate)
        self.arrivals = Arrivals(self.whole, axes, env, self.dtype, self.port.device, key, held, grid)
        self.conditional = conditional
        cut = bool(self.rest) and self.seam
        self.arrivals.agreed = conditional and cut
        agreement = Agreement(env.mesh, self.arrivals) if self.arrivals.agreed else None
        self.gathers = Gathers(views, env, at, agreement) if cut else None
        self.leaves: dict[int, Tensor] = {}  # by leaf number, where nothing is gathered or scattered
        self.lent: list[Lent] = []  # leaves that a loss holds by itself (fz.gather)
        limit = 0 if agreement is not None else env.link.together // self.dtype.itemsize
        self.course = Course(self.whole.memo, self.whole.structure.units, self.whole.lengths, limit)

    @property
    def device(self) -> torch.device:
        """Of all that is opened."""
        return self.port.device

    @property
    def ports(self) -> list[Tensor]:
        """What stands for the closed leaves in a graph."""
        return [self.port, *self.leaves.values()]

    # --- whole buffers
    def enter(self, group: Group, guess: Group = ()) -> tuple[dict[int, Tensor], Visit]:
        """The next block of a forward: its units' whole buffers, while the gathers of what comes after it start.

        Args:
          guess: the block after it, where no forward has been seen yet.
        """
        visit = self.course.enter(group, guess)
        if self.gathers is None:
            return {u: self.views.buffers[u] for u in group}, visit
        buffers = self.gathers.take(group, visit.stretch)
        self.gathers.ahead(visit.after)
        return buffers, visit

    def left(self, group: Group) -> None:
        """A block has returned, and nothing of it is held."""
        if self.gathers is not None:
            self.gathers.leave(group)

    def again(self, unit: int, group: Group, visit: Visit | None) -> Tensor:
        """The whole buffer for the backward of a block."""
        return self.views.buffers[unit] if self.gathers is None else self.gathers.reopen(unit, group, visit)

    def reopened(self, leaf: int) -> Tensor:
        """A leaf's values, for what runs again inside a block while its backward runs; they are not in its graph."""
        unit = self.whole.structure.leaves[leaf].unit
        if not self.seam:
            return self.leaves[leaf]
        members, units = self.whole.structure.members[unit], self.whole.structure.units
        block = tuple(u for u, other in enumerate(units) if other.name == units[unit].name)
        x = self.whole.views(unit, self.again(unit, block, None))
        return x[members.index(leaf)].data.requires_grad_(self.differentiate and not units[unit].frozen)

    def drop(self, unit: int) -> None:
        """The backward has done with a unit."""
        if self.gathers is not None:
            self.gathers.drop(unit)

    def drop_all(self) -> None:
        """Forget every gathered buffer; a backward that reads one gathers it again."""
        if self.gathers is not None:
            self.gathers.drop_all()

    def end(self) -> None:
        """After the backward nothing is open or under way, on any rank."""
        if self.gathers is not None:
            self.gathers.end()
        self.course.close()

    # --- leaves
    def open_rest(self, forward: bool = True) -> list[Any]:
        """Every leaf of the tree for a loss: whole tensors outside the units, closed Refs inside them.

        Args:
          forward: False: the forward runs elsewhere, and every leaf is None.
        """
        structure = self.whole.structure
        out: list[Any] = [None] * len(structure.leaves)
        loose = [u for u, unit in enumerate(structure.units) if not unit.seam and structure.members[u]]
        if not forward:
            return out
        for u, buffer in self._loose(tuple(loose)).items():
            for i, x in self._loose_leaves(u, buffer).items():
                out[i] = x
        for u in (u for u, unit in enumerate(structure.units) if unit.seam):
            if not self.seam:
                self.leaves |= self._loose_leaves(u, self.views.buffers[u])
            for i in structure.members[u]:
                out[i] = Ref(self, i)
        return out

    def _loose(self, units: Group) -> dict[int, Tensor]:
        """The buffers of units outside the seam, while the gathers of the first blocks start."""
        if self.gathers is None:
            return {u: self.views.buffers[u] for u in units}
        first = self.course.first()
        self.gathers.launch((*units, *first) if self.env.prefetch and self.course.joins(units) else units)
        buffers = self.gathers.take(units)
        self.gathers.leave(units)
        self.gathers.ahead(first)
        return buffers

    def _loose_leaves(self, unit: int, buffer: Tensor) -> dict[int, Tensor]:
        """A unit's leaves outside the seam, each with a version counter of its own, so a write is known by leaf."""
        learns = self.differentiate and not self.whole.structure.units[unit].frozen
        leaves = [x.data for x in self.whole.views(unit, buffer)]  # not detach(), which shares the counter
        return dict(
            zip(self.whole.structure.members[unit], [x.requires_grad_() if learns else x for x in leaves], strict=True)
        )

    def tensors(self, rest: Sequence[Any]) -> dict[int, Tensor]:
        """By leaf number, all that a loss reads without opening a unit.

        Args:
          rest: what `open_rest` returned.
        """
        return {i: x for i, x in enumerate(rest) if isinstance(x, Tensor)} | self.leaves

    def lend(self, leaves: Mapping[int, Tensor]) -> None:
        """Remember leaves that a loss goes on to hold by itself (fz.gather), without their memory."""
        self.lent += [Lent(i, weakref.ref(x), _writes(x)) for i, x in leaves.items() if not x.is_inference()]

    @contextmanager
    def collecting(self, look: bool = False, **how: Any) -> Iterator[None]:
        """While the backward that the chain asked for runs; see Arrivals.collecting."""
        self.look = look
        with self.arrivals.collecting(look, **how):
            yield

    def open_leaves(self, buffers: dict[int, Tensor], track: bool = False) -> dict[int, Tensor]:
        """Leaves of gathered units by leaf number; with track, those with a gradient report it to this tape."""
        out: dict[int, Tensor] = {}
        for u, buffer in buffers.items():
            learns = track and not self.whole.structure.units[u].frozen
            if learns:
                self.arrivals.use((u,))
            xs = node(self, u, buffer) if learns else [x.data for x in self.whole.views(u, buffer)]
            out |= dict(zip(self.whole.structure.members[u], xs, strict=True))
        return out

    def resting_leaves(self, group: Group) -> dict[int, Tensor]:
        """Leaves of units where nothing is gathered or scattered.

        They are views, so that the uses in one call are summed before those of other calls.
        """
        members = [i for u in group for i in self.whole.structure.members[u]]
        return {i: x.view_as(x) if x.requires_grad else x for i, x in ((i, self.leaves[i]) for i in members)}

    def untouched(self, leaves: Mapping[int, Tensor], before: Mapping[int, Tensor] | None = None) -> None:
        """Refuse a loss that wrote its parameters: at some stages that is the caller's state, at others a copy.

        Args:
          before: copies of the leaves, where writes that no version counter sees (`.data`) are looked for as well.
        """
        for i, x in leaves.items():
            if not x.is_inference() and x._version or before is not None and not _same_bits(x, before[i]):
                raise written(self.whole.structure.leaves[i].path)

    def left_alone(self, whole: Mapping[int, Tensor], before: Mapping[int, Tensor] | None) -> None:
        """`untouched`, of everything that a loss has had in its hands until its end."""
        for lent in self.lent:
            self.untouched({lent.leaf: lent.writes})
        self.untouched(whole, before)

    def copies(self, leaves: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """What `untouched` compares with, while values are looked at (debug)."""
        return {i: x.detach().clone() for i, x in leaves.items()} if self.look else None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _writes(x: Tensor) -> Tensor:
    """A tensor without memory whose version is x's, also when x is gone."""
    with torch._C._DisableFuncTorch():  # a loss may open leaves inside of torch.func
        counter = x.detach()  # shares the version counter, which new data leaves as it is
        counter.data = x.new_empty(0)
    return counter
