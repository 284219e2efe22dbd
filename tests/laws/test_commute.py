"""Linear transforms in any order, bracketed in any way, give the same sum; only nonlinear ones have a place."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P
from funczero.core import order

NEST = {"node": 2, "local": 2}


def orders():
    """Every order of two accumulates and two reductions; and ways to scatter and gather in between."""
    acc, ar, rs, ag = fz.accumulate, fz.all_reduce, fz.reduce_scatter, fz.all_gather
    parts = {"acc": acc(2), "node": ar("node"), "local": ar("local")}
    g = fz.value_and_grad(zoo.loss_plain, batch=P(("node", "local")), units=("blocks",))
    return {
        " ".join(names): (g, *(parts[n] for n in names))
        for names in sorted(set(permutations(("acc", "acc", "node", "local"))))
    } | {
        "rs acc ag": (g, rs("node"), acc(2), ag("node"), ar("local"), acc(2)),
        "rs rs acc ag ag": (g, rs("node"), rs("local"), acc(4), ag("local"), ag("node")),
        "acc rs acc ar ag": (g, acc(2), rs("local"), acc(2), ar("node"), ag("local")),
        "acc rs rs ag ag": (g, acc(4), rs("local"), rs("node"), ag("node"), ag("local")),
    }


def distances():
    """By order: the largest distance of the gradient from that of the whole batch on one rank."""
    flat, batch = lambda out: torch.cat([x.flatten() for x in out.grads.leaves()]), zoo.batch(0, torch.float64, 16)
    want, found = flat(zoo.Sums(fz.value_and_grad(zoo.loss_plain, replicated=tuple(NEST)), mesh=NEST)(batch)), {}
    for name, parts in orders().items():
        sums = zoo.Sums(*parts, mesh=NEST)
        found[name] = (flat(sums(order.deal(batch, sums.grad.layout, sums.mesh.index))) - want).abs().max().item()
    return found


def test_all_orders_of_linear_transforms_agree(run_world):
    for found in run_world(4, distances):
        assert len(found) == 16 and {n: d for n, d in found.items() if not d < 1e-13} == {}


@pytest.mark.parametrize("left", ["accumulate(2), all_reduce('data')", "all_reduce('data'), accumulate(2)"])
def test_a_clip_has_a_place(left):
    """The counterexample: a clip is refused among sums, whichever order they are in."""
    parts = {"accumulate(2)": fz.accumulate(2), "all_reduce('data')": fz.all_reduce("data")}
    g, (a, b) = fz.value_and_grad(zoo.loss_plain, batch=P("data")), (parts[n] for n in left.split(", "))
    with pytest.raises(fz.ChainError):
        fz.train_step(g, a, fz.clip_by_global_norm(1.0), b, fz.adamw(1e-3), mesh={"data": 2})
