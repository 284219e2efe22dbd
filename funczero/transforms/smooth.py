"""Optimizers of plain torch operations, leaf by leaf: what a differentiable step's derivatives are taken of.

The values of the step are the driver's own (straight.py). Numbers that are one for all ranks, as rates and factors, are
varied before they meet a part of a leaf (comm/differentiable.py). An update that is skipped has the derivative of the
identity: its gradient is zero before the formula sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funczero.comm.adjoint import vary
from funczero.comm.differentiable import Varied, cut_axes, over_all, over_leaves, pack, unvary
from funczero.core import rng, tree
from funczero.core.held import differentiated, held_by
from funczero.core.optimizer import Formula, GradientTransformation
from funczero.core.straight import straight
from funczero.core.transform import refuse
from funczero.core.types import Env, Grad, State, Tree, Value
from funczero.layout.mesh import Mesh
from funczero.layout.slots import Slots
from funczero.transforms.shares import Shares

Leaves = dict[int, Tensor]  # by number
ONE = -1  # in place of a leaf's number: a number that is one for all ranks


def scaled(out: Value, env: Env) -> Leaves:
    """The gradient with its factor, in the masters' dtype; zero where the update is skipped."""
    dtype, each, grads = env.policy.params, Varied(out.grads.where, env.mesh, out.factor), {}
    for i, g in out.grads.present().items():
        wide = torch.promote_types(torch.promote_types(dtype, torch.float32), g.dtype)
        grads[i] = torch.where(out.ok, (g.to(wide) * each.of(i)).to(dtype), 0.0)
    return grads


def by_formula(
    formula: Formula, own: Tree, params: Slots, grads: Leaves, ok: Tensor, held: tuple[int, ...] | None, mesh: Mesh
) -> tuple[Leaves, Tree, Tensor]:
    """(new leaves, new state, the rate for the metrics) of an optimizer that has a smooth formula.

    Args:
      grads: with their factor.
      held: numbers of the leaves that it has; None: all that learn.
    """
    assert formula.smooth is not None
    one = torch.ones((), dtype=torch.float64, device=ok.device)
    reading, moments = formula.smooth.read(own, params, ok), formula.moments(own)
    new, scalars = formula.scalars(own, [group.rates for group in reading.groups], one, ok)
    masters, columns = params.present(), [m.present() for m in moments]
    moved, after = Leaves(), [dict(column) for column in columns]
    mine = [i for i in grads if held is None or i in held]
    for group, each in zip(reading.groups, scalars, strict=True):
        varied = Varied(params.where, mesh, each)
        for i in mine if group.leaves is None else group.leaves:
            p, ms = formula.smooth.leaf(masters[i], grads[i], [column[i] for column in columns], varied.of(i))
            moved[i] = torch.where(ok, p.to(masters[i].dtype), masters[i])  # a leaf without dims takes the rates' dtype
            for column, m, was in zip(after, ms, columns, strict=True):
                column[i] = torch.where(ok, m.to(was[i].dtype), was[i])
    found = {id(m): pack(m.where, column, m) for m, column in zip(moments, after, strict=True)}
    new = new._replace(**{name: found[id(x)] for name, x in new._asdict().items() if id(x) in found})
    return moved, new if reading.rates is None else new._replace(rates=reading.rates), reading.lr


def by_pair(
    tx: GradientTransformation, own: Tree, params: Slots, grads: Slots, ok: Tensor, mesh: Mesh
) -> tuple[Leaves, Tree]:
    """(updates, new state) of a pair that somebody wrote.

    What is one for all ranks, a count or a leaf that no axis cuts, is varied over all axes that cut some leaf, and made
    one for all again afterwards, since nobody knows what meets what inside.

    Raises:
      TypeError: its state holds a tensor of which nothing says whether it is a part or one for all.
    """
    where = params.where
    axes = tuple(a for a, n, _ in where.coords if n > 1)
    shared = {i: tuple(a for a in axes if a not in cut_axes(where, i)) for i in range(len(where.structure.leaves))}

    def over(x: Tree, way: Any) -> Tree:
        """Every tensor of a tree over the axes whose ranks all have it."""
        flat, form = tree.flatten(x)
        out, left = list(flat), list[tuple[int, int]]()
        for k, i in enumerate(_numbers(tx.name, x, params)):
            if i == ONE and flat[k].is_floating_point():
                out[k] = over_all(flat[k], axes, mesh, way)
            elif i is not None and i != ONE and flat[k].is_floating_point():
                left.append((k, i))
        while left:  # a tree like the parameters at a time; a tied leaf stands in it more than once
            first = {i: k for k, i in reversed(left)}
            found = over_leaves(where, {i: out[k] for i, k in first.items()}, shared.__getitem__, mesh, way)
            for i, k in first.items():
                out[k] = found[i]
            left = [(k, i) for k, i in left if first[i] != k]
        return tree.unflatten(out, form)

    updates, new = tx.update(over(grads.tree(), vary), over(own, vary), over(params.tree(), vary))
    flat = where.structure.treedef.flatten_up_to(over(updates, unvary))
    learns = [i for i in where.structure.places if not where.structure.frozen(i)]
    moved = {i: x for i, x in zip(where.structure.places, flat, strict=True) if i in learns}
    kept = tree.map(lambda n, o: torch.where(ok, n, o) if isinstance(n, Tensor) else n, over(new, unvary), own)
    return moved, kept


def _numbers(name: str, x: Tree, params: Slots) -> list[int | None]:
    """By leaf of a tree: which parameter it lies like, ONE for a number of all ranks, None for no tensor."""
    where, out = params.where, list[int | None]()
    places = where.structure.places
    shapes = [where.slots[i].shape if not where.structure.frozen(i) else (0,) for i in places]

    def like(node: Any) -> bool:
        """A tree, or a list of leaves, like the parameters; shapes alone might be anything's."""
        flat, form = tree.flatten(node)
        alike = form == where.structure.treedef or type(node) in (list, tuple)
        return alike and [tuple(y.shape) if isinstance(y, Tensor) else None for y in flat] == shapes

    for node in tree.leaves(x, is_leaf=like):
        if like(node):
            out += places
        elif isinstance(node, Tensor) and node.dim() and any(n > 1 for _, n, _ in where.coords):
            why = "and nothing says whether it is a part of something or one for all ranks"
            raise TypeError(
                f"differentiable: the state of {name} holds a tensor of shape {tuple(node.shape)}, {why}; keep numbers"
                " (0-d), and trees like the parameters"
            )
        else:
            out.append(ONE if isinstance(node, Tensor) else None)
    return out


def twofold(
    g: Grad, shares: Shares, fn: Callable[..., Any], formula: Callable[..., Any], last: bool = True
) -> Callable[..., Any]:
    """fn with the derivatives of the formula, which is given what the optimizers read and write of the state.

    Args:
      last: False: the updates are the gradient of another optimizer.

    Raises:
      ChainError: an optimizer has a kernel, and no formula of plain operations beside it.
    """
    for e in shares.entries:
        if e.tx.formula is not None and not last:
            why = "its updates would be the gradient of the next optimizer, and have no derivative"
            raise refuse(g, e.tx.name, f"{why}; write a pair of plain operations (fz.lift) in its place")
        if e.tx.formula is not None and e.tx.formula.smooth is None:
            why = "its update is a kernel that torch.func cannot differentiate"
            raise refuse(g, e.tx.name, f"{why}; write fz.adamw, fz.sgd or a pair of plain operations (fz.lift)")
        if e.tx.formula is None and (e.by_leaf is not None or e.tx.needs == "whole" and g.layout.sharded):
            why = "it is handed whole leaves, and what travels for them has no derivative"
            raise refuse(g, e.tx.name, f"{why}; write a chain without shard, and a pair without needs=")
    names = ("params", *(e.key for e in shares.entries))

    def value(out: Value, state: State) -> Any:  # the driver writes into gradients, which are kept here
        return fn(out._replace(grads=tree.clone(out.grads)), state)

    def both(out: Value, state: State) -> tuple[Any, State]:
        for e in shares.entries:
            _nothing_held(e.tx)
        given = tree.map(_still, out) if rng.known(out.ok) == 0 else out  # else 0 times inf comes back from it
        found, own = straight(value, formula, given, {k: state[k] for k in names})
        return found._replace(loss=out.loss, weight=out.weight, aux=out.aux), {**state, **own}

    return both


def _nothing_held(tx: GradientTransformation) -> None:
    """Refuse a pair or a schedule that somebody wrote around a tensor that is differentiated.

    Raises:
      TypeError: the derivative by that tensor would be lost.
    """
    smooth = None if tx.formula is None else tx.formula.smooth
    for x in held_by(tx.update if smooth is None else smooth.read, owned=True):
        if isinstance(x, Tensor) and differentiated(x):
            what = "its update" if smooth is None else "a schedule of it"
            why = f"captures a tensor of shape {tuple(x.shape)}, whose derivative would be lost"
            remedy = "keep the number in its state, as a rate is (step.with_state)"
            raise TypeError(f"differentiable: {tx.name}: {what} {why}; {remedy}")


def _still(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def stepped(
    shares: Shares, old: Slots, grads: dict[int, Tensor], ok: Tensor, state: State, mesh: Mesh
) -> tuple[dict[int, Tensor], State, Tensor | None]:
    """(new leaves, the optimizers' new states, the last one's rate) of plain operations.

    Args:
      grads: by leaf number, with their factor.
    """
    leaves, own, lr = old.present(), State(), None
    for e, where, held in shares.of(old.where):
        mine = {i: g for i, g in grads.items() if held is None or i in held}
        if e.tx.formula is not None:
            moved, own[e.key], lr = by_formula(e.tx.formula, state[e.key], old, mine, ok, held, mesh)
            leaves |= moved
            continue
        part = old if held is None else pack(where, {i: leaves[i] for i in mine}, old)
        updates, own[e.key] = by_pair(e.tx, state[e.key], part, pack(part.where, mine, part), ok, mesh)
        leaves |= {i: torch.where(ok, leaves[i] + u.to(leaves[i].dtype), leaves[i]) for i, u in updates.items()}
    return leaves, own, lr
