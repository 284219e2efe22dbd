"""The keep form: what a block saved of its unit is read again from a buffer that is gathered again, in any layout."""

from __future__ import annotations

import gc

import pytest
import torch
from modules import Alive

import funczero as fz
from funczero import P, tree
from funczero.layout.where import Where
from funczero.testing import simulate

BLOCKS, N = 4, 6
TWO = {"data": 2}


def params():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64) / 3
    return {"blocks": [{"w": draw(N, N), "b": draw(N), "g": draw()} for _ in range(BLOCKS)]}


def rows():
    return {"x": torch.randn(4, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


USES = {  # what autograd saves of the weights: views of many strides, values of its own, and both at once
    "whole": lambda p, x: torch.tanh(x @ p["w"] + p["b"]) * p["g"],
    "transposed": lambda p, x: torch.tanh(x @ p["w"].mT) * p["b"],
    "narrow": lambda p, x: torch.tanh(x[:, :3] @ p["w"][1:4, ::2].repeat(1, 2)) * p["b"][2:].repeat(2)[:N],
    "expanded": lambda p, x: x * p["g"].expand(4, N)[: len(x)] * p["b"].expand(len(x), N),
    "diagonal": lambda p, x: torch.sin(x * p["w"].diagonal()) * p["w"].sum(),
    "twice": lambda p, x: torch.tanh(x @ p["w"]) @ p["w"] * p["g"],
    "a copy": lambda p, x: torch.tanh(x @ p["w"].clone().contiguous()) + p["b"].exp(),
    "joined": lambda p, x: torch.tanh(x @ torch.cat([p["w"][:3], p["w"][3:]])) * p["b"],
    "a norm": lambda p, x: torch.nn.functional.layer_norm(x @ p["w"], (N,), p["b"], p["w"][0]),
    "one leaf alone": lambda p, x: torch.sin(x) * p["g"],
}


def gradients(block, units, sizes):
    """Of one update, by leaf, after a loss through all blocks."""
    loss = lambda p, b: (fz.layers(block, p["blocks"], b["x"]).square().sum(), torch.tensor(float(len(b["x"]))))
    grad = fz.value_and_grad(loss, batch=P("data"), units=units)
    step = fz.train_step(*fz.zero(grad, fz.sgd(1.0), stage=3), mesh=sizes, policy="float64")
    state, m = step(step.init(params()), step.local_rows(rows()))
    moved = dict(tree.paths(step.params(state)))
    return {n: x - moved[n] for n, x in tree.paths(params())}, m.loss.item()


def by_hand(block):
    p = tree.map(lambda x: x.requires_grad_(), params())
    h = rows()["x"]
    for q in p["blocks"]:
        h = block(q, h)
    named = dict(tree.paths(p))
    found = torch.autograd.grad(h.square().sum() / 4, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(named.items(), found, strict=True)}


@pytest.mark.parametrize("name", USES)
def test_gradients_are_plain_torchs_whatever_a_block_saves(name):
    want = by_hand(USES[name])
    for world in (1, 2):
        for found, _ in simulate({"data": world})(gradients, USES[name], "blocks", {"data": world}):
            for n, g in want.items():
                torch.testing.assert_close(found[n], g, rtol=1e-12, atol=1e-12)


def held(remat):
    """How many whole units are in memory when the loss is computed, and the most of a whole update."""
    seen = []
    block = USES["whole"]

    def loss(p, b):
        h = fz.layers(block, p["blocks"], b["x"], remat=remat)
        gc.collect()
        seen.append(len(alive.live))
        return h.square().sum(), torch.ones(())

    step = fz.train_step(
        *fz.zero(fz.value_and_grad(loss, batch=P("data"), units="blocks"), fz.sgd(1.0), stage=3),
        mesh=TWO,
        policy="float64",
    )
    state = step.init(params())
    (length,) = set(Where.whole(state.params.where.structure).lengths[1:])
    with Alive((length,)) as alive:
        step(state, step.local_rows(rows()))
        gc.collect()
    return seen, alive.most, len(alive.live)


@pytest.mark.parametrize(("remat", "left"), [(False, 1), (True, 0)], ids=["keep", "remat"])
def test_after_a_forward_only_the_last_block_may_be_open(remat, left):
    """What the others saved is coordinates."""
    for seen, most, after in simulate(TWO)(held, remat):
        assert seen == [left] and most <= 2 and after == 0


def saved():
    """Shapes that autograd keeps of a forward through the blocks, as hooks around it see them."""
    kept = []

    def loss(p, b):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
            h = fz.layers(USES["whole"], p["blocks"], b["x"])
        return h.square().sum(), torch.ones(())

    grad = fz.value_and_grad(loss, batch=P("data"), units="blocks")
    step = fz.train_step(*fz.zero(grad, fz.sgd(1.0), stage=3), mesh=TWO, policy="float64")
    step(step.init(params()), step.local_rows(rows()))
    return kept


def test_hooks_around_blocks_see_no_gathered_values():
    """A hook that moved what is saved elsewhere would hold the whole model."""
    assert simulate(TWO)(saved) == [[], []]
