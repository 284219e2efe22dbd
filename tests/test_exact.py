"""Exact sums: the same bits on any number of ranks, whoever has which micro-batch, and the right values."""

from __future__ import annotations

import random
from functools import cache

import hypothesis.strategies as st
import pytest
import torch
import zoo
from cover import EACH
from hypothesis import given, settings

import funczero as fz
from funczero import P
from funczero.core.types import ChainError
from funczero.layout.processes import world_size
from funczero.testing import simulate, tree_hash

POLICIES = {"fp32": "float32", "bf16": "compute=bfloat16", "fp16": "compute=float16"}
ROWS = zoo.ROWS


def source(axes=("data",), **kw):
    return zoo.source(tuple(axes), rng=True, loss_fn=zoo.loss_random, **kw)


def bits(parts, mesh, stream=0, policy="fp32", **kw):
    """Of a run whose last update is skipped."""
    how = dict(policy=POLICIES[policy], sums="exact", rows=ROWS, updates=zoo.BAD + 1)
    return zoo.bits(zoo.train(parts, mesh, stream, **how, **kw))


@cache
def truth(policy):
    """One rank, one sum over time, no units."""
    parts, _ = zoo.flat_chains(source(units=()), zoo.MICROS, zoo.tx(scale=True))["0 grad acc ar"]
    return bits(parts, {"data": 1}, policy=policy)


FEW = "0 grad ar acc", "3 [grad acc"  # two others are tried on processes


def hashes(policy, axes, few=False):
    """The bits of every chain on a mesh, with a place for every micro-batch and as few empty ones as there can be."""
    k, table = -(-zoo.MICROS // world_size()), zoo.flat_chains if len(axes) == 1 else zoo.nested_chains
    chains = table(source(axes), k, zoo.tx(scale=True)).items()
    chains = [(n, *how) for n, how in chains if n in FEW or not few]
    return {n: bits(parts, axes, s, policy, donate=i % 2 == 1) for i, (n, parts, s) in enumerate(chains)}


@pytest.mark.parametrize(
    ("policy", "world"),
    [
        ("fp32", 3),
        *(pytest.param(p, n, marks=pytest.mark.slow) for p in ("fp32", "bf16", "fp16") for n in (1, 2, 4, 5, 6, 7, 8)),
    ],
)
def test_one_hash_on_any_number_of_ranks(policy, world):
    found = simulate({"data": world}, timeout=300)(hashes, policy, {"data": world}, world == 3 and policy == "fp32")
    assert {name: h for ranks in found for name, h in ranks.items() if h != truth(policy)} == {}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"node": 2, "local": 3}, {"node": 3, "local": 2}])
def test_one_hash_in_every_nest(sizes):
    found = simulate(sizes, timeout=300)(hashes, "fp32", sizes)
    assert {name: h for ranks in found for name, h in ranks.items() if h != truth("fp32")} == {}


def test_one_hash_on_processes(run_world):
    """The same over gloo, with two of its chains."""
    found = zoo.everywhere(run_world, 3, some_hashes)
    assert set(found.values()) == {truth("fp32")}


def some_hashes():
    chains = zoo.flat_chains(source(), 3, zoo.tx(scale=True))
    return {n: bits(parts, {"data": 3}, s) for n, (parts, s) in chains.items() if n in ("1 grad acc [", "3 stream")}


# --- random chains ----------------------------------------------------------------------------------------------------
def random_chain(seed):
    """(parts, mesh, stream): a random nest of sums and brackets over random axes, with places for all micro-batches."""
    draw = random.Random(seed)
    mesh = dict(zip(("a", "b"), draw.choice([(1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (5, 1), (2, 3)]), strict=True))
    ranks = mesh["a"] * mesh["b"]
    k = -(-zoo.MICROS // ranks)
    over = [fz.accumulate(2), fz.accumulate(-(-k // 2))] if k > 2 and draw.random() < 0.5 else [fz.accumulate(k)]
    axes = draw.sample(["a", "b"], 2)
    outside = draw.randrange(3)  # how many brackets stand around the gradient
    steps = [*((a, draw.random() < 0.6) for a in axes[outside:]), *(("time", x) for x in over)]
    draw.shuffle(steps)
    parts = [source(("a", "b"), units=draw.choice([(), ("blocks",)]))]
    tail = list(zoo.tx(scale=True))
    return _nested(parts, steps, tail, axes[:outside]), mesh


def _nested(parts, steps, tail, around):
    inner = tail
    for axis, how in reversed(steps):
        if axis == "time":
            inner = [how, *inner]
        elif how:
            inner = [fz.shard(axis, *inner)]
        else:
            inner = [fz.all_reduce(axis), *inner]
    whole = [*parts, *inner]
    for axis in around:
        whole = [fz.shard(axis, *whole)]
    return tuple(whole)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=2)
def test_one_hash_of_random_chains(seed):
    one_hash_of(seed)


@pytest.mark.slow
@given(seed=st.integers(0, 10**6))
@settings(max_examples=12)
def test_one_hash_of_more_random_chains(seed):
    one_hash_of(seed)


def one_hash_of(seed):
    (parts, mesh), policy = random_chain(seed), list(POLICIES)[seed % 3]
    found = simulate(mesh, timeout=120)(bits, parts, mesh, 0, policy)
    assert set(found) == {truth(policy)}, (seed, mesh)


# --- values -----------------------------------------------------------------------------------------------------------
SHAPES = {"w": (7, 5), "one": (1,), "rare": (9,)}
SIZES = {  # by update, how large the gradients of a leaf are; an update that cannot be counted is skipped
    "steady": [1.0, 2.0, 0.5, 1.5],
    "grows": [1.0, 2.0**20, 2.0**45, 1.0],
    "grows too fast": [2.0**-40, 2.0**20, 2.0**20, 2.0**20],
    "shrinks": [1.0, 2.0**-25, 1.0, 2.0**-25],
    "vanishes": [1.0, 2.0**-40, 2.0**-40, 2.0**40],
    "zero, then large": [0.0, 0.0, 0.0, 1e4],
    "tiny": [1e-15, 1e-15, 1e-15, 1e-15],
    "large": [1e8, 1e8, 1e8, 1e8],
}
SKIPPED = {"grows": [3], "grows too fast": [1], "vanishes": [1, 3], "large": [0]}


def rows_of(t, size, micros=6):
    g = torch.Generator().manual_seed(t)
    own = {n: torch.randn(micros, *shape, generator=g) * size for n, shape in SHAPES.items()}
    own["rare"] *= torch.rand(micros, 9, generator=g) < 0.1
    own["w"][t % micros] *= 2.0**-12  # micro-batches differ
    return own


def linear(p, b):
    """Whose gradients are the sums of the batch's rows."""
    return sum((p[n] * x.sum(0)).sum() for n, x in b.items()), torch.tensor(float(len(b["w"])))


def sums_of(case, stage, world):
    """The gradient of every update, and whether it was applied."""
    k = -(-6 // world)
    parts = fz.zero(fz.value_and_grad(linear, P("data")), fz.sgd(0.0), stage=stage, accumulate=k)
    step = fz.train_step(*parts, mesh={"data": world}, sums="exact")
    state, out = step.init({n: torch.zeros(shape) for n, shape in SHAPES.items()}), []
    for t, size in enumerate(SIZES[case]):
        rows = step.local_rows(rows_of(t, size), 1)
        grads = step.grads(state, rows)
        state, m = step(state, rows)
        out.append(({n: g * 6 for n, g in grads.items()}, bool(m.ok), float(m.grad_norm)))
    return out


@pytest.mark.parametrize("mesh", [{"a": 2, "b": 1}, {"a": 1, "b": 2}], ids=["inner", "outer"])
def test_axes_of_size_1_sum_nothing(mesh):
    """Whichever of the axes is the one of size 1: large parts cross every axis once, and the first sum is the one that
    adds.
    """
    grad = fz.value_and_grad(linear, P(("a", "b")))
    acc, tx = fz.accumulate(3), fz.sgd(1.0)
    chains = {
        "MiCS": (fz.shard("b", grad, fz.all_reduce("a"), acc, tx),),
        "MiCS, a inside": (fz.shard("a", grad, fz.all_reduce("b"), acc, tx),),
        "ZeRO-3": (fz.shard("a", fz.shard("b", grad, acc, tx)),),
        "ZeRO-2": (grad, fz.shard("b", fz.shard("a", acc, tx))),
        "DDP": (grad, fz.all_reduce("b"), fz.all_reduce("a"), acc, tx),
        "joined": (
            grad, fz.reduce_scatter("b"), fz.all_reduce("a"), fz.all_gather("b"), acc, tx
        ),
        "higher order": (
            fz.value_and_grad(linear, P(("a", "b")), higher_order=True), fz.shard("b", fz.shard("a", acc, tx))
        ),
    }  # fmt: skip

    def run():
        out = {}
        for name, parts in chains.items():
            step = fz.train_step(*parts, mesh=mesh, sums="exact")
            state = step.init({n: torch.zeros(shape) for n, shape in SHAPES.items()})
            for t, size in enumerate((1.0, 2.0**10)):
                state, m = step(state, step.local_rows(rows_of(t, size)))
            out[name] = step.params(state), float(m.grad_norm)
        return out

    want = [{n: x.double().sum(0) / 6 for n, x in rows_of(t, size).items()} for t, size in ((0, 1.0), (1, 2.0**10))]
    for name, (found, norm) in simulate(mesh, timeout=60)(run)[0].items():
        for n, x in found.items():
            torch.testing.assert_close(x.double(), -want[0][n] - want[1][n], rtol=1e-6, atol=1e-4, msg=f"{name} {n}")
        assert norm == pytest.approx(float(torch.cat([x.flatten() for x in want[1].values()]).norm()), rel=1e-6), name


def frozen_run(world, stage):
    def loss(p, b):
        return (p["w"] * b["x"].sum(0)).sum() * p["f"].sum() + p["e"].sum(), torch.tensor(float(len(b["x"])))

    source = fz.value_and_grad(loss, P("data"), trainable=lambda path: path != "f")
    step = fz.train_step(
        *fz.zero(source, fz.sgd(0.1), stage=stage, accumulate=4 // world), mesh={"data": world}, sums="exact"
    )
    state = step.init({"w": torch.zeros(3), "e": torch.zeros(0, 2), "f": torch.ones(2)})
    state, m = step(state, step.local_rows({"x": torch.arange(12.0).view(4, 3)}))
    return tree_hash((step.params(state), m))


def test_leaves_without_gradients_are_no_floats_among_integers():
    """Frozen and empty leaves, where the first sum is over ranks."""
    runs = (1, 0), (4, 0), (4, 1), (2, 2), (2, 3)
    found = {simulate({"data": n}, timeout=60)(frozen_run, n, s)[0] for n, s in runs}
    assert len(found) == 1


def second_order(world, stage):
    source = fz.value_and_grad(zoo.loss_plain, P("data"), units=("blocks",), higher_order=world > 1)
    parts = fz.zero(source, *zoo.tx(), stage=stage, accumulate=-(-5 // world))
    step = fz.train_step(*parts, mesh={"data": world}, sums="exact", policy="compute=bfloat16")
    state = step.init(zoo.params())
    state, m = step(state, step.local_rows(zoo.batch(0, micros=5), ROWS))
    return tree_hash((step.params(state), m))


def test_second_order_gradients_have_the_bits_of_first_order():
    """At every stage that they have; copies in empty places count for nothing."""
    found = {simulate({"data": n}, timeout=60)(second_order, n, s)[0] for n, s in ((1, 0), (2, 1), (3, 2))}
    assert len(found) == 1


def test_a_deal_splits_where_its_rows_lie():
    def loss(p, b):
        return (p["w"] * b["x"].sum(1)).sum(), torch.tensor(float(b["x"].shape[1]))

    source = fz.value_and_grad(loss, {"x": P(None, "data")})
    parts = source, fz.accumulate(4, stream=True), fz.all_reduce("data"), fz.sgd(1.0)
    step = fz.train_step(*parts, mesh={"data": 1}, sums="exact")
    state, x = step.init({"w": torch.zeros(4)}), torch.arange(12.0).view(4, 3)
    mine = step.local_rows({"x": x}, 1)
    assert step.eval(loss)(state, mine).weight == 3
    for b in [*mine.split(4), None]:
        state, m = step(state, b)
    assert m.weight == 3
    assert torch.equal(step.params(state)["w"], -x.mean(1))


@EACH
@pytest.mark.parametrize("case", SIZES)
def test_sums_are_those_in_float64_and_what_cannot_be_counted_is_skipped(case, whole):
    """Without `whole` in one world of several ranks, the next case in another."""
    several = (2, 1), (4, 3), (3, 1)
    runs = [
        simulate({"data": world}, timeout=60)(sums_of, case, stage, world)[0]
        for world, stage in ((1, 0), *(several if whole else several[list(SIZES).index(case) % 3 :][:1]))
    ]
    assert len({tree_hash(run) for run in runs}) == 1
    for t, (grads, ok, norm) in enumerate(runs[0]):
        assert ok == (t not in SKIPPED.get(case, ()))
        if not ok:
            continue
        exact = {n: x.double().sum(0) for n, x in rows_of(t, SIZES[case][t]).items()}
        for n, want in exact.items():
            top = float(rows_of(t, SIZES[case][t])[n].abs().max())
            unit = max(top, float(SIZES[case][max(t - 1, 0)])) * 2.0**-41 if t else 2.0**-64
            off = (grads[n].double() - want).abs()
            assert bool((off <= want.abs() * 2.0**-22 + 6 * unit).all()), (n, t)
        whole = torch.cat([x.flatten() for x in exact.values()]).norm() / 6
        assert norm == pytest.approx(float(whole), rel=1e-4)


def test_float64_keeps_what_float64_holds():
    """More than 44 bits, where sums are handed on in float64."""

    def run(world):
        parts = fz.zero(fz.value_and_grad(linear, P("data")), fz.sgd(0.0), stage=1, accumulate=6 // world)
        step = fz.train_step(*parts, mesh={"data": world}, sums="exact", policy="float64")
        state = step.init({n: torch.zeros(shape, dtype=torch.float64) for n, shape in SHAPES.items()})
        rows = {n: x.double() / 3 for n, x in rows_of(0, 1.0).items()}
        for _ in range(2):
            grads = step.grads(state, step.local_rows(rows))
            state, _ = step(state, step.local_rows(rows))
        return grads, {n: x.sum(0) / 6 for n, x in rows.items()}

    (one, want), (two, _) = (simulate({"data": n})(run, n)[0] for n in (1, 2))
    assert tree_hash(one) == tree_hash(two)
    assert max(float((one[n] - want[n]).abs().max()) for n in want) < 1e-15


def infinite(world, stage):
    """An infinity in one row of one micro-batch, and a scale that falls for it."""
    parts = fz.zero(
        fz.value_and_grad(linear, P("data")), fz.scale_loss(2.0**4, hysteresis=1), fz.sgd(0.1), stage=stage,
        accumulate=-(-6 // world),
    )  # fmt: skip
    step = fz.train_step(*parts, mesh={"data": world}, sums="exact", policy="compute=float16")
    state, log = step.init({n: torch.zeros(shape) for n, shape in SHAPES.items()}), []
    for t in range(4):
        rows = rows_of(t, 1.0)
        if t == 1:
            rows["w"][3, 0, 0] = torch.inf
        state, m = step(state, step.local_rows(rows, 1))
        log.append((m.ok, m.scale, m.grad_norm if m.ok else m.ok))
    return tree_hash((log, step.params(state), state.chain["exact_sums"])), [bool(m[0]) for m in log]


def test_an_infinity_on_one_rank_skips_everywhere():
    found = {simulate({"data": n})(infinite, n, s)[0][0] for n, s in ((1, 0), (2, 2), (3, 3), (4, 1))}
    assert len(found) == 1
    assert infinite(1, 0)[1] == [True, False, True, True]


def test_what_cannot_be_counted_is_said(caplog):
    sums_of("grows too fast", 1, 1)
    assert "the gradient of 'w' is so much larger or smaller than in the last update that its exact sum" in caplog.text


def test_what_cannot_be_counted_is_said_and_leaves_the_loss_scale():
    """It did not overflow: a dynamic scale neither falls for it nor takes it for its own search."""
    grad, scale = fz.value_and_grad(linear, P("data")), fz.scale_loss(2.0**4, weight=1.0, hysteresis=1)
    step = fz.train_step(grad, fz.all_reduce("data"), scale, fz.sgd(0.0), mesh={"data": 1}, sums="exact", patience=1)
    state = step.init({n: torch.zeros(shape) for n, shape in SHAPES.items()})
    state, m = step(state, rows_of(0, 2.0**-40))
    assert m.ok
    state, m = step(state, rows_of(1, 2.0**20))
    assert not m.ok and state.chain["scale_loss"].scale == 2.0**4
    with pytest.raises(FloatingPointError, match="its exact sum does not fit"):
        step(state, rows_of(2, 2.0**20))


# --- bytes ------------------------------------------------------------------------------------------------------------
def sent(sums, stage, k):
    step = zoo.make(stage, k=k, mesh={"data": 2}, sums=sums)
    state = step.init(zoo.params())
    batch = step.local_rows(zoo.batch(0))
    state, _ = step(state, batch)
    with fz.count_bytes(step) as count:
        step(state, batch)
    return sum(n for (_, verb, dtype), n in count.items() if dtype != "int64" or verb != "all_reduce")


@pytest.mark.parametrize(("stage", "k", "ratio"), [(0, 1, 1.0), (1, 1, 1.0), (3, 4, 1.0), (2, 4, 1.0), (1, 4, 1.6)])
def test_the_first_sum_costs_no_byte_more(stage, k, ratio):
    """Beside the packed sum; a sum after the first one sends 8 bytes a value in place of 4."""
    exact, tree = (simulate({"data": 2})(sent, sums, stage, k)[0] for sums in ("exact", "tree"))
    assert exact <= ratio * tree


# --- a run that goes on elsewhere -------------------------------------------------------------------------------------
def first_half(folder, axes, stage, stream):
    """Two updates, or an open window of the third, saved."""
    step, state = _begun(axes, stage, stream)
    state = _some(step, state, range(2), stream)
    if stream:
        mine = step.local_rows(zoo.batch(2), ROWS)
        for b in (mine.split(stream) if hasattr(mine, "micros") else zoo.split(mine, stream))[:1]:
            state, _ = step(state, b)
    with fz.Checkpointer(folder, step=step) as saver:
        saver.save(state, "half")
        saver.wait()


def second_half(folder, axes, stage, stream, opened):
    step, _ = _begun(axes, stage, stream)
    with fz.Checkpointer(folder, step=step) as saver:
        state = saver.restore(like=(step, zoo.params())).state
    if stream and opened:
        mine = step.local_rows(zoo.batch(2), ROWS)
        for b in [*(mine.split(stream) if hasattr(mine, "micros") else zoo.split(mine, stream))[1:], None]:
            state, _ = step(state, b)
    state = _some(step, state, range(int(state.step), 5), stream)
    return tree_hash(step.params(state))


def _begun(axes, stage, stream):
    k = -(-zoo.MICROS // axes["data"])
    acc = (fz.accumulate(k, stream=bool(stream)),)
    step = fz.train_step(*fz.zero(source(), *zoo.tx(True), stage=stage, accumulate=acc), mesh=axes, sums="exact")
    return step, step.init(zoo.params(), key=7)


def _some(step, state, updates, stream):
    for t in updates:
        mine = step.local_rows(zoo.batch(t), ROWS)
        parts = mine.split(stream or 1) if hasattr(mine, "micros") else zoo.split(mine, stream or 1)
        for b in [*parts, None] if stream else [mine]:
            state, _ = step(state, b)
    return state


def test_a_run_goes_on_with_another_number_of_ranks(run_world, tmp_path):
    """Saved on three ranks, restored on two at another stage, as one run; and an open window where it was."""
    want = simulate({"data": 1})(whole_run)[0]
    run_world(3, first_half, str(tmp_path / "a"), {"data": 3}, 1, 0)
    assert zoo.everywhere(run_world, 2, second_half, str(tmp_path / "a"), {"data": 2}, 3, 0, False) == want
    run_world(3, first_half, str(tmp_path / "b"), {"data": 3}, 1, 3)
    assert zoo.everywhere(run_world, 3, second_half, str(tmp_path / "b"), {"data": 3}, 1, 3, True) == want


def whole_run():
    step, state = _begun({"data": 1}, 0, 0)
    return tree_hash(step.params(_some(step, state, range(5), 0)))


def test_a_state_of_tree_sums_goes_on_with_exact_ones():
    """As a restore of an older checkpoint: the units begin as in the first update."""
    parts = fz.zero(zoo.source(), *zoo.tx(), stage=2)
    tree, exact = (fz.train_step(*parts, mesh={"data": 1}, sums=sums) for sums in ("tree", "exact"))
    state, _ = tree(tree.init(zoo.params()), zoo.batch(0))
    state, m = exact(fz.reshard(state, exact), zoo.batch(1))
    assert m.ok and int(state.updates) == 2
    state, m = tree(fz.reshard(state, tree), zoo.batch(2))
    assert m.ok and "exact_sums" not in state.chain


# --- engine -----------------------------------------------------------------------------------------------------------
def engine_run(stage, updates=3, micros=6):
    """An engine of a config: losses are the engine's own, weights are read at the end."""
    import funczero.deepspeed as deepspeed

    world, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    k = micros // world
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": k, "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, "zero_optimization": {"stage": stage},
        "funczero": {"sums": "exact"},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=module, config=config)
    for t in range(updates):
        g = torch.Generator().manual_seed(t)
        x, y = torch.randn(micros, 2, 5, generator=g), torch.randn(micros, 2, 3, generator=g)
        for j in range(k):
            i = j * world + rank
            engine.backward(((engine(x[i]) - y[i]) ** 2).mean())
            engine.step()
    return tree_hash({n: p.clone() for n, p in engine.module.state_dict().items()})


@EACH
def test_one_hash_of_an_engine(run_world, whole):
    """Whoever has which micro-batch: ranks first here, at every stage."""
    at = [(n, stage) for n in (2, 3) for stage in range(4)] if whole else [(2, 0), (3, 1), (3, 2), (2, 3)]
    found = {zoo.everywhere(run_world, n, engine_run, stage) for n, stage in at}
    assert len(found) == 1


# --- refusals ---------------------------------------------------------------------------------------------------------
def uneven(**kw):
    step = fz.train_step(*fz.zero(zoo.source(**kw), *zoo.tx(), stage=1, accumulate=3), mesh={"data": 1}, sums="exact")
    return step, step.init(zoo.params())


def test_an_empty_place_counts_for_nothing():
    """Two micro-batches in three places give the bits of two places."""
    step, state = uneven()
    two = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=1, accumulate=2), mesh={"data": 1}, sums="exact")
    batch = zoo.batch(0, micros=2)
    mine = step.local_rows(batch, ROWS)
    assert (mine.micros, mine.here, mine.places) == (2, 2, 3)
    new, m = step(state, mine)
    other, n = two(two.init(zoo.params()), two.local_rows(batch))
    assert tree_hash((step.params(new), m)) == tree_hash((two.params(other), n))
    assert step.eval(zoo.loss_plain)(new, mine).loss == two.eval(zoo.loss_plain)(other, batch).loss


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: fz.train_step(fz.value_and_grad(linear), fz.sgd(0.1), sums="integer"),
            ValueError,
            "sums='integer' is none of 'tree', 'exact' and 'backend'",
        ),
        (
            lambda: fz.train_step(
                fz.value_and_grad(linear, P("data")), fz.all_reduce("data", fz.int8(64)), fz.sgd(0.1),
                mesh={"data": 2}, sums="exact",
            ),
            ChainError,
            "sums='exact' over 'data': int8.*rounds once for every sum",
        ),
        (
            lambda: fz.train_step(
                fz.value_and_grad(linear), fz.accumulate(1 << 17), fz.sgd(0.1), sums="exact"
            ),
            ChainError,
            "131072 micro-batches has more than the 65536",
        ),
        (
            lambda: fz.differentiable(fz.train_step(fz.value_and_grad(linear), fz.sgd(0.1), sums="exact")),
            ChainError,
            "integers have no derivative",
        ),
        (
            lambda: fz.train_step(
                fz.shard("data", fz.value_and_grad(linear, P("data"), higher_order=True), fz.sgd(0.1)),
                mesh={"data": 2}, sums="exact",
            ),
            ChainError,
            "inside the derivative, as floats",
        ),
        (
            lambda: uneven()[0].local_rows(zoo.batch(0), 7),
            ValueError,
            "rows=7 does not cut a batch of 24 rows into one to 3 micro-batches",
        ),
        (lambda: uneven()[0].local_rows(zoo.batch(0), ROWS), ValueError, "into one to 3 micro-batches"),
    ],
    ids=["word", "wire", "too many", "differentiable", "higher order", "rows", "more than places"],
)  # fmt: skip
def test_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_copies_do_not_reach_a_loss_that_would_count_them():
    """A differentiable step cuts a batch by itself, and knows of no empty places."""
    step = fz.train_step(*fz.zero(zoo.source(), fz.sgd(0.1), stage=1, accumulate=3), mesh={"data": 1})
    state, mine = step.init(zoo.params()), step.local_rows(zoo.batch(0, micros=2), ROWS)
    with pytest.raises(TypeError, match="has copies in empty places, which would count here"):
        fz.differentiable(step)(state, mine)


def test_what_is_promised_is_printed():
    step = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=2, accumulate=3), mesh={"data": 3}, sums="exact")
    assert "sums are exact: the same bits on any number of ranks" in str(step) and "power of two" not in str(step)
