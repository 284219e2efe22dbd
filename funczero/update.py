"""Optimizers in their place: the masters are read and written by the last one only, inside the innermost bracket around it."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funczero import tree
from funczero.mean import rewritten, value
from funczero.spec import Slots
from funczero.transform import after, refuse, slot_name
from funczero.types import Grad, GradientTransformation, Out


def coords(g: Grad, axes: tuple[str, ...]) -> tuple[tuple[str, int, int], ...]:
    """This rank's place on axes, as Where wants it."""
    return tuple((a, g.env.mesh.axes[a].size, g.env.mesh.index(a)) for a in axes)


def _placed(g: Grad, tx: GradientTransformation) -> Grad:
    """g as this optimizer may read it: a mean, and whole leaves where it needs them."""
    g = value(g, tx.name)
    if not tx.elementwise and any(g.env.mesh.axes[a].size > 1 for a in g.layout.sharded):
        why = f"it is not known to work value by value, but the leaves are cut over {list(g.layout.sharded)} here; write fz.lift(pair), which tries it, or leave the bracket out"
        raise refuse(g, tx.name, why)
    return g


def rewrite(g: Grad, tx: GradientTransformation) -> Grad:
    """An optimizer that is not the last: its updates are the gradient of the next."""
    g, key = _placed(g, tx), slot_name(g, tx.name)
    dtype = g.env.policy.params

    def init(params: Any) -> dict[str, Any]:
        return {key: tx.init(params.at(coords(g, g.layout.sharded), dtype).trainable().tree())}

    def fn(out: Out, state: dict[str, Any]) -> tuple[Out, dict[str, Any]]:
        grads = out.grads.to(dtype).map(lambda b: b * out.factor.to(b.dtype))
        updates, own = tx.update(grads.tree(), state[key], state["params"].trainable().tree())
        return rewritten(out, _packed(updates, grads)), {**state, key: tree.where(out.ok, own, state[key])}

    return after(g, tx.name, g.layout, fn, init)


def apply_update(g: Grad, tx: GradientTransformation) -> Grad:
    """The last optimizer: the masters are read and written only here. Right of it grads are new parameters."""
    g, key = _placed(g, tx), slot_name(g, tx.name)
    dtype, donate = g.env.policy.params, g.env.donate

    def init(params: Any) -> dict[str, Any]:
        masters = params.at(coords(g, g.layout.sharded), dtype)
        mine = masters.trainable()
        return {"params": masters, key: tx.init(mine if tx.apply is not None else mine.tree())}

    def fused(out: Out, state: dict[str, Any]) -> tuple[Slots, Any, dict[str, Tensor]]:
        mine, own = state["params"].trainable(), state[key]
        grads = out.grads.to(dtype)
        if not donate:  # the same kernel, on clones
            mine, own = tree.clone(mine), tree.clone(own)
        return tx.apply(mine, grads, out.factor, own, out.ok)  # type: ignore[misc]

    def plain(out: Out, state: dict[str, Any]) -> tuple[Slots, Any, dict[str, Tensor]]:
        mine = state["params"].trainable()
        grads = out.grads.to(dtype).map(lambda b: b * out.factor.to(b.dtype))
        updates, own = tx.update(grads.tree(), state[key], mine.tree())
        moved = mine.map(torch.add, _packed(updates, mine))
        return tree.where(out.ok, moved, mine), tree.where(out.ok, own, state[key]), {}

    def fn(out: Out, state: dict[str, Any]) -> tuple[Out, dict[str, Any]]:
        new, own, logs = (plain if tx.apply is None else fused)(out, state)
        units = new.where.structure.units
        params = Slots(tuple(old if u.frozen else b for b, old, u in zip(new.buffers, state["params"].buffers, units, strict=True)), new.where)
        return out._replace(grads=params, logs={**out.logs, **logs}), {**state, "params": params, key: own}

    return after(g, tx.name, replace(g.layout, applied=True), fn, init)


def _packed(updates: Any, like: Slots) -> Slots:
    """A tree of this rank's leaves back in buffers."""
    structure = like.where.structure
    flat = structure.treedef.flatten_up_to(updates)
    by_leaf: list[Tensor | None] = [None] * len(structure.leaves)
    for place, x in zip(structure.places, flat, strict=True):
        by_leaf[place] = None if structure.frozen(place) else x
    buffer = like.buffers[0]
    return like.where.pack(by_leaf, buffer.dtype, buffer.device)
