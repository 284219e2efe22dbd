"""Optimizers that read more of a leaf than one place: the unsharded run's bits at every stage and world, and what they
send.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
import zoo
from optimizers import F64, skipping

import funczero as fz
from funczero import P, tree
from funczero.checkpoint.names import named
from funczero.layout.processes import world_size
from funczero.testing import tree_hash
from funczero.testing.simulate import simulate

MUON = dict(lr=0.02, momentum=0.9, weight_decay=0.1)


def with_muon(**kw):
    """Muon for matrices, as nanochat has it, and AdamW for the rest."""
    return fz.partition([(fz.matrices(but="embed"), fz.muon(**(MUON | kw))), ("", fz.adamw(3e-3))])


TX = {
    "lamb": fz.lamb(1e-2, weight_decay=0.1, high=10.0),
    "lars": fz.lars([("blocks", 3.0), ("", 1.0)], weight_decay=0.1),
    "muon": with_muon(small=0),
    "muon, small leaves by all": with_muon(small=36),
    "muon, flattened": with_muon(flatten=3, dtype=torch.float32, small=0, nesterov=False),
    "adafactor": fz.adafactor(0.05, small=0, weight_decay=0.1),
    "shampoo": fz.partition(
        [(fz.matrices(but="embed"), fz.shampoo(0.1, 0.9, 0.1, every=2, small=0)), ("", fz.adamw(3e-3))]
    ),
    "muon, rates by rule": with_muon(lr=[("blocks/1", 0.01), ("", 0.03)], small=0, scale="match_rms_adamw"),
}


def trained(tx, stage=3, updates=4, donate=False, mesh=None, parts=None, **kw):
    """A run of the zoo, whose fourth and last update is skipped."""
    made = parts or (lambda k: fz.zero(zoo.source(**kw), tx, stage=stage, accumulate=k))
    step = fz.train_step(*made(zoo.MICROS // world_size()), mesh=mesh or {"data": -1})
    step = fz.donate(step) if donate else step
    state = step.init(zoo.params())
    for t in range(updates):
        state, _ = step(state, step.local_rows(zoo.batch(t)))
    return step, state


def masters(*args, **kw):
    step, state = trained(*args, **kw)
    return tree_hash(step.params(state))


# --- the law ----------------------------------------------------------------------------------------------------------
FAST = ("lamb", "shampoo", "muon, rates by rule")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in TX])
def test_the_bits_are_the_unsharded_runs_at_every_stage_and_world(name):
    found, fast = {masters(TX[name], stage, donate=stage > 1) for stage in (0, 3)}, name in FAST
    for world, stages in ((2, (1, 3) if fast else (0, 1, 2, 3)), (4, (2,) if fast else (1, 3))):
        for stage in stages:
            found |= set(simulate({"data": world})(lambda s: masters(TX[name], s, donate=s == 3), stage))
    assert len(found) == 1


def nested(kind, tx):
    """Brackets in brackets, replicas beside them, and leaves that they cut along several dims."""
    rules = [("w$", P(None, "node")), ("conv", P(None, "local", "node"))]
    source, mesh = zoo.source(("node", "local")), {"node": 2, "local": 2}
    k = zoo.MICROS // 4
    parts = {
        "hpz": lambda: fz.hpz(source, tx, accumulate=k),
        "mics": lambda: (fz.shard("local", source, fz.accumulate(k), fz.all_reduce("node"), tx),),
        "rules": lambda: (source, fz.accumulate(k), fz.shard("node", fz.shard("local", tx), rules=rules)),
        "some whole": lambda: (source, fz.shard("local", fz.shard("node", fz.accumulate(k), tx), threshold=30)),
        "at rest": lambda: (fz.shard("local", fz.shard("node", source, fz.accumulate(k), tx)),),
    }[kind]
    return masters(tx, mesh=mesh, parts=lambda _: parts())


SLOW = {"at rest", "some whole", "mics"}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW))
        for k in ("hpz", "mics", "rules", "at rest", "some whole")
    ],
)
def test_nested_brackets_and_any_cuts_have_the_same_bits(kind):
    for name in ("muon", "muon, flattened", *["lamb"] * (kind in SLOW)):
        want = masters(TX[name], 0)
        assert set(simulate({"node": 2, "local": 2})(nested, kind, TX[name])) == {want}, name


def in_processes(name):
    return [masters(TX[name], stage) for stage in (0, 1, 3)]


def test_real_processes_have_the_bits_of_threads(run_world):
    want = masters(TX["muon"], 0)
    assert zoo.everywhere(run_world, 2, in_processes, "muon") == [want] * 3


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


# --- the formulas -----------------------------------------------------------------------------------------------------
def directly(tx, grads, start):
    """A run in a step whose gradients are exactly the given ones."""
    step = fz.train_step(
        fz.value_and_grad(lambda p, b: ((p["w"] * b["g"][0]).sum(), torch.ones(()))),
        tx,
        policy=str(start.dtype).removeprefix("torch."),
    )
    state, out = step.init({"w": start}), []
    for g in grads:
        state, _ = step(state, {"g": g[None]})
        out.append(step.params(state)["w"])
    return out


def drawn(*shape, updates=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=dtype) for _ in range(updates)], torch.randn(
        shape, generator=g, dtype=dtype
    )


@pytest.mark.parametrize(
    "kw",
    [{}, {"nesterov": False, "weight_decay": 0.1, "momentum": 0.8}, {"scale": "match_rms_adamw", "steps": 3}],
    ids=["default", "plain", "rms"],
)
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (1, 7)], ids=str)
def test_muon_is_torchs_class_bit_for_bit(shape, kw):
    grads, start = drawn(*shape)
    p = torch.nn.Parameter(start.clone())
    named = {"scale": "adjust_lr_fn", "steps": "ns_steps"}
    theirs = torch.optim.Muon([p], 0.02, **{"weight_decay": 0.0} | {named.get(k, k): x for k, x in kw.items()})
    for g, got in zip(grads, directly(fz.muon(0.02, **kw), grads, start), strict=True):
        p.grad = g.clone()
        theirs.step()
        assert torch.equal(got, p.detach())


def test_a_batch_of_matrices_is_each_of_them_and_flattened_is_one():
    grads, start = drawn(3, 4, 5)
    got = directly(fz.muon(0.02), grads, start)[-1]
    one = [directly(fz.muon(0.02), [g[i] for g in grads], start[i])[-1] for i in range(3)]
    assert torch.equal(got, torch.stack(one))
    flat = directly(fz.muon(0.02, flatten=3), grads, start)[-1]
    assert torch.equal(flat, directly(fz.muon(0.02), [g.flatten(1) for g in grads], start.flatten(1))[-1].view(3, 4, 5))


@pytest.mark.parametrize("corrected", ["moments", "rate", "none"])
def test_lamb_is_plain_arithmetic(corrected):
    grads, p = drawn(5, 3, dtype=F64)
    m = v = torch.zeros_like(p)
    got = directly(fz.lamb(0.1, 0.8, 0.9, 1e-4, 0.1, low=0.05, high=2.0, corrected=corrected), grads, p)
    for n, (g, mine) in enumerate(zip(grads, got, strict=True), 1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        c1, c2 = (1 - 0.8**n, 1 - 0.9**n) if corrected == "moments" else (1, 1)
        u = (m / c1) / ((v / c2).sqrt() + 1e-4) + 0.1 * p
        rate = 0.1 * ((1 - 0.9**n) ** 0.5 / (1 - 0.8**n) if corrected == "rate" else 1)
        p = p - rate * (p.norm() / u.norm()).clamp(0.05, 2.0) * u
        torch.testing.assert_close(mine, p, rtol=1e-12, atol=1e-12)


def test_lars_is_plain_arithmetic():
    grads, p = drawn(5, 3, dtype=F64)
    v = torch.zeros_like(p)
    for g, mine in zip(grads, directly(fz.lars(2.0, 0.8, 0.1, trust=0.01, eps=1e-3), grads, p), strict=True):
        v = 0.8 * v + 2.0 * 0.01 * p.norm() / (g.norm() + 0.1 * p.norm() + 1e-3) * (g + 0.1 * p)
        p = p - v
        torch.testing.assert_close(mine, p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "kw", [{}, {"weight_decay": 0.1, "d": 2.0, "beta2_decay": -0.5, "eps": (1e-6, 1e-2)}], ids=["default", "other"]
)
@pytest.mark.parametrize("shape", [(6, 10), (3, 4, 5), (7,), ()], ids=str)
def test_adafactor_is_torchs_class(shape, kw):
    grads, start = drawn(*shape, dtype=F64)
    p = torch.nn.Parameter(start.clone())
    theirs = torch.optim.Adafactor([p], 0.05, **kw)
    for g, got in zip(grads, directly(fz.adafactor(0.05, **kw), grads, start), strict=True):
        p.grad = g.clone()
        theirs.step()
        torch.testing.assert_close(got, p.detach(), rtol=1e-12, atol=1e-12)


def root(x):
    values, vectors = torch.linalg.eigh(x)
    return vectors @ torch.diag(values**-0.25) @ vectors.T


@pytest.mark.parametrize("every", [1, 3])
def test_shampoo_is_plain_arithmetic(every):
    grads, p = drawn(5, 3, dtype=F64)
    left, right, t = torch.zeros(5, 5, dtype=F64), torch.zeros(3, 3, dtype=F64), torch.zeros_like(p)
    got = directly(fz.shampoo(0.1, 0.9, 0.1, eps=0.5, b2=0.8, every=every), grads, p)
    for n, (g, mine) in enumerate(zip(grads, got, strict=True)):
        left, right = 0.8 * left + g @ g.T, 0.8 * right + g.T @ g
        if n % every == 0:
            a, b = (root(x + 0.5 * torch.eye(len(x), dtype=F64)) for x in (left, right))
        t = 0.9 * t + a @ g @ b
        p = p * (1 - 0.1 * 0.1) - 0.1 * t
        torch.testing.assert_close(mine, p, rtol=1e-10, atol=1e-12)


PLAIN = {
    "lamb": fz.lamb(0.02, weight_decay=0.1),
    "lars": fz.lars(1.0, weight_decay=0.1),
    "muon": fz.muon(0.02, dtype=F64, small=0),
    "adafactor": fz.adafactor(0.1),
    "shampoo": fz.shampoo(0.1, 0.9, every=2),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_pair_is_the_formula(name):
    """What an optimizer further right reads, and what a step without a mesh may lift."""
    grads, start = drawn(6, 4, dtype=F64)
    tx = PLAIN[name]
    for a, b in zip(directly(tx, grads, start), directly(fz.lift((tx.init, tx.update)), grads, start), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_leaf_that_is_zero_has_a_trust_of_one(name):
    got = directly(PLAIN[name], drawn(3)[0], torch.zeros(3))[0]
    assert got.isfinite().all() and got.abs().min() > 0


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_skipped_update_moves_nothing(name):
    (_, first), (_, skipped), (last, after) = skipping(PLAIN[name], [True, False, True])
    assert first == skipped != after and last.chain[name].count == 2


def test_a_skipped_update_leaves_momentum_and_owners_states_alone():
    """In the zoo the fourth update is skipped on every world."""
    states = lambda: [trained(with_muon(small=0), 3, updates=n)[1].chain["muon"] for n in (3, 4)]
    for world in (1, 2):
        for before, after in simulate({"data": world})(states):
            assert tree_hash(before) == tree_hash(after)


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


# --- checkpoints ------------------------------------------------------------------------------------------------------
OWNERS = {"adafactor": TX["adafactor"], "shampoo": TX["shampoo"]}


def stepped(name, stage):
    parts = fz.zero(zoo.source(), OWNERS[name], stage=stage, accumulate=zoo.MICROS // world_size())
    return fz.train_step(*parts, mesh={"data": -1})


def going_on(step, state, updates):
    for t in updates:
        state, _ = step(state, step.local_rows(zoo.batch(t)))
    return tree_hash(step.params(state))


def saved(folder, name, stage):
    step = stepped(name, stage)
    state = step.init(zoo.params())
    for t in (0, 1):
        state, _ = step(state, step.local_rows(zoo.batch(t)))
    with fz.Checkpointer(folder) as ck:
        ck.save(state, 1)
    return going_on(step, state, (2, 4))


def restored(folder, name, stage):
    step = stepped(name, stage)
    got = fz.Checkpointer(folder).restore(like=(step, zoo.params()))
    return going_on(step, got.state, (2, 4)), got.notes


@pytest.mark.parametrize(
    ("name", "worlds"), [("shampoo", (1, 2)), pytest.param("adafactor", (1, 2, 4), marks=pytest.mark.slow)]
)
def test_states_of_owners_are_read_by_any_world(run_world, tmp_path, name, worlds):
    """Saved on two ranks at stage 3, and in one process: whoever goes on has the bits of the run that never ended."""
    want = zoo.everywhere(run_world, 2, saved, tmp_path / "a", name, 3)
    assert saved(tmp_path / "b", name, 0) == want
    for folder in ("a", "b"):
        for world in worlds:
            assert zoo.everywhere(run_world, world, restored, tmp_path / folder, name, 3) == (want, ())


def test_states_of_owners_are_named_by_their_parameters_path():
    """The same names and whole shapes at every stage; a leaf that another optimizer has is not among them."""
    parts = [named(trained(TX["shampoo"], stage, updates=0)[1]).parts for stage in (0, 3)]
    assert parts[0].keys() == parts[1].keys()
    assert parts[0]["shampoo/left/blocks/0/w"].shape == (5, 5) and parts[0]["shampoo/roots/right/conv"].shape == (
        3,
        5,
        5,
    )
    assert "shampoo/trace/head/w" in parts[0] and not any(n.startswith("shampoo") and "embed" in n for n in parts[0])


def resharded(name):
    two, three = (stepped(name, s) for s in (1, 3))
    state = two.init(zoo.params())
    for t in (0, 1):
        state, _ = two(state, two.local_rows(zoo.batch(t)))
    return going_on(two, state, (2,)), going_on(three, fz.reshard(state, three), (2,))


@pytest.mark.parametrize("name", OWNERS)
def test_states_of_owners_are_handed_to_another_stage(name):
    for one, other in simulate({"data": 2})(resharded, name):
        assert one == other


def test_only_the_owner_holds_a_state():
    """Two ranks together hold each preconditioner once."""
    chains = simulate({"data": 2})(lambda: trained(TX["shampoo"], 1, updates=0)[1].chain["shampoo"])
    held = [sum(b.numel() for b in c.left.buffers) for c in chains]
    alone = sum(b.numel() for b in trained(TX["shampoo"], 1, updates=0)[1].chain["shampoo"].left.buffers)
    assert sum(held) - alone < 5 * 16 * 3 and min(held) > alone / 4  # the batch of matrices is cut as it lies


# --- pairs that somebody wrote ----------------------------------------------------------------------------------------
class Trust(NamedTuple):
    """Momentum, and a count that scales."""

    n: Any
    m: Any


def trust_init(params):
    return Trust(torch.zeros((), dtype=torch.int64), tree.map(lambda p: p.clone(), params))


def trust_update(grads, state, params):
    """Each leaf by the norms of its gradient and of itself."""
    m = tree.map(lambda m, g: 0.9 * m + g, state.m, grads)
    move = lambda m, p: -0.01 * m * (p.norm() + 1) / (m.norm() + 1) / (state.n + 1)
    return tree.map(move, m, params), Trust(state.n + 1, m)


def clipped_update(grads, state, params):
    """All leaves by the norm of all."""
    total = sum((g * g).sum() for g in tree.leaves(grads)).sqrt()
    m = tree.map(lambda m, g: 0.9 * m + g / (1 + total), state.m, grads)
    return tree.map(lambda m: -0.05 * m, m), Trust(state.n + 1, m)


def keyword_update(updates, state, *, params=None, inplace=True):
    """torchopt's signature; whoever lets it write in place is told by funczero."""
    assert params is not None and not inplace
    return trust_update(updates, state, params)


LIFTED = {
    "leafwise": fz.lift((trust_init, trust_update), "trust", needs="leafwise"),
    "whole": fz.lift((trust_init, clipped_update), "clipped", needs="whole"),
    "torchopt's": fz.lift((trust_init, keyword_update), "keyword", needs="leafwise"),
    "leafwise, in a partition": fz.partition(
        [("w$|conv", fz.lift((trust_init, trust_update), "trust", needs="leafwise")), ("", fz.adamw(1e-2))]
    ),
    "whole, in a partition": fz.partition(
        [("w$|conv", fz.lift((trust_init, clipped_update), "clipped", needs="whole")), ("", fz.adamw(1e-2))]
    ),
    "leafwise, before another": fz.chain(fz.lift((trust_init, trust_update), "trust", needs="leafwise"), fz.sgd(1.0)),
}


@pytest.mark.parametrize("name", LIFTED)
def test_a_pair_is_handed_whole_leaves_and_has_the_bits_of_the_unsharded_run(name):
    found = {masters(LIFTED[name], stage, donate=stage > 1) for stage in (0, 3)}
    for world, stages in ((2, (1, 3)), (4, (2,))):
        for stage in stages:
            found |= set(simulate({"data": world})(lambda s: masters(LIFTED[name], s, donate=s == 3), stage))
    assert len(found) == 1


def test_leafwise_pairs_are_their_own_values_on_whole_leaves():
    """Without a mesh the pair alone, a leaf at a time."""
    grads, start = drawn(5, 4, dtype=F64)
    state, p = trust_init({"w": start}), start
    for g, got in zip(grads, directly(LIFTED["leafwise"], grads, start), strict=True):
        updates, state = trust_update({"w": g}, state, {"w": p})
        p = p + updates["w"]
        assert torch.equal(got, p)


def kept(name, stage):
    state = trained(LIFTED[name], stage, updates=3)[1]
    return {n: (p.shape, None if stage else p.value.clone()) for n, p in named(state).parts.items()}


@pytest.mark.parametrize("name", ["leafwise", "whole", "leafwise, in a partition"])
def test_states_of_pairs_have_the_same_names_and_shapes_at_every_stage_and_world(name):
    want = {n: shape for n, (shape, _) in kept(name, 0).items()}
    for got in simulate({"data": 2})(kept, name, 3):
        assert {n: shape for n, (shape, _) in got.items()} == want
    assert "trust/m/conv" in want or name == "whole"


def handed_on(name):
    step = fz.train_step(*fz.zero(zoo.source(), LIFTED[name], stage=1, accumulate=4), mesh={"data": -1})
    other = fz.train_step(*fz.zero(zoo.source(), LIFTED[name], stage=3, accumulate=4), mesh={"data": -1})
    state = step.init(zoo.params())
    for t in (0, 1):
        state, _ = step(state, step.local_rows(zoo.batch(t)))
    return going_on(step, state, (2,)), going_on(other, fz.reshard(state, other), (2,))


@pytest.mark.parametrize("name", ["leafwise", "whole"])
def test_states_of_pairs_are_handed_to_another_stage(name):
    for one, other in simulate({"data": 2})(handed_on, name):
        assert one == other


PAIRS_REFUSED = {
    "numbers in its state": ((lambda p: {"n": 0}, trust_update), TypeError, "its state holds a int at 'n'"),
    "a state that changes": (
        (trust_init, lambda g, s, p: (g, Trust(s.n, tree.map(lambda m: m[0], s.m)))),
        TypeError,
        "its state changes its form at 'm'; return tensors of the shapes and dtypes that init gives for zeros",
    ),
}


@pytest.mark.parametrize("name", PAIRS_REFUSED)
def test_a_leafwise_pair_whose_state_cannot_be_kept_is_refused(name):
    pair, error, words = PAIRS_REFUSED[name]
    step = fz.train_step(*fz.zero(zoo.source(), fz.lift(pair, needs="leafwise"), stage=1), mesh={"data": 1})
    with pytest.raises(error, match=f"lift: {words}"):
        step(step.init(zoo.params()), zoo.batch(0))


def test_what_does_not_say_how_much_is_refused():
    for kw in ({"needs": "leaf_norms"}, {"needs": "rows"}, {"needs": "whole", "elementwise": False}):
        with pytest.raises(ValueError, match="lift: needs='.*does not say how much of a leaf moves a value"):
            fz.lift((trust_init, trust_update), **kw)


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
    plan = fz.train_step(*fz.zero(zoo.source(), LIFTED["whole"], stage=1), mesh={"data": 8})
    assert "clipped: all leaves and their gradients are gathered over ['data'] at every update" in str(plan)
