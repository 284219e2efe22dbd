"""One apply's book of units: closed parameters, what is gathered, what travels, and which gradients have arrived."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from funczero import tree
from funczero.collectives import Travelling, gather_units, scatter_units
from funczero.spec import Slots, Where
from funczero.types import Env

Group = tuple[int, ...]  # the units of one block: one, or two where some of its leaves are frozen
SMALL = 1 << 15  # elements under which a unit's gradient is not worth a message of its own


class Ref:
    """A parameter inside a unit, before the unit is opened: it has a shape and a dtype, and no values."""

    def __init__(self, tape: Tape, leaf: int) -> None:
        """Leaf number `leaf` of what the tape holds."""
        info = tape.whole.structure.leaves[leaf]
        self.tape, self.leaf, self.unit, self.path, self.shape, self.dtype = tape, leaf, info.unit, info.path, torch.Size(info.shape), tape.dtype
        self.device, self.requires_grad = tape.port.device, tape.differentiate and not tape.whole.structure.frozen(leaf)

    def is_floating_point(self) -> bool:
        """Modules ask their parameters for a dtype."""
        return True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """Any use as a tensor is refused, with the correction."""
        ref = next(x for x in tree.leaves((args, kwargs)) if isinstance(x, Ref))
        ref._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        """No tensor method exists here."""
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def _refuse(self) -> NoReturn:
        remedy = "run its blocks with fz.layers(block, params[...], x) or open it with fz.gather(params[...])"
        if "/" not in self.path:  # a module's parameter
            remedy = "a module may read it only inside that block's forward; leave its list out of fz.stateless(..., units=[...])"
        raise TypeError(f"parameter {self.path!r} is inside a unit that is not open; {remedy}")

    def __repr__(self) -> str:
        return f"<closed parameter {self.path!r} {tuple(self.shape)} {self.dtype}>"


class Tape:
    """One apply's book: which units are gathered, what travels, and which gradients have arrived. It lives for one forward and backward."""

    def __init__(self, views: Slots, scatter: tuple[str, ...], env: Env, look: bool, differentiate: bool = True) -> None:
        """views: parameters at rest; scatter: axes that gradients are scattered over at the seam beyond those of rest."""
        self.env, self.views, self.rest = env, views, views.where.axes
        self.whole: Where = views.where.structure.whole
        self.dtype = views.buffers[0].dtype
        self.axes = (*self.rest, *scatter)  # outermost first
        self.seam = any(env.mesh.axes[a].size > 1 for a in self.axes)  # over axes of size 1 there is nothing to do
        self.here: Where = self.whole  # where gradients end up
        for a in self.axes:
            self.here = self.here.inner(a, env.mesh.axes[a].size, env.mesh.index(a))
        self.differentiate, self.look = differentiate, look
        self.port = torch.zeros((), device=views.buffers[0].device, requires_grad=differentiate)
        self.flying: dict[int, Travelling] = {}  # gathers under way
        self.open: dict[int, Tensor] = {}  # gathered buffers that the backward reads
        self.kept: set[int] = set()  # of these, the forward's last block
        self.leaves: dict[int, Tensor] = {}  # by leaf number, where nothing is gathered or scattered
        self.uses: dict[int, int] = {}
        self.sums: dict[int, list[Tensor]] = {}  # gradients of a unit used more than once
        self.late: dict[int, list[Tensor]] = {}  # gradients of small units, which share the last message
        self.scattering: tuple[Group, Callable[[], list[Tensor]]] | None = None
        self.grads: dict[int, Tensor] = {}
        self.bad: dict[int, Tensor] = {}
        self.live = self.peak = 0

    # --- gathers
    def launch(self, *group: int) -> None:
        """Start to gather units, unless they are here or under way."""
        for unit in group if self.rest and self.seam else ():
            if unit not in self.flying and unit not in self.open:
                self.flying[unit] = gather_units(self.views.where.outer, (unit,), self.rest[-1], self.env.mesh, (self.views.buffers[unit],))
                self.count(1)

    def ahead(self, *group: int) -> None:
        """Start gathers that are not needed yet, unless the step says to wait."""
        if self.env.prefetch:
            self.launch(*group)

    def take(self, unit: int) -> Tensor:
        """A unit's whole buffer; innermost axis first."""
        if not self.rest or not self.seam:
            return self.views.buffers[unit]
        for other in tuple(self.kept):  # it was not the last
            self.drop(other)
        self.launch(unit)
        (buffer,), where = self.flying.pop(unit).wait(), self.views.where.outer
        for axis in reversed(self.rest[:-1]):
            where = where.outer
            (buffer,) = gather_units(where, (unit,), axis, self.env.mesh, (buffer,)).wait()
        return buffer

    def again(self, unit: int, group: Group, before: Group) -> Tensor:
        """The whole buffer for the backward: gathered at first touch, then the gathers of the block before it start."""
        if unit in self.kept:
            self.kept.remove(unit)
            self.ahead(*before)
        if unit not in self.open:
            for other in [u for u in self.open if u not in group and self.whole.structure.units[u].frozen]:
                self.drop(other)  # nothing announces the last use of a frozen unit; it is gathered again if this was not it
            self.open[unit] = self.take(unit)
            self.ahead(*before)
        return self.open[unit]

    def keep(self, buffers: dict[int, Tensor]) -> None:
        """Hold on to the forward's last block, which the backward reads first."""
        self.open |= buffers
        self.kept |= set(buffers)

    def drop(self, unit: int) -> None:
        """Forget a gathered buffer."""
        self.kept.discard(unit)
        if self.open.pop(unit, None) is not None:
            self.count(-1)

    def count(self, n: int) -> None:
        """Book gathered buffers that came or went."""
        self.live += n if self.rest else 0
        self.peak = max(self.peak, self.live)

    def open_leaves(self, buffers: dict[int, Tensor], track: bool = False) -> dict[int, Tensor]:
        """Leaves of gathered units by leaf number; with track, those with a gradient report it to this tape."""
        out: dict[int, Tensor] = {}
        for u, buffer in buffers.items():
            learns = track and not self.whole.structure.units[u].frozen
            if learns:
                self.use((u,))
            xs = _Open.apply(self, u, buffer, self.port) if learns else self.whole.views(u, buffer)
            out |= dict(zip(self.whole.structure.members[u], xs, strict=True))
        return out

    # --- gradients
    def use(self, group: Group) -> None:
        """One more use of units in this forward: a gradient is scattered after the last one."""
        for unit in group:
            self.uses[unit] = self.uses.get(unit, 0) + 1

    def arrive(self, unit: int, grads: Sequence[Tensor | None]) -> None:
        """A use's gradient, in its own dtype: uses are summed here, in the order of arrival, and scattered once."""
        shapes = [self.whole.structure.leaves[i].shape for i in self.whole.structure.members[unit]]
        full = [torch.zeros(s, dtype=self.dtype, device=self.port.device) if g is None else g for g, s in zip(grads, shapes, strict=True)]
        if unit in self.sums:
            full = [a + b for a, b in zip(self.sums.pop(unit), full, strict=True)]
        self.uses[unit] -= 1
        if self.uses[unit] > 0:
            self.sums[unit] = full
        else:
            self.scatter(unit, full)

    def scatter(self, unit: int, leaves: list[Tensor]) -> None:
        """Start to scatter a unit's gradient, or put it aside for the last message if it is all latency."""
        if self.look:
            self.bad[unit] = torch.stack([(~x.isfinite()).sum() for x in leaves])
        if self.whole.lengths[unit] < SMALL:
            self.late[unit] = leaves
        else:
            self._send((unit,), [leaves])

    def _send(self, units: Group, leaves: list[list[Tensor]]) -> None:
        """Over all axes, outermost first; the message before this one is finished meanwhile."""
        mesh, dtype, where = self.env.mesh, self.env.policy.accumulate, self.whole
        first = scatter_units(where, units, self.axes[0], mesh, leaves, dtype)

        def finish() -> list[Tensor]:
            buffers, here = first.wait(), where
            for outer, axis in zip(self.axes, self.axes[1:], strict=False):
                here = here.inner(outer, mesh.axes[outer].size, mesh.index(outer))
                if mesh.axes[axis].size > 1:
                    buffers = scatter_units(here, units, axis, mesh, [here.views(u, b) for u, b in zip(units, buffers, strict=True)], dtype).wait()
            return buffers

        before, self.scattering = self.scattering, (units, finish)
        self._finish(before)

    def _finish(self, sent: tuple[Group, Callable[[], list[Tensor]]] | None) -> None:
        if sent is not None:
            self.grads |= dict(zip(sent[0], sent[1](), strict=True))

    def finish(self) -> Slots:
        """This rank's gradients of all units, once every backward has run; units that no backward reached are zero."""
        for unit in list(self.sums):
            self.scatter(unit, self.sums.pop(unit))
        if self.late:
            self._send(tuple(self.late), list(self.late.values()))
        self._finish(self.scattering)
        self.scattering = None  # it refers to this tape: a cycle would hold the gradients until a collection
        self.open.clear()
        self.flying.clear()
        where = self.here
        some = next(iter(self.grads.values()), None)
        dtype, device, units = self.dtype if some is None else some.dtype, self.port.device, self.whole.structure.units
        for u, n in enumerate(where.lengths):
            if u not in self.grads:
                self.grads[u] = torch.zeros(0 if units[u].frozen else n, dtype=dtype, device=device)
        return Slots(tuple(self.grads[u] for u in range(len(units))), where)


class _Open(torch.autograd.Function):
    """A unit's leaves for the forward; their gradients go to the tape, not into the graph."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, unit: int, buffer: Tensor, port: Tensor) -> tuple[Tensor, ...]:
        ctx.tape, ctx.unit = tape, unit
        ctx.set_materialize_grads(False)
        return tuple(tape.whole.views(unit, buffer.detach()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        first_order()
        ctx.tape.drop(ctx.unit)
        ctx.tape.arrive(ctx.unit, grads)
        return None, None, None, None


def first_order() -> None:
    """The seam frees what a second derivative would need; say so instead of being wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError("value_and_grad(units=...): the seam is first-order only, but create_graph=True asks for a second derivative; leave units out for this loss")
