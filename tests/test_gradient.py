"""Where gradients come from: a loss, or somebody else's forward; aux sums, keys, rows, and what is trained."""

from __future__ import annotations

import pytest
import torch
import zoo
from cover import EACH, cover

import funczero as fz
from funczero import P, rng, tree
from funczero.layout.processes import world_size

MESH = {"data": -1}


def moments(p, b):
    """Sums beside the loss."""
    loss, weight = zoo.loss_plain(p, b)
    return loss, weight, {"sum": b["mask"].sum() * 3, "rows": len(b["x"]), "square": [loss.detach() ** 2]}


def auxes(k):
    """Aux by stage."""
    out = []
    for stage in range(4):
        _, log, _, _ = zoo.train(
            fz.zero(
                zoo.source(loss_fn=moments, has_aux=True), *zoo.tx(), stage=stage, accumulate=zoo.MICROS // world_size()
            ),
            MESH,
            updates=2,
        )
        out.append([[x.item() for x in tree.leaves(m.aux)] for m in log])
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_aux_is_summed_in_the_gradients_order(run_world, world):
    """The user's own tree of 0-d sums: the same bits on any world and at every stage."""
    alone = auxes(1)
    assert alone == [alone[0]] * 4 == zoo.everywhere(run_world, world, auxes, 1)
    b = zoo.batch(0)
    assert alone[0][0][:2] == [3 * b["mask"].sum().item(), len(b["x"])]


def test_aux_keeps_its_tree_and_stays_out_of_the_gradient():
    (with_aux, log, *_), (without, *_) = (
        zoo.train(fz.zero(zoo.source(**kw), *zoo.tx(), stage=3), {"data": 1}, updates=2)
        for kw in (dict(loss_fn=moments, has_aux=True), {})
    )
    assert zoo.tree_hash(with_aux) == zoo.tree_hash(without)
    assert set(log[0].aux) == {"sum", "rows", "square"} and log[0].aux["sum"].dtype == torch.float64


def test_aux_is_summed_over_a_stream_too():
    runs = [
        zoo.train(
            (fz.shard("data", zoo.source(loss_fn=moments, has_aux=True), fz.accumulate(4, stream=s), *zoo.tx()),),
            {"data": 1},
            4 if s else 0,
            updates=2,
        )
        for s in (False, True)
    ]
    assert zoo.bits(runs[0]) == zoo.bits(runs[1])


def keys(k, chain):
    """The keys that a loss saw in two updates, by stage, in the order of this rank's time."""
    seen = []

    def loss(p, b, key):
        seen.append((int(b["i"][0]), key))
        return p["w"].sum() * 0, torch.ones(())

    g = fz.value_and_grad(loss, batch=P("data"), rng=True)
    step = fz.train_step(*fz.zero(g, fz.sgd(0.1), stage=chain, accumulate=k), mesh=MESH)
    state = step.init({"w": torch.ones(2)}, key=5)
    for _ in range(2):
        state, _ = step(state, step.local_rows({"i": torch.arange(4)}))
    return seen


def all_keys():
    return [keys(4 // world_size(), stage) for stage in range(4)]


def test_a_key_belongs_to_a_step_and_a_micro_batch(run_world):
    """Whoever computes it, and whenever: micro-batch i of step t sees one key, and no two are alike."""
    want = {(t, i): rng.fold(rng.fold(5, t), i) for t in range(2) for i in range(4)}
    assert len(set(want.values())) == 8
    for world in (1, 2):
        for by_stage in [all_keys()] if world == 1 else run_world(world, all_keys):
            for seen in by_stage:
                half = len(seen) // 2
                assert all(want[n // half, i] == key for n, (i, key) in enumerate(seen))


def test_a_skipped_update_does_not_repeat_its_keys():
    g = fz.value_and_grad(
        lambda p, b, key: (p["w"].sum() * b["x"].sum(), torch.ones(()), torch.tensor(float(key % 2**20))),
        batch=P("data"),
        rng=True,
        has_aux=True,
    )
    step = fz.train_step(g, fz.all_reduce("data"), fz.sgd(0.1), mesh={"data": 1})
    state = step.init({"w": torch.ones(2)})
    state, first = step(state, {"x": torch.tensor([torch.nan])})
    state, second = step(state, {"x": torch.ones(1)})
    assert not first.ok and second.ok and first.aux != second.aux


@pytest.mark.parametrize("trainable", ["head|norm", lambda path: path.startswith(("head", "norm"))])
def test_trainable_is_the_rest_of_frozen(trainable):
    runs = [
        zoo.train(fz.zero(zoo.source(trainable=trainable), *zoo.tx(), stage=2), {"data": 1}, updates=2)[0],
        zoo.train(
            fz.zero(zoo.source(), fz.freeze(lambda path: not path.startswith(("head", "norm"))), *zoo.tx(), stage=2),
            {"data": 1},
            updates=2,
        )[0],
    ]
    assert zoo.tree_hash(runs[0]) == zoo.tree_hash(runs[1])
    assert torch.equal(runs[0]["embed"], zoo.params()["embed"]) and not torch.equal(
        runs[0]["head"]["w"], zoo.params()["head"]["w"]
    )


def test_batches_are_any_tree_of_tensors():
    g = fz.value_and_grad(lambda p, b: ((b[0] * p).sum() + b[1]["y"][0].sum(), torch.ones(())), batch=P("data"))
    step = fz.train_step(g, fz.accumulate(2), fz.all_reduce("data"), fz.sgd(1.0), mesh={"data": 1})
    state, m = step(step.init(torch.ones(())), step.local_rows((torch.ones(4), {"y": [torch.ones(4, 2)]})))
    assert m.loss == 6 and m.weight == 2 and step.params(state) == -1


# --- pullback: the same chain with its leaf turned inside out ---------------------------------------------------------
def mine(b, views):
    """A forward that the chain does not see; as the zoo's loss wants its leaves."""
    return zoo.loss_plain(views, b)


def pulled(chain, k, policy):
    """A run in which the caller computes every loss at step.view(state); k: micro-batches of a streamed window, 0
    without one.
    """
    step = fz.train_step(*chain, mesh=MESH, policy=policy)
    state, log = step.init(zoo.params(), key=7), []
    for t in range(zoo.UPDATES):
        rows = step.local_rows(zoo.batch(t, micros=(k or 1) * world_size()))
        views = step.view(state)  # one set of leaves an update
        for b in zoo.split(rows, k or 1):
            loss, weight = mine(b, views)
            state, m = step(state, (fz.pull(loss, views), loss, weight))
        state, m = step(state, None) if k else (state, m)
        log.append(m)
    return zoo.bits((step.params(state), log, state, step))


def both(policy, tried):
    """Of (stage, streamed), or else one micro-batch an update: are pullback and value_and_grad alike?"""
    out, right = {}, zoo.tx(scale=True)
    for k in (zoo.MICROS // world_size(), 0):
        acc = (fz.accumulate(k, stream=True),) if k else ()
        chains = {
            0: lambda g, acc=acc: (g, *acc, fz.all_reduce("data"), *right),
            1: lambda g, acc=acc: (g, *acc, fz.shard("data", *right)),
            2: lambda g, acc=acc: (g, fz.shard("data", *acc, *right)),
            3: lambda g, acc=acc: (fz.shard("data", g, *acc, *right),),
        }
        for stage, chain in chains.items():
            if (stage, bool(k)) not in tried:
                continue
            loss = zoo.bits(zoo.train(chain(zoo.source()), MESH, k, policy=policy, micros=(k or 1) * world_size()))
            out[stage, bool(k)] = loss == pulled(chain(fz.pullback(P("data"))), k, policy)
    return out


PULLED = [(world, stage, k > 0) for world in (1, 2) for k in (0, 1) for stage in range(4)]


@EACH
@pytest.mark.parametrize(
    ("policy", "world"),
    [("float32", 2), ("compute=bfloat16", 1), pytest.param("compute=bfloat16", 2, marks=pytest.mark.slow)],
)
def test_a_pulled_gradient_is_the_losses_gradient_bit_for_bit(run_world, world, policy, whole):
    """Without `whole` every stage on every world, and streamed on one of them."""
    tried = [how for at, *how in (PULLED if whole else cover(PULLED)) if at == world]
    found = zoo.everywhere(run_world, world, both, policy, list(map(tuple, tried)))
    assert set(found.values()) == {True} and len(found) == len(tried)


def test_a_pulled_mean_loss_weighs_one():
    """`weight` 1 a micro-batch: the mean of means."""
    step = fz.train_step(
        fz.shard("data", fz.pullback(P("data")), fz.accumulate(2, stream=True), fz.scale_loss(weight=1), fz.sgd(1.0)),
        mesh={"data": 1},
    )
    state = step.init({"w": torch.zeros(2)})
    views = step.view(state)
    for x in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0])):
        loss = (views["w"] * x).sum()
        state, _ = step(state, (fz.pull(loss, views), loss, 1.0))
    state, m = step(state, None)
    assert step.params(state)["w"].tolist() == [-0.5, -2.0] and m.weight == 2 and m.scale == 2**16


def test_pull_gives_none_where_nothing_depends_and_one_gradient_for_a_tied_leaf():
    w = torch.ones(2, requires_grad=True)
    views = {"a": w, "b": w, "c": torch.ones(3, requires_grad=True), "frozen": torch.ones(1)}
    got = fz.pull((views["a"] + views["b"]).sum(), views)(torch.tensor(2.0))
    assert got["a"] is got["b"] and got["a"].tolist() == [4.0, 4.0] and got["c"] is None and got["frozen"] is None


def test_frozen_views_want_no_gradient():
    step = fz.train_step(
        fz.shard("data", fz.pullback(P("data"), trainable="head"), fz.freeze("head/b"), fz.sgd(1.0)), mesh={"data": 1}
    )
    views = dict(tree.paths(step.view(step.init(zoo.params()))))
    assert {n for n, x in views.items() if x.requires_grad} == {"head/w", "head/scale", "norm"}  # one leaf of two names
