"""Sums over ranks, as transforms: whole, scattered and joined again; what they say of themselves."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P
from funczero.core.transform import after
from funczero.core.types import Updated
from funczero.layout.processes import world_size
from funczero.testing import tree_hash

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


def chain_of(k):
    """A printed chain of k micro-batches, and the weights after an update of it and of one that says both halves."""
    both = {"all_reduce": (fz.all_reduce("data"),), "halves": (fz.reduce_scatter("data"), fz.all_gather("data"))}
    found, over = {}, (fz.accumulate(k),) if k > 1 else ()
    for name, parts in both.items():
        step = fz.train_step(zoo.source(), *over, *parts, *zoo.tx(), mesh=MESH)
        state = step.init(zoo.params())
        state, _ = step(state, step.local_rows(zoo.batch(0, micros=2 * k)))
        found[name] = zoo.whole(state.params, step.live_mesh)
    step = fz.train_step(zoo.source(), *over, fz.all_reduce("data"), *zoo.tx(), mesh=MESH)
    return str(step), tree_hash(found["all_reduce"]), tree_hash(found["halves"])


@pytest.mark.parametrize("k", [1, 2])
def test_a_sum_right_of_a_gradient_is_scattered_as_its_units_arrive(run_world, k):
    for shown, one, other in run_world(2, chain_of, k):
        gradient, said = next(x.split("->") for x in shown.splitlines() if "value_and_grad" in x)
        assert ("sharded over ['data']" in said) == (k == 1), shown
        assert one == other


# --- what a transform has seen ----------------------------------------------------------------------------------------
def spied(seen):
    """A transform of a user's that keeps what it sees, and copies of it."""

    def transform(g):
        def fn(out, state):
            slots = out.params if isinstance(out, Updated) else out.grads
            seen.append((slots.buffers, [b.clone() for b in slots.buffers]))
            return out, state

        return after(g, "spied", g.layout, fn)

    return transform


def kept(chain, how):
    """Chains with a spy at every place: is all that was seen as it was, and how much was seen?"""
    seen = []
    spy = spied(seen)
    source = fz.value_and_grad(zoo.loss_plain, batch=P("data"), units=("blocks",))
    right = [x for part in (fz.clip_by_global_norm(0.1), fz.adamw(1e-2), fz.ema(0.9)) for x in (spy, part)] + [spy]
    over = [x for part in (fz.accumulate(3),) for x in (spy, part)]
    chains = {
        "all_reduce": (source, *over, spy, fz.all_reduce("data"), *right),
        "shard": (source, *over, spy, fz.shard("data", *right), spy),
        "at the seam": (source, fz.shard("data", *over, *right), spy),
        "at rest": (fz.shard("data", source, *over, *right),),
    }
    step = fz.train_step(*chains[chain], mesh={"data": -1}, **how)
    state = step.init(zoo.params())
    for t in range(2):
        state, _ = step(state, step.local_rows(zoo.batch(t, micros=6)))
    same = all(torch.equal(a, b) for buffers, copies in seen for a, b in zip(buffers, copies, strict=True))
    return same, len(seen)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("sums", ["tree", "exact"])
@pytest.mark.parametrize("chain", ["all_reduce", "shard", "at the seam", "at rest"])
def test_what_a_transform_has_seen_is_not_written_into(run_world, size, chain, sums):
    for same, count in run_world(size, kept, chain, {"sums": sums}):
        assert same and count >= 2 * (3 + 4)
