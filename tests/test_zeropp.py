"""ZeRO++ by name: without rounding it is ZeRO-3, replicas stay equal under every wire, and bytes are a closed form."""

from __future__ import annotations

import pytest
import torch
import zoo
from cover import EACH

import funczero as fz
from funczero import P
from funczero.comm.wire import as_born
from funczero.testing import simulate, tree_hash

BOTH = ("node", "local")
FORMS = {"once": {}, "each": {"each": True}, "everywhere": {"secondary": False}}
SAME = as_born._replace(name="same")


def chains(how, accumulate=1, units=("blocks",)):
    """ZeRO-3 within nodes first, and ZeRO++ through a wire that changes nothing."""
    g, acc = zoo.source(BOTH, units=units), () if accumulate == 1 else (fz.accumulate(accumulate),)
    zero3 = (fz.shard("local", fz.shard("node", g, *acc, *zoo.tx())),)
    return zero3, fz.zeropp(g, *zoo.tx(), weights=(SAME, SAME), gradients=SAME, accumulate=accumulate, **how)


def exact(how, mesh, accumulate):
    size = mesh["node"] * mesh["local"]
    return [zoo.bits(zoo.train(c, mesh, updates=3, micros=size * accumulate)) for c in chains(how, accumulate)]


@pytest.mark.parametrize("form", ["once", *(pytest.param(f, marks=pytest.mark.slow) for f in ("each", "everywhere"))])
@EACH
def test_without_rounding_it_is_bitwise_zero_3(run_world, form, whole):
    """With `whole` on eight ranks, too."""
    zero3, zeropp = zoo.everywhere(run_world, 4, exact, FORMS[form], {"node": 2, "local": 2}, 2)
    assert zero3 == zeropp
    if not whole:
        return
    mesh = {"node": 2, "local": 4}
    assert len({found for rank in simulate(mesh)(exact, FORMS[form], mesh, 1) for found in rank}) == 1


# --- constants and replicas -------------------------------------------------------------------------------------------
def constant(mesh, wires, form):
    """A gradient of one value everywhere: its mean, of odd leaves."""
    tree = {"a": torch.zeros(37, 5), "b": torch.zeros(3), "c": torch.zeros(())}
    loss = lambda p, b: (sum((x * 0.3 * r).sum() for x in p.values() for r in b["x"]), b["x"].sum())
    g = fz.value_and_grad(loss, batch=P(BOTH))
    step = fz.train_step(*fz.zeropp(g, fz.sgd(1.0), gradients=wires, weights=as_born, **form), mesh=mesh)
    state = step.init(tree)
    state, _ = step(state, {"x": torch.ones(1)})
    return [x.unique().tolist() for x in fz.tree.leaves(step.params(state))]


QUICK = ((1, 3), (3, 1), (2, 2))
SIZES = [
    (x, y) if (x, y) in QUICK else pytest.param(x, y, marks=pytest.mark.slow) for x in range(1, 5) for y in range(1, 5)
]


@pytest.mark.parametrize(("across", "within"), SIZES)
def test_a_constant_gradient_comes_out_constant(across, within):
    mesh = {"node": across, "local": within}
    for wires in (fz.int8(16), (fz.int8(64), fz.int4(16)), fz.fp8(16)):
        out = simulate(mesh)(constant, mesh, wires, {})
        want = out[0][0]
        assert all(rank == [want] * 3 for rank in out) and len(want) == 1
        assert abs(want[0] + 0.3) < 1e-6


def replicas(name):
    """What several ranks hold of uncut leaves after some updates, and the views that they read."""
    g, wires = zoo.source(BOTH), WIRES[name]()
    chain = fz.zeropp(g, *zoo.tx(), threshold=30, weights=(wires, wires), gradients=wires)
    step = fz.train_step(*chain, mesh={"node": 2, "local": 2})
    state = step.init(zoo.params(), key=7)
    for t in range(3):
        state, _ = step(state, step.local_rows(zoo.batch(t, micros=4)))
    where = state.params.where
    whole = [i for i in range(len(where.structure.leaves)) if set(where.replicas(i)) == set(BOTH)]
    kept = [x for i, x in enumerate(state.params.leaves()) if i in whole]
    return tree_hash(kept), tree_hash(fz.tree.leaves(step.whole_views(state))), len(kept)


WIRES = {
    "int8": lambda: fz.int8(16),
    "int4": lambda: fz.int4(48),
    "int4, stochastic": lambda: fz.int4(16, stochastic=True),
    "int4, hadamard": lambda: fz.int4(32, hadamard=16),
    "fp8": lambda: fz.fp8(64),
}


@pytest.mark.parametrize("name", WIRES)
def test_replicas_stay_bitwise_equal_under_every_wire(run_world, name):
    found = run_world(4, replicas, name)
    assert len(set(found)) == 1 and found[0][2] > 4


# --- bytes ------------------------------------------------------------------------------------------------------------
BLOCKS, WIDE = 4, 64


def across(chain, mesh, micros):
    """Bytes that one update sends across nodes, as (gathered, scattered)."""
    tree = {"blocks": [{"w": torch.zeros(WIDE, WIDE)} for _ in range(BLOCKS)]}
    policy, alone = "params=float32,compute=bfloat16,accumulate=float32", fz.Link(latency=0.0)
    step = fz.train_step(*chain, mesh=mesh, policy=policy, link=alone)
    state, rows = step.init(tree), {"x": torch.ones(micros, WIDE, dtype=torch.bfloat16)}
    with fz.count_bytes(step) as sent:
        state, _ = step(state, rows)
    parts = [sum(n for k, n in sent.items() if k[:2] == ("node", verb)) for verb in ("all_gather", "reduce_scatter")]
    return *parts, str(sent)


def loss(p, b):
    x = fz.layers(lambda q, x: x @ q["w"], p["blocks"], b["x"])
    return x.float().sum(), torch.full((), float(len(x)))


def models(k):
    """Chains by name, with the bytes that each parameter takes across nodes in an update of k micro-batches."""
    g, acc = fz.value_and_grad(loss, batch=P(BOTH), units=("blocks",)), () if k == 1 else (fz.accumulate(k),)
    half, tx = fz.cast("bfloat16"), (fz.adamw(1e-3),)
    # a forward gathers every block, a backward all but the last, which is here, and the first, which it does not read
    opens = (2 * BLOCKS - 2) / BLOCKS
    zeropp = lambda **how: fz.zeropp(g, *tx, accumulate=k, **how)
    news = fz.difference(fz.int4(512))
    return {
        "differences": (zeropp(weights=news, gradients=fz.int4(512)), 0.5 + 4 / 512, 0.5 + 4 / 512),
        "ZeRO-3": ((fz.shard("local", fz.shard("node", g, *acc, *tx, scatter=half)),), 2 * k * opens, 2 * k),
        "hpZ": (zeropp(weights=as_born, gradients=(as_born, half), each=True), 2, 2 * k),
        "+ qwZ": (zeropp(weights=fz.int8(512), gradients=(as_born, half), each=True), 1 + 2 / 512, 2 * k),
        "+ qgZ": (zeropp(weights=fz.int8(512), gradients=fz.int4(512), each=True), 1 + 2 / 512, k * (0.5 + 4 / 512)),
        "ZeRO++ once": (zeropp(weights=fz.int8(512), gradients=fz.int4(512)), 1 + 2 / 512, 0.5 + 4 / 512),
    }


def counted(k, mesh):
    crossing = BLOCKS * WIDE * WIDE / mesh["local"] * (mesh["node"] - 1) / mesh["node"]  # values a rank sends, once
    out = {}
    for name, (chain, gathers, scatters) in models(k).items():
        gathered, scattered, table = across(chain, mesh, k)
        out[name] = (gathered, scattered, gathers * crossing, scatters * crossing)
    return out, table


@pytest.mark.parametrize("k", [1, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 4, 16))])
def test_bytes_across_nodes_are_the_closed_form(k):
    mesh = {"node": 2, "local": 2}
    for found, table in simulate(mesh)(counted, k, mesh):
        for name, (gathered, scattered, gathers, scatters) in found.items():
            assert (gathered, scattered) == (gathers, scatters), name
        assert found["ZeRO++ once"][0] + found["ZeRO++ once"][1] < 0.77 / 2 * found["hpZ"][0] * 2
        assert "int8(512)" in table and "16 bits would be" in table
