"""Optimizers that read more of a leaf than one place: the unsharded run's bits at every stage and world, and what they
send.
"""

from __future__ import annotations

import re
from math import prod

import pytest
import torch
import zoo
from cover import EACH
from leaves import TX, masters, trained, with_muon

import funczero as fz
from funczero import P
from funczero.comm import norm
from funczero.layout.processes import world_size
from funczero.testing import tree_hash
from funczero.testing.simulate import simulate
from funczero.transforms import leafwise

# --- the law ----------------------------------------------------------------------------------------------------------
FAST = ("lamb", "muon, rates by rule")


@EACH
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in TX])
def test_the_bits_are_the_unsharded_runs_at_every_stage_and_world(name, whole):
    found, first = {masters(TX[name], stage, donate=stage > 1) for stage in (0, 3)}, name == FAST[0]
    for world, stages in ((2, (0, 1, 2, 3)), (4, (1, 2, 3))) if whole else ((2, (1 if first else 3,)), (4, (2,))):
        for stage in stages:
            found |= set(simulate({"data": world})(lambda s: masters(TX[name], s, donate=s == 3), stage))
    assert len(found) == 1


@pytest.mark.parametrize("many", [0, 20])
def test_norms_of_very_many_values_are_the_same_beside_others(monkeypatch, many):
    """Sums of more values than 64 bits hold take two words; here of all leaves, or of the larger ones alone."""
    want = masters(TX["lamb"], 0)
    monkeypatch.setattr(norm, "MANY", many)
    found = {h for w, s in ((1, 0), (2, 0), (4, 3)) for h in simulate({"data": w})(lambda s: masters(TX["lamb"], s), s)}
    assert found == {want}


def nested(kind, tx):
    """Brackets in brackets, replicas beside them, and leaves that they cut along several dims."""
    rules = [("w$", P(None, "node")), ("conv", P(None, "local", "node"))]
    source, mesh = zoo.source(("node", "local")), {"node": 2, "local": 2}
    k = zoo.FEW // 4
    parts = {
        "hpz": lambda: fz.hpz(source, tx, accumulate=k),
        "mics": lambda: (fz.shard("local", source, fz.accumulate(k), fz.all_reduce("node"), tx),),
        "rules": lambda: (source, fz.accumulate(k), fz.shard("node", fz.shard("local", tx), rules=rules)),
        "some whole": lambda: (source, fz.shard("local", fz.shard("node", fz.accumulate(k), tx), threshold=30)),
        "at rest": lambda: (fz.shard("local", fz.shard("node", source, fz.accumulate(k), tx)),),
    }[kind]
    return masters(tx, mesh=mesh, parts=lambda _: parts())


SLOW = {"at rest", "some whole", "mics", "rules"}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW))
        for k in ("hpz", "mics", "rules", "at rest", "some whole")
    ],
)
def test_nested_brackets_and_any_cuts_have_the_same_bits(kind):
    for name in ("muon", *["lamb", "muon, flattened"] * (kind in SLOW)):
        want = masters(TX[name], 0)
        assert set(simulate({"node": 2, "local": 2})(nested, kind, TX[name])) == {want}, name


def in_processes(name):
    return [masters(TX[name], stage) for stage in (0, 1, 3)]


def test_real_processes_have_the_bits_of_threads(run_world):
    want = masters(TX["muon"], 0)
    assert zoo.everywhere(run_world, 2, in_processes, "muon") == [want] * 3


def nested_in_processes(kind, name):
    return nested(kind, TX[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hpz", "rules", "at rest"])
def test_two_axes_are_crossed_by_real_processes(run_world, kind):
    assert zoo.everywhere(run_world, 4, nested_in_processes, kind, "muon") == masters(TX["muon"], 0)


@pytest.mark.parametrize("size", [1, 100])
def test_the_bits_do_not_depend_on_how_leaves_share_messages(monkeypatch, size):
    monkeypatch.setattr(leafwise, "MESSAGE", size)
    want = linear(fz.muon(0.02, small=20), SHAPES, 0)[0]
    assert {h for h, *_ in simulate({"data": 2})(lambda: linear(fz.muon(0.02, small=20), SHAPES, 3))} == {want}


# --- what travels -----------------------------------------------------------------------------------------------------
SHAPES = {
    "a": (8, 8),
    "b": (8, 8),
    "c": (8, 8),
    "d": (8, 8),
    "tall": (12, 4),
    "few": (3, 5),
    "experts": (4, 6, 6),
    "odd": (5, 7),
}


def linear(tx, shapes, stage, updates=3, mesh=None, rules=None):
    """A run over plain leaves, and what its last update sent between optimizers."""

    def loss(p, b):
        return sum((p[n] * b["x"][:, : p[n].numel()].sum(0).view(p[n].shape)).sum() for n in p), b["x"].sum() * 0 + len(
            b["x"]
        )

    g = fz.value_and_grad(loss, batch=P("data"))
    step = fz.train_step(*fz.zero(g, tx, stage=stage, accumulate=4 // world_size()), mesh=mesh or {"data": -1})
    draw = torch.Generator().manual_seed(0)
    state = step.init({n: torch.randn(s, generator=draw) for n, s in shapes.items()})
    for t in range(updates):
        x = torch.randn(8, max(map(prod, shapes.values())), generator=torch.Generator().manual_seed(t))
        with fz.count_bytes(step) as sent:
            state, _ = step(state, step.local_rows({"x": x}))
    return tree_hash(step.params(state)), {k: n for k, n in sent.items() if k[1] == "exchange"}, state, step


@pytest.mark.parametrize("world", [2, 4])
def test_muon_sends_two_b_n_w_minus_1_over_w_squared(world):
    """Equal matrices that divide: the closed form on every rank, both ways together, in bfloat16."""
    shapes = {n: (8, 8) for n in "abcd"}
    n = 4 * 64
    for _, sent, _, _ in simulate({"data": world})(lambda: linear(fz.muon(0.02, small=0), shapes, 1)):
        assert sent == {("data", "exchange", "bfloat16"): 2 * 2 * n * (world - 1) // world**2}


@pytest.mark.parametrize(("small", "stage"), [(0, 2), (20, 3)])
def test_odd_leaves_send_their_blocks_out_and_what_their_owners_computed_back(small, stage):
    """What the first rank owns stays with it, late ranks send padding, small leaves go to all and do not come back, and
    experts stay where they are.
    """
    world, tx = 2, fz.muon(0.02, small=small)
    runs = simulate({"data": world})(lambda: linear(tx, SHAPES, stage))
    block = {n: -(-s[0] // world) * prod(s[1:]) for n, s in SHAPES.items() if n != "experts"}
    alone = {n for n, s in SHAPES.items() if prod(s) < small}
    total = sum(n * (world - 1) for name, n in block.items() for _ in ([0] if name in alone else [0, 0]))
    per_rank = [sent["data", "exchange", "bfloat16"] for _, sent, _, _ in runs]
    extra = sum(block[n] for n in alone) * (world - 1)
    assert sum(per_rank) == 2 * (total + extra)
    assert {h for h, *_ in runs} == {linear(tx, SHAPES, 0)[0]}


def test_norms_of_leaves_travel_as_integers_and_no_rows():
    runs = simulate({"data": 2})(lambda: linear(fz.lamb(0.02), SHAPES, 2))
    assert all(sent == {} for _, sent, _, _ in runs)
    assert {h for h, *_ in runs} == {linear(fz.lamb(0.02), SHAPES, 0)[0]}


def test_a_rank_that_owns_nothing_sends_as_the_others_do():
    """One matrix on four ranks, of which two have no rows of it either."""
    runs = simulate({"data": 4})(lambda: linear(fz.muon(0.02, small=0), {"one": (2, 9)}, 3))
    assert {h for h, *_ in runs} == {linear(fz.muon(0.02, small=0), {"one": (2, 9)}, 0)[0]}


def around_a_skip():
    step, state = trained(with_muon(small=0), 3, updates=3)
    after, m = step(state, step.local_rows(zoo.batch(zoo.BAD)))
    assert not m.ok
    return tree_hash(state.chain) == tree_hash(after.chain)


def test_a_skipped_update_leaves_every_state_alone():
    for world in (1, 2):
        assert all(simulate({"data": world})(around_a_skip))


# --- refusals ---------------------------------------------------------------------------------------------------------
REFUSED = {
    "a vector": (
        lambda: fz.muon(0.1),
        {"b": (3,)},
        "parameter 'b' of shape (3,) is no matrix; give it to another: fz.partition([(fz.matrices(",
    ),
    "a kernel": (
        lambda: fz.muon(0.1),
        {"k": (2, 3, 3, 3)},
        "parameter 'k' of shape (2, 3, 3, 3) has more than 3 dims; write flatten=4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_of_another_shape_are_refused_by_path(name):
    make, shapes, words = REFUSED[name]
    step = fz.train_step(fz.value_and_grad(lambda p, b: (b.sum(), b.sum())), make(), mesh={"data": 1})
    with pytest.raises(ValueError, match=f"muon: {re.escape(words)}"):
        step.init({n: torch.zeros(s) for n, s in shapes.items()})


def test_a_differentiable_step_refuses_them_by_name():
    step = fz.train_step(*fz.zero(zoo.source(), fz.lamb(0.1), stage=1), mesh={"data": 1})
    with pytest.raises(fz.ChainError, match="lamb: its update is a kernel"):
        fz.differentiable(step)


def test_before_another_optimizer_a_formula_of_whole_leaves_is_refused():
    with pytest.raises(
        fz.ChainError, match="lamb: leaves are cut over .* only the last optimizer of a chain is handed"
    ):
        fz.train_step(*fz.zero(zoo.source(), fz.lamb(0.1), fz.sgd(1.0), stage=1), mesh={"data": 2})


def test_a_printed_step_says_what_is_dealt_and_what_travels():
    step, _ = trained(TX["muon"], 3, updates=0, mesh={"data": 1})
    assert "travel" not in str(step)
    text = simulate({"data": 2})(lambda: str(trained(TX["muon"], 3, updates=1)[0]))[0]
    assert "note: muon: rows of the mean gradient travel over ['data'] to the rank that computes a leaf" in text
    assert "7 leaves are dealt among 2 ranks of ['data'], of which the busiest has 57% of the work, and " in text
    plan = fz.train_step(
        *fz.zero(zoo.source(), fz.lift((lambda p: (), lambda g, s, p: (g, s)), "clipped", needs="whole"), stage=1),
        mesh={"data": 8},
    )
    assert "clipped: all leaves and their gradients are gathered over ['data'] at every update" in str(plan)
