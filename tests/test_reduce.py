"""Sums over ranks, as transforms: whole, scattered and joined again; what they say of themselves."""

from __future__ import annotations

import torch
import zoo

import funczero as fz
from funczero import P
from funczero.layout.processes import world_size

MESH = {"data": -1}


def explicit():
    """A bracket is its two edges: reduce_scatter, and all_gather of the new parameters."""
    g, k = zoo.source(), zoo.MICROS // world_size()
    rs, ag = fz.reduce_scatter("data"), fz.all_gather("data")
    runs = {
        "bracket": (g, fz.accumulate(k), fz.shard("data", *zoo.tx())),
        "edges": (g, fz.accumulate(k), rs, *zoo.tx(), ag),
        "gathered gradients": (g, fz.accumulate(k), rs, ag, *zoo.tx()),
        "clipped in a bracket, applied whole": (g, fz.accumulate(k), fz.shard("data", zoo.tx()[0]), zoo.tx()[1]),
        "all_reduce": (g, fz.accumulate(k), fz.all_reduce("data"), *zoo.tx()),
    }
    return {name: zoo.bits(zoo.train(parts, MESH, updates=3)) for name, parts in runs.items()}


def test_a_bracket_is_its_two_edges(run_world):
    alone = explicit()
    assert len(set(alone.values())) == 1 and zoo.everywhere(run_world, 2, explicit) == alone


def sums():
    """This rank's gradient after each verb: its number on every rank is the rank's plus one."""
    mesh, out = {"data": 4}, {}
    tree = {"w": torch.zeros(6, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    g = fz.value_and_grad(lambda p, b: ((p["w"].sum() + p["b"]) * b["x"].sum(), torch.ones(())), batch=P("data"))
    for name, parts in {
        "none": (g,),
        "ar": (g, fz.all_reduce("data")),
        "rs": (g, fz.reduce_scatter("data")),
        "rs ag": (g, fz.reduce_scatter("data"), fz.all_gather("data")),
    }.items():
        s = zoo.Sums(*parts, mesh=mesh, tree=tree)
        w, b = s({"x": torch.tensor([s.mesh.index("data") + 1.0], dtype=torch.float64)}).grads.leaves()
        out[name] = w.tolist(), b.item()
    return out


def test_what_every_rank_holds_after_each(run_world):
    for rank, found in enumerate(run_world(4, sums)):
        mine = rank + 1.0
        assert found["none"] == ([mine] * 6, mine) and found["ar"] == ([10.0] * 6, 10.0) == found["rs ag"]
        assert found["rs"] == ([10.0] * (2 if rank < 3 else 0), 10.0)


def test_reductions_are_shown_at_their_arrows():
    g2 = fz.value_and_grad(zoo.loss_plain, batch=P(("node", "local")))
    step = fz.train_step(
        g2,
        fz.reduce_scatter("local"),
        fz.accumulate(2),
        fz.all_reduce("node"),
        fz.sgd(1.0),
        fz.all_gather("local"),
        mesh={"node": 2, "local": 4},
    )
    assert [a.describe() for a in step.grad.arrows] == [
        "sum, unreduced over ['node', 'local']",
        "sum, unreduced over ['node'], sharded over ['local'], of 4 micro-batches",
        "sum, unreduced over ['node'], sharded over ['local'], of 8 micro-batches",
        "sum, sharded over ['local'], of 16 micro-batches",
        "mean, sharded over ['local'], of 16 micro-batches",
        "new parameters, sharded over ['local'], of 16 micro-batches",
        "new parameters, of 16 micro-batches",
    ]
    assert step.grad.layout.order == (("local", 4), ("accumulate", 2), ("node", 2))
