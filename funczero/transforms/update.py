"""Optimizers in their place: the masters are read and written by the last one only, inside the innermost bracket
around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.transform import after, refuse, slot_name
from funczero.core.types import Grad, GradientTransformation, Reading, Updated, Value
from funczero.layout.slots import Slots
from funczero.layout.where import Where
from funczero.transforms.formula import run
from funczero.transforms.mean import rewritten, value
from funczero.transforms.partition import Part, Partition, owners, put, subset, taken

Optimizer = GradientTransformation | Partition


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

    def init(self, params: Slots) -> Any:
        """Its state, for its own leaves."""
        return self.tx.init(params if self.tx.formula is not None else params.tree())


class Shares(NamedTuple):
    """Who has which leaves: an optimizer all, those of a partition each its own."""

    entries: tuple[Entry, ...]
    parts: tuple[Part, ...]
    known: list[Any]  # what was worked out for the last places

    def of(self, where: Where) -> list[tuple[Entry, Where, tuple[int, ...] | None]]:
        """(optimizer, the place of its leaves, their numbers; None for all)."""
        if not self.parts:
            return [(self.entries[0], where, None)]
        for known, found in self.known:
            if known is where:
                return found
        held = owners(self.parts, where.structure)
        found = [(e, subset(where, mine), mine) for e, mine in zip(self.entries, held, strict=True)]
        self.known[:] = [(where, found), *self.known[:7]]
        return found

    def init(self, params: Slots) -> dict[str, Any]:
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

    def init(params: Any) -> dict[str, Any]:
        mine = params.at(g.env.mesh.coords(g.layout.sharded), dtype).trainable()
        return {
            e.key: e.tx.init((mine if held is None else taken(mine, where)).tree())
            for e, where, held in shares.of(mine.where)
        }

    def fn(out: Value, state: dict[str, Any]) -> tuple[Value, dict[str, Any]]:
        mine, (grads, factor) = state["params"].trainable(), _ready(out, dtype)
        grads = grads.map(lambda b: b * factor.to(b.dtype))
        new = grads if not shares.parts else grads.map(torch.zeros_like)
        for e, where, held in shares.of(mine.where):
            updates, own = _plainly(e.tx, grads, out.ok, state[e.key], mine, None if held is None else where)
            state = {**state, e.key: own}
            if held is None:
                new = updates
            else:
                put(new, updates)
        return rewritten(out, new), state

    return after(g, name, g.layout, fn, init)


def apply_update(g: Grad, tx: Optimizer, elsewhere: Callable[[dict[str, Any], Slots], Reading] | None = None) -> Grad:
    """The last optimizer: the masters are read and written only here. Right of it grads are new parameters.

    Args:
      elsewhere: (state of the chain, parameters) -> the rates, where another part of the state keeps them.
    """
    g, name, shares = _shares(g, tx)
    dtype, donate = g.env.policy.params, g.env.donate

    def init(params: Any) -> dict[str, Any]:
        masters = params.at(g.env.mesh.coords(g.layout.sharded), dtype)
        own = shares.init(masters.trainable())
        return {"params": masters, **(own if elsewhere is None else {k: x._replace(rates=()) for k, x in own.items()})}

    def read(e: Entry, where: Where, state: dict[str, Any], mine: Slots, ok: Tensor) -> Reading | None:
        if e.tx.formula is None:
            return None
        return (
            e.tx.formula.read(state[e.key], Slots(mine.buffers, where), ok, donate)
            if elsewhere is None
            else elsewhere(state, mine)
        )

    def fn(out: Value, state: dict[str, Any]) -> tuple[Updated, dict[str, Any]]:
        old, own, logs = state["params"].trainable(), dict[str, Any](), out.logs
        having = shares.of(old.where)
        reads = [read(e, where, state, old, out.ok) for e, where, _ in having]  # all, before anything is written
        in_place = shares.parts or having[0][0].tx.formula is not None
        new = old if donate or not in_place else tree.clone(old)  # the same formula, on clones
        grads, factor = _ready(out, dtype)
        plain = grads.map(lambda b: b * factor.to(b.dtype)) if None in reads else grads  # which formulas write into
        for (e, where, held), reading in zip(having, reads, strict=True):
            if reading is None:
                updates, own[e.key] = _plainly(e.tx, plain, out.ok, state[e.key], old, None if held is None else where)
                here = old if held is None else taken(old, where)
                moved = tree.where(out.ok, here.map(torch.add, updates), here)
                if held is None:
                    new = moved
                else:
                    put(new, moved)
            else:
                mine = state[e.key] if donate else _cloned(state[e.key])
                assert e.tx.formula is not None
                own[e.key] = run(e.tx.formula, reading, new, grads, factor, mine, out.ok, held)
                logs = {**logs, "lr": reading.lr.to(out.ok.device)}
        units = new.where.structure.units
        params = Slots(
            tuple(x if u.frozen else b for b, x, u in zip(new.buffers, state["params"].buffers, units, strict=True)),
            new.where,
        )
        return Updated(out.loss, out.weight, out.aux, params, out.norm, out.ok, out.bad, logs), {
            **state,
            **own,
            "params": params,
        }

    return after(g, name, replace(g.layout, phase="updated"), fn, init)


def _cloned(own: Any) -> Any:
    """A state whose moments may be written; rates are made anew by whoever reads them."""
    return tree.clone(own._replace(rates=()))._replace(rates=own.rates)


def _plainly(
    tx: GradientTransformation, grads: Slots, ok: Tensor, own: Any, mine: Slots, where: Where | None
) -> tuple[Slots, Any]:
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


def _packed(name: str, updates: Any, like: Slots) -> Slots:
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
