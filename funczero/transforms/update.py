"""Optimizers in their place: the masters are read and written by the last one only, inside the innermost bracket
around it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from funczero.comm.differentiable import pack
from funczero.core import tree
from funczero.core.spans import span
from funczero.core.transform import after, refuse
from funczero.core.types import Grad, State, Tree, Updated, Value
from funczero.layout.slots import Slots
from funczero.transforms.formula import IDLE, run
from funczero.transforms.mean import rewritten
from funczero.transforms.partition import put, taken
from funczero.transforms.shares import Elsewhere, Optimizer, Shares, cuts_of, noting, shares_of
from funczero.transforms.smooth import scaled, stepped, twofold
from funczero.transforms.unused import left_alone, not_here

if TYPE_CHECKING:
    from funczero.layout.lazy import Lazy


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


def rewrite(g: Grad, tx: Optimizer) -> Grad:
    """An optimizer that is not the last: its updates are the gradient of the next."""
    g, name, shares = shares_of(g, tx)
    dtype = g.env.policy.params
    _not_before_another(g, shares)

    def init(params: Lazy) -> State:
        mine = params.at(g.env.mesh.coords(g.layout.sharded), dtype).trainable()
        return shares.init(mine, params, plain=True)

    def fn(out: Value, state: State) -> tuple[Value, State]:
        mine, (grads, factor) = state["params"].trainable(), _ready(out, dtype)
        grads = grads.map(lambda b: b * factor.to(b.dtype))
        new = grads if not shares.parts else grads.map(torch.zeros_like)
        for e, where, held in shares.of(mine.where):
            before, grad = (mine, grads) if held is None else (taken(mine, where), taken(grads, where))
            updates, own = e.updates(grad, before, out.ok, state[e.key], g.env.mesh)
            state = {**state, e.key: own}
            new = _with(new, updates, held)
        return rewritten(out, new), state

    def formula(out: Value, state: State) -> tuple[Value, State]:
        mine = state["params"].trainable()
        new, own, _ = stepped(shares, mine, scaled(out, g.env), out.ok, state, g.env.mesh)
        moved = {i: new[i] - x for i, x in mine.present().items()}
        return rewritten(out, pack(mine.where, moved, mine)), {**state, **own}

    g = g._replace(notes=noting(g, shares))
    not_here(g, name, "it is not the last optimizer")
    return after(g, name, g.layout, twofold(g, shares, fn, formula, last=False) if g.env.differentiable else fn, init)


def _not_before_another(g: Grad, shares: Shares) -> None:
    """Refuse a formula that needs whole leaves where only its plain pair could run, on rows.

    Raises:
      ChainError: leaves are cut here.
    """
    for e in shares.entries:
        if e.tx.formula is not None and e.tx.formula.across is not None and cuts_of(g):
            raise refuse(
                g,
                e.tx.name,
                f"leaves are cut over {cuts_of(g)} here, and only the last optimizer of a chain is handed whole ones;"
                " write it last, or a chain without shard (stage 0)",
            )


def apply_update(g: Grad, tx: Optimizer, elsewhere: Elsewhere | None = None) -> Grad:
    """The last optimizer: the masters are read and written only here. Right of it grads are new parameters.

    Args:
      elsewhere: (state of the chain, parameters) -> the rates, where another part of the state keeps them.
    """
    g, name, shares = shares_of(g, tx)
    dtype, donate = g.env.policy.params, g.env.donate

    def init(params: Lazy) -> State:
        masters = params.at(g.env.mesh.coords(g.layout.sharded), dtype)
        own = shares.init(masters.trainable(), params)
        return {"params": masters, **(own if elsewhere is None else {k: x._replace(rates=()) for k, x in own.items()})}

    def fn(out: Value, state: State) -> tuple[Updated, State]:
        masters: Slots = state["params"]
        old, own, logs = masters.trainable(), State(), out.logs
        having = shares.of(old.where)
        # all, before anything is written
        reads = [e.read(state, old, where, out.ok, donate, elsewhere) for e, where, _ in having]
        idle = all(e.tx.formula is IDLE for e, *_ in having)
        in_place = not idle and (shares.parts or having[0][0].tx.formula is not None)
        new = old if donate or not in_place else tree.clone(old)  # the same formula, on clones
        grads, factor = _ready(out, dtype)
        plain = grads.map(lambda b: b * factor.to(b.dtype)) if None in reads else grads  # which formulas write into
        if donate:
            old.begin_writing()  # whatever is written first, the masters tell that a state is used up
        for (e, where, held), reading in zip(having, reads, strict=True):
            if reading is None:
                before, grad = (old, plain) if held is None else (taken(old, where), taken(plain, where))
                updates, own[e.key] = e.updates(grad, before, out.ok, state[e.key], g.env.mesh)
                moved = tree.where(out.ok, before.map(torch.add, updates), before)
                new = _with(new, moved, held)
            else:
                mine = state[e.key] if donate or idle else _cloned(state[e.key])
                assert e.tx.formula is not None
                with span(e.key) if shares.parts else nullcontext():
                    own[e.key] = run(e.tx.formula, reading, new, grads, factor, mine, out.ok, held, g.env.mesh)
                logs = {**logs, "lr": reading.lr.to(out.ok.device)}
        params = new.with_frozen(masters)
        updated = Updated(out.loss, out.weight, out.aux, params, _norm_of(out), out.ok, out.bad, logs)
        return updated, {**state, **own, "params": params}

    def formula(out: Value, state: State) -> tuple[Updated, State]:
        masters: Slots = state["params"]
        old = masters.trainable()
        new, own, lr = stepped(shares, old, scaled(out, g.env), out.ok, state, g.env.mesh)
        params = pack(old.where, new, old).with_frozen(masters)
        logs = out.logs if lr is None else {**out.logs, "lr": lr.to(out.ok.device)}
        updated = Updated(out.loss, out.weight, out.aux, params, _norm_of(out), out.ok, out.bad, logs)
        return updated, {**state, **own, "params": params}

    if g.env.differentiable:
        not_here(g, name, "a differentiable step moves every leaf")
    if g.env.differentiable and elsewhere is not None:
        raise refuse(g, name, "its rates are kept by an engine; write a chain of its own for a differentiable step")
    applied = twofold(g, shares, fn, formula) if g.env.differentiable else left_alone(g, shares, fn)
    return after(g._replace(notes=noting(g, shares)), name, replace(g.layout, phase="updated"), applied, init)


def _with(whole: Slots, part: Slots, held: tuple[int, ...] | None) -> Slots:
    """The whole with one optimizer's leaves in it, in place; where it has all of them, these."""
    if held is None:
        return part
    put(whole, part)
    return whole


def _norm_of(out: Value) -> Tensor:
    """The norm for the metrics: as it was before a transform rewrote the gradient, nan where none remembers it."""
    if out.norm is not None:
        return out.norm
    return out.logs["grad_norm"] if "grad_norm" in out.logs else torch.full_like(out.loss, torch.nan)


def _cloned(own: Tree) -> Tree:
    """A state whose moments may be written; rates are made anew by whoever reads them."""
    return tree.clone(own._replace(rates=()))._replace(rates=own.rates)
