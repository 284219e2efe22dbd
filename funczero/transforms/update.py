"""Optimizers in their place: the masters are read and written by the last one only, inside the innermost bracket around it."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.transform import after, refuse, slot_name
from funczero.core.types import Grad, GradientTransformation, Updated, Value
from funczero.layout.slots import Slots
from funczero.transforms.mean import rewritten, value


def foreign(part: Any) -> str | None:
    """Why something of another library is no part of a chain, and what to write; None where it is none of those known."""
    kind = part if isinstance(part, type) else type(part)
    if issubclass(kind, torch.optim.Optimizer):
        own = {"AdamW": "fz.adamw(lr)", "Adam": "fz.adam(lr)", "SGD": "fz.sgd(lr)", "Adagrad": "fz.adagrad(lr)"}
        write = own.get(kind.__name__, f"fz.from_torch({kind.__name__!r}, lr)")
        return f"a torch optimizer steps on tensors of its own, but here state is a value; write {write}, or hand it to fz.deepspeed.initialize(optimizer=...)"
    if issubclass(kind, torch.optim.lr_scheduler.LRScheduler):
        return f"a scheduler of torch is no part of a chain; write the rate into the optimizer: fz.adamw(fz.schedules.from_torch({kind.__name__!r}, lr, ...))"
    home = (getattr(getattr(part, "init", None), "__module__", "") or "").split(".")[0]
    if home in ("optax", "jax", "flax"):
        return f"a transform of {home} computes on jax arrays, and leaves are torch tensors here; write fz.adamw(lr), or the same (init, update) pair in torch"
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
            f"nothing says that it works value by value, but the leaves are cut over {axes} here; write fz.lift(pair, elementwise=True) if every value of its "
            f"updates and state depends on its own place alone, and otherwise {without}"
        )
    return f"it needs whole leaves (elementwise=False), but they are cut over {axes} here; write {without}, or an optimizer that works value by value, as fz.adamw(lr)"


def _ready(out: Value, dtype: torch.dtype) -> tuple[Slots, Tensor]:
    """The gradient in the masters' dtype, and the factor that is still to be multiplied into it.

    Where the masters' dtype would round or overflow what the factor makes small, or float32 has no such factor, it is multiplied first.
    """
    born, keeps = out.grads.buffers[0].dtype, torch.finfo(dtype).bits
    far = out.factor.device.type == "cpu" and not 1e-37 < float(out.factor) < 1e37
    if far or keeps < 32 or keeps < torch.finfo(born).bits:
        wide = torch.float64 if far else torch.promote_types(born, torch.float32)
        return out.grads.map(lambda b: (b.to(wide) * out.factor).to(dtype)), torch.ones_like(out.factor)
    return out.grads.to(dtype), out.factor


def rewrite(g: Grad, tx: GradientTransformation) -> Grad:
    """An optimizer that is not the last: its updates are the gradient of the next."""
    g, key = _placed(g, tx), slot_name(g, tx.name)
    dtype = g.env.policy.params

    def init(params: Any) -> dict[str, Any]:
        return {key: tx.init(params.at(g.env.mesh.coords(g.layout.sharded), dtype).trainable().tree())}

    def fn(out: Value, state: dict[str, Any]) -> tuple[Value, dict[str, Any]]:
        grads, updates, own = _plainly(tx, out, state[key], state["params"].trainable(), dtype)
        return rewritten(out, _packed(tx.name, updates, grads)), {**state, key: own}

    return after(g, tx.name, g.layout, fn, init)


def apply_update(g: Grad, tx: GradientTransformation) -> Grad:
    """The last optimizer: the masters are read and written only here. Right of it grads are new parameters."""
    g, key = _placed(g, tx), slot_name(g, tx.name)
    dtype, donate = g.env.policy.params, g.env.donate

    def init(params: Any) -> dict[str, Any]:
        masters = params.at(g.env.mesh.coords(g.layout.sharded), dtype)
        mine = masters.trainable()
        return {"params": masters, key: tx.init(mine if tx.apply is not None else mine.tree())}

    def fused(out: Value, state: dict[str, Any]) -> tuple[Slots, Any, dict[str, Tensor]]:
        mine, own = state["params"].trainable(), state[key]
        grads, factor = _ready(out, dtype)
        if not donate:  # the same kernel, on clones
            mine, own = tree.clone(mine), tree.clone(own)
        return tx.apply(mine, grads, factor, own, out.ok)  # type: ignore[misc]

    def plain(out: Value, state: dict[str, Any]) -> tuple[Slots, Any, dict[str, Tensor]]:
        mine = state["params"].trainable()
        _, updates, own = _plainly(tx, out, state[key], mine, dtype)
        moved = mine.map(torch.add, _packed(tx.name, updates, mine))
        return tree.where(out.ok, moved, mine), own, {}

    def fn(out: Value, state: dict[str, Any]) -> tuple[Updated, dict[str, Any]]:
        new, own, logs = (plain if tx.apply is None else fused)(out, state)
        units = new.where.structure.units
        params = Slots(tuple(old if u.frozen else b for b, old, u in zip(new.buffers, state["params"].buffers, units, strict=True)), new.where)
        done = Updated(out.loss, out.weight, out.aux, params, out.norm, out.ok, out.bad, {**out.logs, **logs})
        return done, {**state, "params": params, key: own}

    return after(g, tx.name, replace(g.layout, phase="updated"), fn, init)


def _plainly(tx: GradientTransformation, out: Value, own: Any, mine: Slots, dtype: torch.dtype) -> tuple[Slots, Any, Any]:
    """The gradient, the updates of the plain form, and its new state: the old one, numbers included, where the update is skipped.

    Raises:
      RuntimeError: `update` wrote into what it was given, so that a state would change which somebody still holds.
    """
    grads, factor = _ready(out, dtype)
    grads = grads.map(lambda b: b * factor.to(b.dtype))
    held = {"the parameters": [*mine.buffers], "its state": tree.tensors(own)}
    versions = {what: [x._version for x in xs] for what, xs in held.items()}
    updates, new = tx.update(grads.tree(), own, mine.tree())
    for what, xs in held.items():
        if versions[what] != [x._version for x in xs]:
            raise RuntimeError(f"{tx.name}: its update writes into {what}, which stay as they were given; return new tensors, as m = b * m + g for m.mul_(b).add_(g)")
    return grads, updates, tree.map(lambda n, o: torch.where(out.ok, n, o) if isinstance(n, Tensor) else n if n is o or bool(out.ok) else o, new, own)


def _packed(name: str, updates: Any, like: Slots) -> Slots:
    """A tree of this rank's leaves back in buffers.

    Raises:
      TypeError, ValueError: it is no tree of tensors like the parameters, or says two things of a tied one; with the leaf's path.
    """
    structure = like.where.structure
    try:
        flat = structure.treedef.flatten_up_to(updates)
    except ValueError as e:
        raise TypeError(f"{name}: its updates are no tree like the parameters ({e}); return one update for every leaf") from None
    by_leaf: list[Tensor | None] = [None] * len(structure.leaves)
    for place, x in zip(structure.places, flat, strict=True):
        if not structure.frozen(place):
            slot, path = like.where.slots[place], structure.leaves[place].path
            if not isinstance(x, Tensor) or x.shape != slot.shape:
                have = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise TypeError(f"{name}: its update of parameter {path!r} is {have}; return a tensor of this part's shape {slot.shape}")
            twin = by_leaf[place]
            if twin is not None and not ((twin == x) | (twin != twin) & (x != x)).all():
                raise ValueError(f"{name}: it gives the tied parameter {path!r} one update at each of its paths, and they differ; return the same at all")
            by_leaf[place] = x
    buffer = like.buffers[0]
    return Slots.pack(like.where, by_leaf, buffer.dtype, buffer.device)
