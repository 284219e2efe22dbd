"""The seam: where a loss opens one unit of parameters after another, so that ZeRO-3 holds two units and never the model.

A unit is gathered just before it runs, dropped after it, gathered again in the backward, and its gradient is scattered as soon as
it exists: the next gather and the last scatter travel while a block computes. Program order is the schedule. Two forms: *keep*
(saved tensors that live in the gathered buffer are swapped for their coordinates) and *remat* (only the block's inputs are saved).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from funczero import rng, tree
from funczero.collectives import Travelling, gather_units, scatter_units
from funczero.spec import Slots, Where
from funczero.types import Env

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
            self.launch(*before)
        if unit not in self.open:
            for other in [u for u in self.open if u not in group and self.whole.structure.units[u].frozen]:
                self.drop(other)  # nothing announces the last use of a frozen unit; it is gathered again if this was not it
            self.open[unit] = self.take(unit)
            self.launch(*before)
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


# --- one block --------------------------------------------------------------------------------------------------------
Group = tuple[int, ...]  # the units of one block: one, or two where some of its leaves are frozen
Run = Callable[[dict[int, Tensor]], Any]  # a block as a function of its open leaves, by leaf number


class _Open(torch.autograd.Function):
    """A unit's leaves for the forward; their gradients go to the tape, not into the graph."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, unit: int, buffer: Tensor, port: Tensor) -> tuple[Tensor, ...]:
        ctx.tape, ctx.unit = tape, unit
        ctx.set_materialize_grads(False)
        return tuple(tape.whole.views(unit, buffer.detach()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        _first_order()
        ctx.tape.drop(ctx.unit)
        ctx.tape.arrive(ctx.unit, grads)
        return None, None, None, None


class _Rerun(torch.autograd.Function):
    """A block that saves only its inputs: run again in the backward, with its random state restored."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, group: Group, around: tuple[Group, Group], run: Callable[..., Any], port: Tensor, *inputs: Tensor) -> Any:
        ctx.tape, ctx.group, ctx.before, ctx.run, ctx.state = tape, group, around[0], run, torch.get_rng_state()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return _run_once(tape, group, lambda leaves: run(leaves, inputs), around[1])

    @staticmethod
    def backward(ctx: Any, *gouts: Tensor | None) -> tuple[Any, ...]:
        tape, units = ctx.tape, ctx.tape.whole.structure.units
        _first_order()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.state)
            opened = {u: tape.again(u, ctx.group, ctx.before) for u in ctx.group}
            leaves = tape.open_leaves(opened)
            own = {u: [leaves[i].detach().requires_grad_() for i in tape.whole.structure.members[u]] for u in ctx.group if not units[u].frozen}
            leaves |= {i: x for u, xs in own.items() for i, x in zip(tape.whole.structure.members[u], xs, strict=True)}
            inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad[5:], strict=True)]
            outs = ctx.run(leaves, inputs)
        pairs = [(o, g) for o, g in zip(outs, gouts, strict=True) if g is not None and o.requires_grad]
        wanted = [x for xs in own.values() for x in xs] + [x for x in inputs if x.requires_grad]
        grads = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True) if pairs else [None] * len(wanted))
        del opened, leaves, outs, pairs
        for u in ctx.group:
            tape.drop(u)
        for u, xs in own.items():
            tape.arrive(u, [next(grads) for _ in xs])
        return (None, None, None, None, None, *(next(grads) if x.requires_grad else None for x in inputs))


def _first_order() -> None:
    """The seam frees what a second derivative would need; say so instead of being wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError("value_and_grad(units=...): the seam is first-order only, but create_graph=True asks for a second derivative; leave units out for this loss")


def _run_once(tape: Tape, group: Group, run: Run, after: Group) -> Any:
    """A forward that nothing will differentiate."""
    opened = {u: tape.take(u) for u in group}
    tape.launch(*after)
    out = run(tape.open_leaves(opened))
    tape.count(-len(group))
    return out


def run_unit(tape: Tape, group: Group, run: Run, before: Group = (), after: Group = ()) -> Any:
    """`run(leaves)` on one block, keep form. Gradients reach the tape; gathered buffers live only while they are read.

    Args:
      before, after: neighbours in the forward, whose gathers start early.
    """
    if not tape.seam:
        return run(tape.leaves)
    if not torch.is_grad_enabled() or not tape.differentiate:
        return _run_once(tape, group, run, after)
    buffers = {u: tape.take(u) for u in group}
    tape.launch(*after)
    leaves = tape.open_leaves(buffers, track=True)
    if not tape.rest:
        return run(leaves)
    memory = {b.untyped_storage()._cdata: u for u, b in buffers.items()}
    held = {} if after else buffers
    del buffers

    def pack(t: Tensor) -> Any:
        unit = memory.get(t.untyped_storage()._cdata)
        return t if unit is None else (unit, t.shape, t.stride(), t.storage_offset())

    def unpack(saved: Any) -> Tensor:
        return tape.again(saved[0], group, before).as_strided(*saved[1:]) if type(saved) is tuple else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = run(leaves)
    if held:
        tape.keep(held)
    else:
        tape.count(-len(group))
    return out


# --- what a loss writes -----------------------------------------------------------------------------------------------
def layers(block: Callable[..., Any], blocks: Sequence[Any], x: Any, *shared: Any, key: int | None = None, remat: bool = False) -> Any:
    """x through every block in turn: `x = block(params, x, *shared)`, a plain loop with the next gather in flight.

    The values are those of the plain loop, at every stage. `blocks` is a list of like trees, open or closed (units).

    >>> layers(lambda p, x: x * p["w"], [{"w": torch.tensor(2.0)}, {"w": torch.tensor(3.0)}], torch.tensor(1.0)).item()
    6.0

    Args:
      block: pure; gets one block's parameters, x, shared and, if key is given, key=(its own). May return (x, aux): then the
        result is (x, [aux, ...]). It must not capture tensors that need a gradient: hand them in through `shared`.
      remat: save only each block's inputs and run it again in the backward.

    Raises:
      TypeError: block captures a tensor that needs a gradient.
    """
    _no_captures(block)
    auxes = []
    opened = [tree.flatten(b) for b in blocks]
    groups = [group_of(refs) for refs, _ in opened]
    for i, params in enumerate(opened):
        kwargs = {} if key is None else {"key": rng.fold(key, i)}
        around = (groups[i - 1] if i else (), groups[i + 1] if i + 1 < len(groups) else ())
        x = run_block(block, params, groups[i], (x, *shared), kwargs, around, remat)
        if isinstance(x, tuple):
            x, aux = x
            auxes.append(aux)
    return (x, auxes) if auxes else x


def gather(params: Any) -> Any:
    """Closed parameters, open and whole, for as long as you hold them; their gradients are scattered like a block's."""
    flat, treedef = tree.flatten(params)
    refs = [r for r in flat if isinstance(r, Ref)]
    if not refs:
        return params
    tape = refs[0].tape
    leaves = tape.leaves if not tape.seam else tape.open_leaves({u: tape.take(u) for u in dict.fromkeys(r.unit for r in refs)}, track=torch.is_grad_enabled() and tape.differentiate)
    return tree.unflatten([leaves[r.leaf] if isinstance(r, Ref) else r for r in flat], treedef)


def group_of(leaves: list[Any]) -> Group:
    """The units that one block's closed parameters lie in."""
    refs = {r.unit: r for r in leaves if isinstance(r, Ref)}
    names = {r.tape.whole.structure.units[u].name for u, r in refs.items()}
    if len(names) > 1:
        raise TypeError(f"fz.layers: one block holds parameters of the units {sorted(names)}; give it a list with one tree a block")
    return tuple(refs)


def run_block(block: Callable[..., Any], params: tuple[list[Any], Any], group: Group, args: tuple[Any, ...], kwargs: dict[str, Any], around: Any, remat: bool) -> Any:
    """block(params, *args, **kwargs) on one block, in either form; params is flat: (leaves, treedef)."""
    refs, bdef = params
    if not group and not remat:
        return block(tree.unflatten(refs, bdef), *args, **kwargs)
    flat, adef = tree.flatten(args)
    values = refs + flat
    taken = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
    outdef: list[Any] = []

    def run(leaves: dict[int, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        own = [leaves[v.leaf] if isinstance(v, Ref) else v for v in values]
        for i, t in zip(taken, inputs, strict=True):
            own[i] = t
        out = block(tree.unflatten(own[: len(refs)], bdef), *tree.unflatten(own[len(refs) :], adef), **kwargs)
        if isinstance(out, Tensor):
            return (out,)
        outs, spec = tree.flatten(out)
        outdef[:] = [spec]
        return tuple(outs)

    inputs = [values[i] for i in taken]
    tape = next((v.tape for v in refs if isinstance(v, Ref)), None)
    if tape is None or remat and not tape.seam:
        outs = _checkpoint(run, {v.leaf: v.tape.leaves[v.leaf] for v in refs if isinstance(v, Ref)}, inputs)
    elif remat and torch.is_grad_enabled() and tape.differentiate:
        tape.use(group)
        outs = _Rerun.apply(tape, group, around, run, tape.port, *inputs)
    else:
        outs = run_unit(tape, group, lambda leaves: run(leaves, inputs), *around)
    return tree.unflatten(list(outs), outdef[0]) if outdef else outs[0]


def _checkpoint(run: Callable[..., Any], leaves: dict[int, Tensor], inputs: list[Tensor]) -> Any:
    """Remat where nothing is gathered."""
    numbers = list(leaves)
    return checkpoint(lambda *xs: run(dict(zip(numbers, xs[len(inputs) :], strict=True)), xs[: len(inputs)]), *inputs, *leaves.values(), use_reentrant=False)


def _no_captures(block: Callable[..., Any]) -> None:
    """Refuse closures over tensors that need a gradient: the remat form could not see it."""
    seen: list[Any] = [block]
    for fn in seen:
        plain = getattr(fn, "func", fn)  # functools.partial
        if not (getattr(plain, "__closure__", None) or plain is not fn):
            continue
        cells = [c.cell_contents for c in getattr(plain, "__closure__", None) or () if c.cell_contents is not fn]
        for x in tree.leaves((cells, getattr(fn, "args", ()), getattr(fn, "keywords", {}))):
            if isinstance(x, Ref) or isinstance(x, Tensor) and x.requires_grad:
                what = f"parameter {x.path!r}" if isinstance(x, Ref) else f"a tensor of shape {tuple(x.shape)}"
                raise TypeError(f"fz.layers: the block captures {what}, which needs a gradient; hand it in: fz.layers(block, blocks, x, it)")
            if callable(x) and getattr(x, "__closure__", None) and x not in seen and len(seen) < 16:
                seen.append(x)
