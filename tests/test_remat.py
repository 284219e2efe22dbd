"""The remat form: a block saves its inputs alone and runs again as it ran first, in whatever surroundings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import funczero as fz
from funczero import P, rng, tree
from funczero.testing import simulate, tree_hash

BLOCKS, N = 3, 6


def params():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g) / 3
    return {"in": draw(4, N), "blocks": [{"w": draw(N, N), "b": draw(N)} for _ in range(BLOCKS)]}


def rows():
    return {"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(1))}


def block(p, x, shift=0.0):
    return x + torch.tanh(x @ p["w"] + p["b"]) + shift


def updated(loss, world, units="blocks", **kw):
    """Whole masters after an update."""
    grad = fz.value_and_grad(loss, batch=P("data"), units=units, **kw)
    step = fz.train_step(fz.shard("data", grad, fz.sgd(0.5)), mesh={"data": world})
    state, _ = step(step.init(params(), key=3), step.local_rows(rows()))
    return step.params(state)


def total(h):
    return h.square().sum(), torch.tensor(float(len(h)))


def counted(world, remat):
    """How often each block ran in a forward and in all of an update; and what hooks saw that autograd keeps."""
    ran, kept = [], []

    def one(p, x):
        ran.append(int(p["b"].requires_grad))
        return block(p, x)

    def loss(p, b):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
            h = fz.layers(one, p["blocks"], b["x"] @ p["in"], remat=remat)
        forward.append(len(ran))
        return total(h)

    forward = []
    updated(loss, world)
    return forward[0], len(ran), kept


def test_a_block_runs_twice_and_keeps_its_inputs_alone():
    inputs = [(2, N)] * BLOCKS
    for forward, all_, kept in simulate({"data": 2})(counted, 2, True):
        assert (forward, all_) == (BLOCKS, 2 * BLOCKS)
        assert [shape for shape in kept if shape == (2, N)] == inputs  # and the first product's own operands
        assert set(kept) <= {(2, N), (2, 4), (4, N)}
    for forward, all_, _ in simulate({"data": 2})(counted, 2, False):
        assert (forward, all_) == (BLOCKS, BLOCKS)


# --- the same function twice ------------------------------------------------------------------------------------------
def autocast(p, x):
    """Its products follow where the forward runs."""
    return block(p, x).float()


def keyed(p, x, key):
    return rng.dropout(block(p, x), 0.5, key)


def drawn(p, x):
    """Draws from torch's generator, which a keyed loss has."""
    return torch.nn.functional.dropout(block(p, x), 0.5)


def aware(p, x):
    """Computes with the default dtype."""
    return block(p, x) * torch.tensor(1.0).div(3).to(x.dtype)


def loss_of(name, remat):
    def loss(p, b, *key):
        h = b["x"] @ p["in"]
        if name == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return total(fz.layers(autocast, p["blocks"], h, remat=remat).float())
        if name == "default dtype":
            torch.set_default_dtype(torch.float64)
            try:
                return total(fz.layers(aware, p["blocks"], h, remat=remat))
            finally:
                torch.set_default_dtype(torch.float32)
        if name == "a key a block":
            return total(fz.layers(keyed, p["blocks"], h, key=key[0], remat=remat))
        if name == "torch's generator":
            return total(fz.layers(drawn, p["blocks"], h, remat=remat))
        return total(fz.layers(block, p["blocks"], h, torch.tensor(0.25), remat=remat))

    return loss


NAMES = ["plain", "autocast", "default dtype", "a key a block", "torch's generator"]


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_plain_loop_bit_for_bit(name):
    """Closed and open, over one rank and two; a world has draws of its own."""
    draws = name in ("a key a block", "torch's generator")
    run = lambda world, units, remat: tree_hash(updated(loss_of(name, remat), world, units, rng=draws))
    # a default dtype belongs to the process, and ranks are threads here
    for world in (1,) if name == "default dtype" else (1, 2):
        forms = [("blocks", True), ("blocks", False), ((), True)]
        found = [simulate({"data": world})(run, world, *form) for form in forms]
        assert len({h for hs in found for h in hs}) == 1, found


def test_numpy_in_a_block_that_runs_again_is_refused():
    def one(p, x):
        return x * p["w"] * float(np.random.rand() > 2)

    g = fz.value_and_grad(
        lambda p, b, key: (fz.layers(one, p["blocks"], b, remat=True).sum(), torch.ones(())), batch=P("data"), rng=True
    )
    step = fz.train_step(g, fz.all_reduce("data"), fz.sgd(0.1), mesh={"data": 1})
    with pytest.raises(
        RuntimeError,
        match=(
            "runs again in the backward \\(remat\\) draws from numpy's global generator, and would draw other numbers"
            " then"
        ),
    ):
        step(step.init({"blocks": [{"w": torch.ones(N)}]}), torch.ones(2, N))


def test_gradients_reach_inputs_and_what_blocks_share():
    """Trees, integers and values that need no gradient among them."""

    def one(p, x, extra):
        return {"h": block(p, x["h"][:, x["order"]], extra["shift"]), "order": x["order"]}

    def loss_with(remat):
        def loss(p, b):
            x = {"h": b["x"] @ p["in"], "order": torch.arange(N).flip(0)}
            out = fz.layers(one, p["blocks"], x, {"shift": p["in"].sum(0), "none": None}, remat=remat)
            return total(out["h"])

        return loss

    for world in (1, 2):
        found = [simulate({"data": world})(updated, loss_with(remat), world) for remat in (False, True)]
        assert len({tree_hash(x) for each in found for x in each}) == 1


def test_without_a_gradient_a_block_runs_once():
    ran = []

    def one(p, x):
        ran.append(1)
        return block(p, x)

    def loss(p, b):
        with torch.no_grad():
            still = fz.layers(one, p["blocks"], b["x"] @ p["in"], remat=True)
        return total(still + b["x"] @ p["in"])

    moved = updated(loss, 1)
    assert len(ran) == BLOCKS
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(moved["blocks"]), tree.leaves(params()["blocks"])))
