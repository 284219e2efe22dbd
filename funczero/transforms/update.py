"""Optimizers in their place: the masters are read and written by the last one only, inside the innermost bracket
around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.transform import after, refuse, slot_name
from funczero.core.types import Grad, GradientTransformation, Reading, State, Tree, Updated, Value
from funczero.layout.slots import Slots
from funczero.layout.where import Where
from funczero.transforms.formula import run
from funczero.transforms.mean import rewritten, value
from funczero.transforms.partition import Part, Partition, owners, put, subset, taken

if TYPE_CHECKING:
    from funczero.layout.lazy import Lazy

Optimizer = GradientTransformation | Partition
Elsewhere = Callable[[State, Slots], Reading]  # the rates of an update, which another part of the state keeps


def foreign(part: Any) -> str | None:
    """Why something of another library is no part of a chain, and what to write; None where it is none of those
    known.
    """
    kind = part if isinstance(part, type) else type(part)
    if issubclass(kind, torch.optim.Optimizer):
        own = {"AdamW": "fz.adamw(lr)", "Adam": "fz.adam(lr)", "SGD": "fz.sgd(lr)", "Adagrad": "fz.adagrad(lr)"}
        write = own.get(kind.__name__, f"fz.from_torch({kind.__name__!r}, lr)")
        return (
            f"a torch optimizer steps on tensors of its own, but here state is a value; write {write}, or hand it to"
            " fz.deepspeed.initialize(optimizer=...)"
        )
    if issubclass(kind, torch.optim.lr_scheduler.LRScheduler):
        return (
            "a scheduler of torch is no part of a chain; write the rate into the optimizer:"
            f" fz.adamw(fz.schedules.from_torch({kind.__name__!r}, lr, ...))"
        )
    home = (getattr(getattr(part, "init", None), "__module__", "") or "").split(".")[0]
    if home in ("optax", "jax", "flax"):
        return (
            f"a transform of {home} computes on jax arrays, and leaves are torch tensors here; write fz.adamw(lr), or"
            " the same (init, update) pair in torch"
        )
    return None


def _placed(g: Grad, tx: GradientTransformation) -> Grad:
    """g as this optimizer may read it: a mean, and whole leaves where it needs them."""
    g, why = value(g, tx.name), foreign(tx)
    if why is not None:
        raise refuse(g, tx.name, why)
    if not tx.elementwise and any(g.env.mesh.axes[a].size > 1 for a in g.layout.sharded):
        raise refuse(g, tx.name, _whole(tx, list(g.layout.sharded)))
    return g


def _whole(tx: GradientTransformation, axes: list[str]) -> str:
    """Why this optimizer cannot stand in a bracket."""
    without = f"a chain without shard (stage 0), as all_reduce({axes[-1]!r}) in its place"
    if tx.elementwise is None:
        return (
            f"nothing says that it works value by value, but the leaves are cut over {axes} here; write fz.lift(pair,"
            " elementwise=True) if every value of its updates and state depends on its own place alone, and otherwise"
            f" {without}"
        )
    return (
        f"it needs whole leaves (elementwise=False), but they are cut over {axes} here; write {without}, or an"
        " optimizer that works value by value, as fz.adamw(lr)"
    )


def _ready(out: Value, dtype: torch.dtype) -> tuple[Slots, Tensor]:
    """The gradient in the masters' dtype, and the factor that is still to be multiplied into it.

    Where the masters' dtype would round or overflow what the factor makes small, or float32 has no such factor, it is
    multiplied first.
    """
    born, keeps = out.grads.buffers[0].dtype, torch.finfo(dtype).bits
    far = out.factor.device.type == "cpu" and not 1e-37 < float(out.factor) < 1e37
    if far or keeps < 32 or keeps < torch.finfo(born).bits:
        wide = torch.float64 if far else torch.promote_types(born, torch.float32)
        return out.grads.map(lambda b: (b.to(wide) * out.factor).to(dtype)), torch.ones_like(out.factor)
    return out.grads.to(dtype), out.factor


class Entry(NamedTuple):
    """One optimizer in its place: where its state is kept, and which leaves it has."""

    key: str
    tx: GradientTransformation
    part: int | None = None  # of a partition; None: it has all leaves

    def init(self, params: Slots) -> Tree:
        """Its state, for its own leaves."""
        return self.tx.init(params if self.tx.formula is not None else params.tree())

    def read(
        self, state: State, params: Slots, where: Where, ok: Tensor, donate: bool, elsewhere: Elsewhere | None
    ) -> Reading | None:
        """The rates of this update, for its leaves at `where`; None where it has no formula."""
        if self.tx.formula is None:
            return None
        if elsewhere is not None:
            return elsewhere(state, params)
        return self.tx.formula.read(state[self.key], Slots(params.buffers, where), ok, donate)


# one optimizer, the place of its leaves, and their numbers; None for all
Holding = tuple[Entry, Where, tuple[int, ...] | None]


class Shares(NamedTuple):
    """Who has which leaves: an optimizer all, those of a partition each its own."""

    entries: tuple[Entry, ...]
    parts: tuple[Part, ...]
    known: list[tuple[Where, list[Holding]]]  # what was worked out for the last places

    def of(self, where: Where) -> list[Holding]:
        """What each optimizer has of the leaves at a place."""
        if not self.parts:
            return [(self.entries[0], where, None)]
        for known, found in self.known:
            if known is where:
                return found
        held = owners(self.parts, where.structure)
        having: list[Holding] = [(e, subset(where, own), own) for e, own in zip(self.entries, held, strict=True)]
        self.known[:] = [(where, having), *self.known[:7]]
        return having

    def init(self, params: Slots) -> State:
        """Every optimizer's state by its key."""
        return {
            e.key: e.init(params if held is None else taken(params, where)) for e, where, held in self.of(params.where)
        }


def _shares(g: Grad, tx: Optimizer) -> tuple[Grad, str, Shares]:
    """g with all but the last name of an optimizer or a partition, that name, and who has what."""
    if not isinstance(tx, Partition):
        g = _placed(g, tx)
        return g, tx.name, Shares((Entry(slot_name(g, tx.name), tx),), (), [])
    entries: list[Entry] = []
    for i, part in enumerate(tx.parts):
        g = _placed(g, part.tx) if not i else _passed(_placed(g, part.tx), str(tx.parts[i - 1]))
        entries.append(Entry(slot_name(g, part.tx.name), part.tx, i))
    return g, str(tx.parts[-1]), Shares(tuple(entries), tx.parts, [])


def _passed(g: Grad, name: str) -> Grad:
    return g._replace(names=(*g.names, name), arrows=(*g.arrows, g.layout))


def rewrite(g: Grad, tx: Optimizer) -> Grad:
    """An optimizer that is not the last: its updates are the gradient of the next."""
    g, name, shares = _shares(g, tx)
    dtype = g.env.policy.params

    def init(params: Lazy) -> State:
        mine = params.at(g.env.mesh.coords(g.layout.sharded), dtype).trainable()
        return {
            e.key: e.tx.init((mine if held is None else taken(mine, where)).tree())
            for e, where, held in shares.of(mine.where)
        }

    def fn(out: Value, state: State) -> tuple[Value, State]:
        mine, (grads, factor) = state["params"].trainable(), _ready(out, dtype)
        grads = grads.map(lambda b: b * factor.to(b.dtype))
        new = grads if not shares.parts else grads.map(torch.zeros_like)
        for e, where, held in shares.of(mine.where):
            updates, own = _plainly(e.tx, grads, out.ok, state[e.key], mine, None if held is None else where)
            state = {**state, e.key: own}
            new = _with(new, updates, held)
        return rewritten(out, new), state

    return after(g, name, g.layout, fn, init)


def apply_update(g: Grad, tx: Optimizer, elsewhere: Elsewhere | None = None) -> Grad:
    """The last optimizer: the masters are read and written only here. Right of it grads are new parameters.

    Args:
      elsewhere: (state of the chain, parameters) -> the rates, where another part of the state keeps them.
    """
    g, name, shares = _shares(g, tx)
    dtype, donate = g.env.policy.params, g.env.donate

    def init(params: Lazy) -> State:
        masters = params.at(g.env.mesh.coords(g.layout.sharded), dtype)
        own = shares.init(masters.trainable())
        return {"params": masters, **(own if elsewhere is None else {k: x._replace(rates=()) for k, x in own.items()})}

    def fn(out: Value, state: State) -> tuple[Updated, State]:
        masters: Slots = state["params"]
        old, own, logs = masters.trainable(), State(), out.logs
        having = shares.of(old.where)
        # all, before anything is written
        reads = [e.read(state, old, where, out.ok, donate, elsewhere) for e, where, _ in having]
        in_place = shares.parts or having[0][0].tx.formula is not None
        new = old if donate or not in_place else tree.clone(old)  # the same formula, on clones
        grads, factor = _ready(out, dtype)
        plain = grads.map(lambda b: b * factor.to(b.dtype)) if None in reads else grads  # which formulas write into
        for (e, where, held), reading in zip(having, reads, strict=True):
            if reading is None:
                updates, own[e.key] = _plainly(e.tx, plain, out.ok, state[e.key], old, None if held is None else where)
                before = old if held is None else taken(old, where)
                moved = tree.where(out.ok, before.map(torch.add, updates), before)
                new = _with(new, moved, held)
            else:
                mine = state[e.key] if donate else _cloned(state[e.key])
                assert e.tx.formula is not None
                own[e.key] = run(e.tx.formula, reading, new, grads, factor, mine, out.ok, held)
                logs = {**logs, "lr": reading.lr.to(out.ok.device)}
        params = _with_frozen(new, masters)
        updated = Updated(out.loss, out.weight, out.aux, params, _norm_of(out), out.ok, out.bad, logs)
        return updated, {**state, **own, "params": params}

    return after(g, name, replace(g.layout, phase="updated"), fn, init)


def _with(whole: Slots, part: Slots, held: tuple[int, ...] | None) -> Slots:
    """The whole with one optimizer's leaves in it, in place; where it has all of them, these."""
    if held is None:
        return part
    put(whole, part)
    return whole


def _with_frozen(new: Slots, old: Slots) -> Slots:
    """The new masters, with the old ones' frozen units."""
    units = new.where.structure.units
    return Slots(
        tuple(x if u.frozen else b for b, x, u in zip(new.buffers, old.buffers, units, strict=True)), new.where
    )


def _norm_of(out: Value) -> Tensor:
    """The norm for the metrics: as it was before a transform rewrote the gradient, nan where none remembers it."""
    if out.norm is not None:
        return out.norm
    return out.logs["grad_norm"] if "grad_norm" in out.logs else torch.full_like(out.loss, torch.nan)


def _cloned(own: Tree) -> Tree:
    """A state whose moments may be written; rates are made anew by whoever reads them."""
    return tree.clone(own._replace(rates=()))._replace(rates=own.rates)


def _plainly(
    tx: GradientTransformation, grads: Slots, ok: Tensor, own: Tree, mine: Slots, where: Where | None
) -> tuple[Slots, Tree]:
    """The updates of the plain form on the leaves at `where` (None: all), and its new state: the old one, numbers
    included, where the update is skipped.

    Raises:
      RuntimeError: `update` wrote into what it was given, so that a state would change which somebody still holds.
    """
    if where is not None:
        grads, mine = taken(grads, where), taken(mine, where)
    held = {"the parameters": [*mine.buffers], "its state": tree.tensors(own)}
    versions = {what: [x._version for x in xs] for what, xs in held.items()}
    updates, new = tx.update(grads.tree(), own, mine.tree())
    for what, xs in held.items():
        if versions[what] != [x._version for x in xs]:
            raise RuntimeError(
                f"{tx.name}: its update writes into {what}, which stay as they were given; return new tensors, as m = b"
                " * m + g for m.mul_(b).add_(g)"
            )
    state = tree.map(
        lambda n, o: torch.where(ok, n, o) if isinstance(n, Tensor) else n if n is o or bool(ok) else o, new, own
    )
    return _packed(tx.name, updates, mine), state


def _packed(name: str, updates: Tree, like: Slots) -> Slots:
    """A tree of this rank's leaves back in buffers.

    Raises:
      TypeError, ValueError: it is no tree of tensors like the parameters, or says two things of a tied one; with the
        leaf's path.
    """
    structure = like.where.structure
    try:
        flat = structure.treedef.flatten_up_to(updates)
    except ValueError as e:
        raise TypeError(
            f"{name}: its updates are no tree like the parameters ({e}); return one update for every leaf"
        ) from None
    by_leaf: list[Tensor | None] = [None] * len(structure.leaves)
    for place, x in zip(structure.places, flat, strict=True):
        if not structure.frozen(place):
            slot, path = like.where.slots[place], structure.leaves[place].path
            if not isinstance(x, Tensor) or x.shape != slot.shape:
                have = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise TypeError(
                    f"{name}: its update of parameter {path!r} is {have}; return a tensor of this part's shape"
                    f" {slot.shape}"
                )
            twin = by_leaf[place]
            if twin is not None and not ((twin == x) | (twin != twin) & (x != x)).all():
                raise ValueError(
                    f"{name}: it gives the tied parameter {path!r} one update at each of its paths, and they differ;"
                    " return the same at all"
                )
            by_leaf[place] = x
    buffer = like.buffers[0]
    return Slots.pack(like.where, by_leaf, buffer.dtype, buffer.device)
