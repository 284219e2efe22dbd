"""An optimizer's formula, run on pieces of a tree of parameters; and the plain pair that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.optimizer import Formula, GradientTransformation, Needs, Reading
from funczero.core.types import Tree
from funczero.layout.mesh import Mesh
from funczero.layout.slots import Slots
from funczero.transforms.leafwise import on_whole, run_across

IDLE = Formula(
    lambda own, params, ok, donate: Reading([], None, ok),
    lambda own: [],
    lambda own, rates, factor, ok: (own, []),
    lambda *piece: None,
)  # of an optimizer that moves nothing and keeps nothing: nothing needs to be copied for it


def run(
    formula: Formula,
    read: Reading,
    params: Slots,
    grads: Slots,
    factor: Tensor,
    own: Tree,
    ok: Tensor,
    held: tuple[int, ...] | None = None,
    mesh: Mesh | None = None,
) -> Tree:
    """A formula on all pieces, in place on params, grads and the state's moments; returns the new state.

    Args:
      held: numbers of the leaves that the optimizer has; None: all.
      mesh: what a formula with `across` sends over.
    """
    own, scalars = formula.scalars(own, [group.rates for group in read.groups], factor, ok)
    trees = (params, grads, *formula.moments(own))
    if formula.across is not None:
        assert mesh is not None
        run_across(formula, read, trees, own, scalars, held, mesh)
        return own if read.rates is None else own._replace(rates=read.rates)
    for group, each in zip(read.groups, scalars, strict=True):
        ps, gs, *moments = pieces(trees, held if group.leaves is None else group.leaves, formula.by_leaf)
        formula.leaf(ps, gs, moments, each)
    return own if read.rates is None else own._replace(rates=read.rates)


def pieces(trees: Sequence[Slots], leaves: tuple[int, ...] | None, by_leaf: bool = False) -> list[list[Tensor]]:
    """What these leaves of every tree are, in the same order: whole buffers where all of a unit's leaves are among
    them, else padded slots.

    Args:
      leaves: numbers; None: all that have a gradient.
      by_leaf: leaves in their shapes instead.
    """
    where = trees[0].where
    if by_leaf:
        wanted = (
            [i for i in range(len(where.structure.leaves)) if not where.structure.frozen(i)]
            if leaves is None
            else leaves
        )
        return [[x for i in wanted if (x := parts[i]) is not None] for parts in (t.leaves() for t in trees)]
    if leaves is None:
        kept = [u for u, x in enumerate(trees[1].buffers) if x.numel()]
        return [[t.buffers[u] for u in kept] for t in trees]
    plan = where.memo.get(("pieces", leaves))
    if plan is None:
        chosen = set(leaves)
        plan = where.memo["pieces", leaves] = [
            piece
            for u, members in enumerate(where.structure.members)
            for piece in (
                [(u, -1)]
                if members and chosen.issuperset(members)
                else [(u, i) for i in members if i in chosen and where.slots[i].length]
            )
        ]
    return [
        [
            t.buffers[u] if i < 0 else t.buffers[u].narrow(0, t.where.slots[i].offset, t.where.slots[i].length)
            for u, i in plan
        ]
        for t in trees
    ]


def optimizer(
    name: str, init: Callable[[Tree], Tree], formula: Formula, needs: Needs = "elementwise"
) -> GradientTransformation:
    """The pair of a formula: `update` is the formula in float64 on copies, and its updates are the differences,
    rounded once.
    """

    def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        (flat, treedef), held = tree.flatten(params), formula.moments(state)
        states = [] if formula.across is None else formula.across.own(state)
        ok = torch.ones((), dtype=torch.bool, device=flat[0].device if flat else "cpu")
        read = formula.read(state, params, ok, False)
        state, scalars = formula.scalars(
            state, [group.rates for group in read.groups], torch.ones((), dtype=torch.float64, device=ok.device), ok
        )
        columns = [[x.detach().to(torch.float64, copy=True) for x in tree.leaves(t)] for t in (params, grads, *held)]
        by_path = [{path: x.detach().to(torch.float64, copy=True) for path, x in s.items()} for s in states]
        numbers = {path: i for i, (path, _) in enumerate(tree.paths(params))}
        for group, own in zip(read.groups, scalars, strict=True):
            leaves = [*range(len(flat))] if group.leaves is None else [*group.leaves]
            ps, gs, *moments = [[column[i] for i in leaves] for column in columns]
            if formula.across is None:
                formula.leaf(ps, gs, moments, own)
            else:
                by_leaf = [{numbers[path]: x for path, x in s.items()} for s in by_path]
                on_whole(formula, [ps, gs, *moments], leaves, by_leaf, own)
        new = {
            id(x): y.to(x.dtype)
            for t, ys in zip((*held, *states), (*columns[2:], *([*s.values()] for s in by_path)), strict=True)
            for x, y in zip(tree.leaves(t), ys, strict=True)
        }
        updates = [(y - x.double()).to(x.dtype) for x, y in zip(flat, columns[0], strict=True)]
        state = tree.map(lambda x: new.get(id(x), x), state)
        return tree.unflatten(updates, treedef), state if read.rates is None else state._replace(rates=read.rates)

    return GradientTransformation(init, update, formula, name, needs)
