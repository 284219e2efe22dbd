"""A whole step under torch.func: its derivatives are those of the unsharded update, its values the step's own bits."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cover import EACH
from cover import params as covered
from layouts import cut
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import funczero as fz
from funczero import P
from funczero.comm.adjoint import total
from funczero.core.straight import root
from funczero.testing import simulate

TOLERANCE = 1e-10
STEPS = 2  # what the first leaves in masters and moments, the second reads
double = lambda x: torch.tensor(x, dtype=torch.float64)


def params():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64) * 0.5
    blocks = [{"w": draw(3, 3), "b": draw(3)} for _ in range(2)]
    return {"blocks": blocks, "emb": draw(7, 3), "out": draw(3, 2), "scale": draw()}


def block(p, x):
    return x + torch.tanh(x @ p["w"] + p["b"])


def loss_fn(p, b):
    """Rows with weights of their own; some words never occur, so some second moments are 0."""
    out = fz.layers(block, p["blocks"], p["emb"][b["word"]]) @ p["out"] * p["scale"]
    return (((out - b["y"]) ** 2).sum(1) * b["weight"]).sum(), b["weight"].sum()


def batches(n, seed=1):
    g = torch.Generator().manual_seed(seed)
    word = torch.randint(0, 4, (n, 8), generator=g)
    y, weight = torch.randn(n, 8, 2, generator=g).double(), torch.rand(n, 8, generator=g).double() + 0.5
    return [{"word": word[i], "y": y[i], "weight": weight[i]} for i in range(n)]


# --- the unsharded truth ----------------------------------------------------------------------------------------------
def plain_adamw(p, g, own, lr, wd=0.01, b1=0.9, b2=0.999, eps=1e-8):
    n, mu, nu = own
    n = n + 1
    mu = {k: b1 * m + (1 - b1) * g[k] for k, m in mu.items()}
    nu = {k: b2 * v + (1 - b2) * g[k] ** 2 for k, v in nu.items()}
    step = {k: mu[k] / (1 - b1**n) / (root(nu[k]) / (1 - b2**n) ** 0.5 + eps) for k in p}
    return {k: p[k] * (1 - lr * wd) - lr * step[k] for k in p}, (n, mu, nu)


def plain_momentum(p, g, own, lr, wd=0.0):
    trace = {k: 0.9 * own[k] + g[k] + wd * p[k] for k in p}
    return {k: p[k] - lr * trace[k] for k in p}, trace


def clipped(g, limit):
    if limit is None:
        return g
    norm = root(sum((x**2).sum() for x in g.values()))
    return {k: x * (limit / norm).clamp(max=1) for k, x in g.items()}


def zeros(p):
    return {k: torch.zeros_like(x) for k, x in p.items()}


FORM = fz.tree.flatten(params())[1]
CHAINS = {
    "adamw": (
        (fz.clip_by_global_norm(0.5), fz.adamw(0.03)),
        plain_adamw,
        lambda p: (0, zeros(p), zeros(p)),
        "adamw",
        0.5,
    ),
    "momentum": ((fz.sgd(0.03, momentum=0.9),), plain_momentum, zeros, "sgd", None),
}


def truth(name):
    """The validation loss after three updates, as a function of what it is differentiated by."""
    _, update, init, _, limit = CHAINS[name]
    mean = lambda p, b: (lambda lw: lw[0] / lw[1])(loss_fn(fz.tree.unflatten(list(p.values()), FORM), b))

    def after(p, lr, wd, weights):
        own = init(p)
        for b, w in zip(batches(STEPS), weights, strict=True):
            g = grad(mean)(p, {**b, "weight": w})
            p, own = update(p, clipped(g, limit), own, lr, wd)
        return mean(p, batches(1, 9)[0])

    return after


def inputs():
    p = dict(fz.tree.paths(params()))
    return p, double(0.03), double(0.01), [b["weight"] for b in batches(STEPS)]


def sharded(name, stage, mesh, axes, units):
    """The same of a sharded step: by this rank's parts, rates and rows."""
    tx, _, _, key, _ = CHAINS[name]
    source = fz.value_and_grad(loss_fn, batch=P(axes), units=units)
    inner = (fz.accumulate(2), *tx)
    chain = fz.hpz(source, *inner) if stage == "hpz" else fz.zero(source, *inner, stage=stage, axis=axes)
    step = fz.train_step(*chain, mesh=mesh, policy="float64")
    state = step.init(params())
    smooth, loss, own = fz.differentiable(step), fz.sharded_loss(step, loss_fn, state), state.chain[key]

    def started(p, lr, wd):
        rates = {**own.rates, "lr": lr, "weight_decay": wd}
        return fz.with_parts(step.with_state(state, own._replace(rates=rates)), p)

    def after(p, lr, wd, weights):
        s = started(p, lr, wd)
        for b, w in zip(batches(STEPS), weights, strict=True):
            s, _ = smooth(s, {**step.local_rows(b), "weight": w})
        return loss(fz.parts(s), step.local_rows(batches(1, 9)[0]))

    mine = [step.local_rows({"w": b["weight"]})["w"] for b in batches(STEPS)]
    return step, started, after, (fz.parts(state), double(0.03), double(0.01), mine), loss


def compared(name, stage, mesh, axes, units):
    """By input the largest difference of derivatives, relative to the largest value; and are the values the bits?"""
    want = grad(truth(name), argnums=(0, 1, 2, 3))(*inputs())
    step, started, after, given, loss = sharded(name, stage, mesh, axes, units)
    got = grad(after, argnums=(0, 1, 2, 3))(*given)
    gap = lambda a, b: (a - b).abs().max().item() if b.numel() else 0.0
    top = max(x.abs().max().item() for x in want[0].values())
    errors = {"params": max(gap(got[0][n], x) for n, x in cut(loss, want[0]).items()) / top}
    errors["lr"] = gap(got[1], want[1]) / want[1].abs().item()
    errors["weight decay"] = gap(got[2], want[2]) / want[2].abs().item()
    rows = [step.local_rows({"w": w})["w"] for w in want[3]]
    errors["weights"] = max(map(gap, got[3], rows)) / max(x.abs().max().item() for x in want[3])
    t = fz.tree.map(torch.ones_like, given)
    along = jvp(after, given, t)[1]
    truly = jvp(truth(name), inputs(), fz.tree.map(torch.ones_like, inputs()))[1]
    errors["jvp"] = gap(along, truly) / truly.abs().item()
    s = r = started(*given[:3])
    for b in batches(STEPS):
        (s, m), (r, n) = fz.differentiable(step)(s, step.local_rows(b)), step(r, step.local_rows(b))
        errors["bits"] = sum(
            not torch.equal(a, b)
            for a, b in zip(fz.tree.leaves((s, m[:-1])), fz.tree.leaves((r, n[:-1])), strict=True)
            if not a.isnan().all()
        )
    return errors


FORMS = {"whole": (), "units": ("blocks",)}


@pytest.mark.parametrize(("form", "name", "stage"), covered(product(FORMS, CHAINS, range(4)), pairs=[(0, 1)]))
def test_meta_gradients_are_the_unsharded_ones(run_world, name, stage, form):
    for errors in run_world(2, compared, name, stage, {"data": 2}, ("data",), FORMS[form], timeout=300.0):
        bits = errors.pop("bits")
        assert all(e < TOLERANCE for e in errors.values()), errors
        assert form == "units" or not bits


@pytest.mark.slow
@pytest.mark.parametrize("form", ["whole", "units"])
def test_meta_gradients_with_hpz(run_world, form):
    mesh = {"node": 2, "local": 2}
    for errors in run_world(4, compared, "adamw", "hpz", mesh, ("node", "local"), FORMS[form], timeout=300.0):
        bits = errors.pop("bits")
        assert all(e < TOLERANCE for e in errors.values()), errors
        assert form == "units" or not bits


# --- every optimizer and transform ------------------------------------------------------------------------------------
def decayed():
    """A pair of plain operations with a count and a rate of its own in its state."""

    def init(p):
        return {"n": torch.zeros((), dtype=torch.float64), "lr": double(0.05), "m": fz.tree.map(torch.zeros_like, p)}

    def update(g, s, p):
        m = fz.tree.map(lambda m, g: 0.9 * m + g, s["m"], g)
        rate = s["lr"] / (1 + s["n"]).sqrt()
        return fz.tree.map(lambda m: -rate * m, m), {"n": s["n"] + 1, "lr": s["lr"], "m": m}

    return fz.lift((init, update), "decayed", elementwise=True)


def halved():
    return fz.lift((lambda p: (), lambda g, s, p: (fz.tree.map(lambda g: 0.5 * g, g), s)), "halved", elementwise=True)


RULES = [("emb", 0.01), ("", 0.05)]
SOURCES = {
    "adam": lambda: (fz.adam(0.03, weight_decay=0.1),),
    "nesterov": lambda: (fz.sgd(0.03, momentum=0.9, nesterov=True),),
    "adagrad": lambda: (fz.adagrad(0.05, eps=1e-4),),
    "lion": lambda: (fz.lion(0.01, weight_decay=0.1),),
    "rules": lambda: (fz.adamw(RULES, weight_decay=[("w$", 0.1), ("", 0.0)]),),
    "schedule": lambda: (fz.adamw(fz.schedules.warmup_cosine(0.05, 2, 10)),),
    "pair": lambda: (decayed(),),
    "partition": lambda: (fz.partition([("emb", fz.sgd(0.05)), ("blocks", decayed()), ("", fz.adamw(0.02))]),),
    "clip by value": lambda: (fz.clip_by_value(0.05), fz.sgd(0.03)),
    "clip after": lambda: (fz.clip_by_value(0.3), fz.clip_by_global_norm(0.1), fz.sgd(0.03)),
    "scale": lambda: (fz.scale_loss(init=8.0), fz.clip_by_global_norm(0.5), fz.adamw(0.03)),
    "a map": lambda: (fz.map_leaves(torch.tanh, "b", elementwise=True), fz.sgd(0.03)),
    "noise": lambda: (fz.add_noise(0.01), fz.sgd(0.03)),
    "frozen": lambda: (fz.freeze("out"), fz.adamw(0.03)),
    "two": lambda: (decayed(), halved()),
}


def directional(name, stage, mesh):
    """The derivative of a loss after an update along a direction in masters, moments and rates: by jvp, by vjp, and by
    differences of the step itself; and whether the values are the step's bits.
    """
    source = fz.value_and_grad(loss_fn, batch=P("data"))
    chain = fz.zero(source, fz.accumulate(2), *SOURCES[name](), stage=stage)
    step = fz.train_step(*chain, mesh=mesh, policy="float64")
    smooth, rows = fz.differentiable(step), [step.local_rows(b) for b in batches(3)]
    state = step.init(params())
    for b in rows[:2]:
        state, _ = step(state, b)
    learning = state.params.trainable()
    flat, form = fz.tree.flatten((learning, {k: x for k, x in state.chain.items() if k != "scale_loss"}))
    numbers = [isinstance(x, torch.Tensor) and x.dtype == torch.float64 and bool(x.count_nonzero()) for x in flat]
    g = torch.Generator().manual_seed(4)
    spread = torch.rand(len(flat), generator=g).double()

    moving = [x for x, n in zip(flat, numbers, strict=True) if n]
    along = [x * r for x, n, r in zip(flat, numbers, spread, strict=True) if n]

    def after(values, run):
        values = iter(values)
        masters, chain = fz.tree.unflatten([next(values) if n else x for x, n in zip(flat, numbers, strict=True)], form)
        given = state._replace(params=masters.with_frozen(state.params), chain={**state.chain, **chain})
        return measure(fz.parts(run(given, rows[2])[0]), rows[0])

    measure = fz.sharded_loss(step, loss_fn, state)
    by_jvp = jvp(lambda v: after(v, smooth), (moving,), (along,))[1].item()
    whole = lambda xs: fz.tree.unflatten([xs.pop(0) if n else x for x, n in zip(flat, numbers, strict=True)], form)
    found = grad(lambda v: after(v, smooth))(moving)
    by_vjp = inner(whole(found), whole(list(along)), step, stage)
    h = 1e-6
    after = lambda e, run, after=after: after([x + e * t for x, t in zip(moving, along, strict=True)], run)
    by_differences = (after(double(h), step) - after(double(-h), step)).item() / (2 * h)
    new, same = smooth(state, rows[2])[0], step(state, rows[2])[0]
    bits = all(
        torch.equal(a, b) for a, b in zip(fz.tree.leaves(new), fz.tree.leaves(same), strict=True) if a is not None
    )
    return by_jvp, by_vjp, by_differences, bits


def inner(a, b, step, stage):
    """The inner product of two trees over all ranks: what has rows is cut at stages 1 to 3, numbers are one for all."""
    flat = lambda t: [
        x
        for s in fz.tree.leaves(t, is_leaf=lambda x: isinstance(x, fz.Slots))
        for x in (s.leaves() if isinstance(s, fz.Slots) else [s])
        if isinstance(x, torch.Tensor) and x.dtype == torch.float64
    ]
    terms = [(x.dim() > 0 and stage > 0, (x * y).sum()) for x, y in zip(flat(a), flat(b), strict=True)]
    own = sum((t for cut, t in terms if cut), double(0.0))
    return (total(own, "data", step.live_mesh) + sum(t for cut, t in terms if not cut)).item()


@EACH
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_optimizer_and_transform(run_world, stage, whole):
    """Each at one stage, or with `whole` at all three."""
    for name in list(SOURCES) if whole else list(SOURCES)[[0, 1, 3].index(stage) :: 3]:
        for by_jvp, by_vjp, by_differences, bits in run_world(2, directional, name, stage, {"data": 2}):
            assert bits, name
            assert by_jvp == pytest.approx(by_vjp, rel=1e-9), name
            assert by_jvp == pytest.approx(by_differences, rel=1e-5, abs=1e-8), name


# --- many seeds, many steps, one graph --------------------------------------------------------------------------------
def made(stage, mesh=None, units=("blocks",), loss=loss_fn, tx=None, **options):
    tx = (fz.clip_by_global_norm(0.5), fz.adamw(0.03)) if tx is None else tx
    source = fz.value_and_grad(loss, batch=P("data"), units=units, **options)
    chain = fz.zero(source, fz.accumulate(2), *tx, stage=stage)
    return fz.train_step(*chain, mesh=mesh or {"data": 1}, policy="float64")


def largest(a, b):
    """The largest difference of two like trees' floating leaves."""
    pairs = zip(fz.tree.leaves(a), fz.tree.leaves(b), strict=True)
    floats = [(x, y) for x, y in pairs if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel()]
    return max((x - y).abs().max().item() for x, y in floats if not x.isnan().all())


def ensemble(stage):
    step = made(stage, {"data": 2})
    smooth, rows = fz.differentiable(step), [step.local_rows(b) for b in batches(3)]
    alone = [step.init(fz.tree.map(lambda x, s=s: x * s, params())) for s in (1.0, 0.5, 2.0)]
    together = fz.stack(alone)
    for b in rows:
        together, _ = vmap(smooth, in_dims=(0, None))(together, b)
        alone = [step(s, b)[0] for s in alone]
    return max(largest(a, b) for a, b in zip(fz.unstack(together), alone, strict=True)), [
        (int(s.step), int(s.updates)) for s in fz.unstack(together)
    ]


@pytest.mark.parametrize("stage", [0, 3])
def test_many_seeds_at_once(run_world, stage):
    for gap, counts in run_world(2, ensemble, stage):
        assert gap < 1e-14 and counts == [(3, 3)] * 3


def graph(stage):
    """A traced step's collectives by name, the eager step's number of launches, and how far it is from that step."""
    step = made(stage, {"data": 2})
    smooth, rows = fz.differentiable(step), [step.local_rows(b) for b in batches(2)]
    first, second = step.init(params()), step.init(fz.tree.map(lambda x: x / 2, params()))
    traced = make_fx(smooth)(first, rows[0])
    named = [n.target for n in traced.graph.nodes if "c10d" in str(n.target) and "wait" not in str(n.target)]
    with fz.count_bytes(step) as told:
        traced(second, rows[1])
    return len(named), sum(told.values()), largest(traced(second, rows[1]), smooth(second, rows[1]))


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.slow) for s in (0, 1)), 3])
def test_a_traced_step_is_one_graph_with_its_collectives(run_world, stage):
    for named, sent, gap in run_world(2, graph, stage):
        assert named >= 3 and not sent  # the graph sends by itself, without our count
        assert gap < 1e-15


def test_a_learned_schedule_goes_in_with_the_batches():
    step = made(3, tx=(fz.sgd(0.1),))
    smooth, state = fz.differentiable(step), step.init(params())

    def stepped(s, x):
        batch, lr = x
        own = s.chain["sgd"]
        return smooth(step.with_state(s, own._replace(rates={**own.rates, "lr": lr})), batch)

    rows = batches(4)
    last = lambda rates: fz.unroll(stepped, state, list(zip(rows, rates.unbind(), strict=True)), 2)[1][-1].loss
    rates = torch.full((4,), 0.1, dtype=torch.float64)
    slope, h = grad(last)(rates), 1e-6
    for i in range(4):
        d = torch.zeros(4).double()
        d[i] = h
        assert slope[i].item() == pytest.approx(
            (last(rates + d) - last(rates - d)).item() / (2 * h), rel=1e-5, abs=1e-9
        )


# --- skips, noughts, and what is refused ------------------------------------------------------------------------------
def test_an_update_that_is_skipped_is_the_identity():
    step = made(3)
    smooth, state = fz.differentiable(step), step.init(params())
    empty = {**batches(1)[0], "weight": torch.zeros(8).double()}
    after = lambda p: fz.parts(smooth(fz.with_parts(state, p), empty)[0])
    p = fz.parts(state)
    out, pull = torch.func.vjp(after, p)
    t = {k: torch.randn_like(x) for k, x in p.items()}
    assert not smooth(state, empty)[1].ok
    for k, x in pull(t)[0].items():
        assert torch.equal(out[k], p[k]) and torch.equal(x, t[k])


def test_a_gradient_of_nought_has_a_derivative_of_nought():
    """norm' and the root of a second moment at 0: plain torch says nan."""
    squares = lambda p, b: (p["w"] * b.sum()).sum() * 0.0 + (p["v"] ** 2).sum() * len(b) * 0.5
    flat = lambda p, b: (squares(p, b), torch.tensor(float(len(b))))
    step = fz.train_step(fz.value_and_grad(flat), fz.clip_by_global_norm(1.0), fz.adamw(0.1), policy="float64")
    zero = {"w": torch.zeros(3).double(), "v": torch.zeros(2).double()}
    state = step.init(zero)
    after = lambda p: fz.parts(fz.differentiable(step)(fz.with_parts(state, p), torch.ones(4))[0])
    for name, x in jvp(after, (fz.parts(state),), (fz.tree.map(torch.ones_like, fz.parts(state)),))[1].items():
        assert x.isfinite().all(), name


def test_what_has_no_derivative_is_refused_by_name():
    source = fz.value_and_grad(loss_fn, batch=P("data"))
    refusals = {
        "a window over many calls": fz.zero(source, fz.accumulate(2, stream=True), fz.sgd(0.1), stage=1),
        "its update is a kernel": fz.zero(source, fz.from_torch("RMSprop", 0.1), stage=1),
        "its updates would be the gradient of the next": fz.zero(source, fz.sgd(0.1), fz.sgd(0.1), stage=3),
        "its forward ran elsewhere": fz.zero(fz.pullback(batch=P("data")), fz.sgd(0.1), stage=0),
        "the wire over 'data'": fz.zero(source, fz.sgd(0.1), stage=3, gather=fz.cast("bfloat16")),
    }
    for why, chain in refusals.items():
        with pytest.raises(fz.ChainError, match=why):
            fz.differentiable(fz.train_step(*chain, mesh={"data": 1}))


def test_a_loss_that_draws_needs_a_key_that_can_be_read():
    drawn = lambda p, b, key: loss_fn({**p, "emb": fz.rng.dropout(p["emb"], 0.5, key)}, b)
    step = made(3, loss=drawn, rng=True)
    smooth, state = fz.differentiable(step), step.init(params(), key=3)
    assert largest(smooth(state, batches(1)[0])[0], step(state, batches(1)[0])[0]) < 1e-15
    with pytest.raises(RuntimeError, match="the state's key is batched or traced"):
        vmap(smooth, in_dims=(0, None))(fz.stack([state, state]), batches(1)[0])


def test_another_steps_state_is_refused():
    step, other = made(3), made(3, tx=(fz.sgd(0.1),))
    with pytest.raises(ValueError, match="this state is not one of this step"):
        fz.differentiable(step)(other.init(params()), batches(1)[0])
    with pytest.raises(TypeError, match="differentiable: its first argument is a TrainState"):
        fz.differentiable(step)(params(), batches(1)[0])
    with pytest.raises(TypeError, match="with_parts: 'emb' is missing or no parameter"):
        fz.with_parts(step.init(params()), {k: x for k, x in fz.parts(step.init(params())).items() if k != "emb"})


def compiled(stage):
    """Updates with a compiled loss and with compiled blocks, against plain ones; and what a compiled step says."""
    aot = lambda fn: torch.compile(fn, backend="aot_eager")
    inner = aot(block)
    blocks = lambda p, b: loss_of(fz.layers(inner, p["blocks"], p["emb"][b["word"]]), p, b)
    step = made(stage, {"data": 2})
    rows = step.local_rows(batches(1)[0])
    want = step.params(step(step.init(params()), rows)[0])
    gaps = []
    for own, units in ((aot(loss_fn), ()), (blocks, ("blocks",))):
        other = made(stage, {"data": 2}, units, own)
        gaps.append(largest(other.params(other(other.init(params()), rows)[0]), want))
    try:
        aot(step)(step.init(params()), rows)
    except RuntimeError as error:
        return gaps, str(error)


def loss_of(h, p, b):
    out = h @ p["out"] * p["scale"]
    return (((out - b["y"]) ** 2).sum(1) * b["weight"]).sum(), b["weight"].sum()


@pytest.mark.slow
def test_torch_compile_takes_a_loss_and_a_block_and_no_step(run_world):
    for gaps, said in run_world(2, compiled, 3, timeout=300.0):
        assert max(gaps) < 1e-15 and "torch.compile does not go through a step" in said


def narrow(stage, mesh, axes, higher):
    """Is an update with gradients born in bfloat16 and added in float32 the step's own, bit for bit?"""
    loss = lambda p, b: loss_fn(p, {**b, "y": b["y"].to(p["out"].dtype)})
    policy = "params=float32,compute=bfloat16,accumulate=float32"
    states = []
    for form in (False, higher):
        source = fz.value_and_grad(loss, batch=P(axes), higher_order=form)
        step = fz.train_step(*fz.zero(source, fz.adamw(0.03), stage=stage, axis=axes), mesh=mesh, policy=policy)
        given = step.init(fz.tree.map(torch.Tensor.float, params())), step.local_rows(batches(1)[0])
        states.append((step if form or not states else fz.differentiable(step))(*given)[0])
    return all(torch.equal(a, b) for a, b in zip(fz.tree.leaves(states[0]), fz.tree.leaves(states[1]), strict=True))


@pytest.mark.parametrize("higher", [False, True], ids=["differentiable", "higher order"])
def test_gradients_that_are_born_narrow_are_added_as_the_policy_says(run_world, higher):
    """A leaf that no axis cuts too, and over two axes of rest."""
    assert all(run_world(2, narrow, 3, {"data": 2}, ("data",), higher))
    assert all(run_world(4, narrow, 3, {"node": 2, "local": 2}, ("node", "local"), higher))


OPTIMIZERS = {
    "adamw": lambda: fz.adamw(0.03),
    "momentum": lambda: fz.sgd(0.03, momentum=0.9),
    "sgd": lambda: fz.sgd(0.03),
    "adagrad": lambda: fz.adagrad(0.03),
    "lion": lambda: fz.lion(0.03),
    "pair": decayed,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_narrow_masters_keep_their_dtype_with_tangents_and_in_a_batch(name):
    """Rates are float64, which a leaf without dims would take over."""
    loss = lambda p, b: loss_fn(p, {**b, "y": b["y"].float()})
    source = fz.value_and_grad(loss, batch=P("data"))
    step = fz.train_step(*fz.zero(source, OPTIMIZERS[name](), stage=3), mesh={"data": 1})
    smooth, state = fz.differentiable(step), step.init(fz.tree.map(torch.Tensor.float, params()))
    rows, p = batches(1)[0], fz.parts(state)
    moved, along = jvp(lambda p: fz.parts(smooth(fz.with_parts(state, p), rows)[0]), (p,), (p,))
    assert {x.dtype for x in (*moved.values(), *along.values())} == {torch.float32}
    together, _ = vmap(smooth, in_dims=(0, None))(fz.stack([state, state]), rows)
    alone = step(state, rows)[0]
    for a, b in zip(fz.tree.leaves(fz.unstack(together)[0]), fz.tree.leaves(alone), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, equal_nan=True)


def test_an_update_of_what_is_not_finite_is_the_identity_backwards_too():
    """Nothing comes back through it, where 0 times inf would be nan; the loss keeps its derivative."""
    root_loss = lambda p, b: ((p["w"].abs() + b["x"]).sqrt().sum() + (p["v"] ** 2).sum(), b["x"].sum() + 1.0)
    source = fz.value_and_grad(root_loss)
    step = fz.train_step(source, fz.clip_by_global_norm(0.5), fz.adamw(0.1), policy="float64")
    state = step.init({"w": torch.ones(2).double(), "v": torch.ones(3).double()})
    smooth, p, x = fz.differentiable(step), fz.parts(state), torch.tensor([-1.0, 1.0]).double()  # inf at the first

    def after(p, x):
        new, metrics = smooth(fz.with_parts(state, p), {"x": x})
        return fz.parts(new), metrics

    new, pull, metrics = torch.func.vjp(after, p, x, has_aux=True)
    t = {k: torch.randn_like(y) for k, y in p.items()}
    back, by_rows = pull(t)
    assert not metrics.ok and metrics.loss.isfinite() and not by_rows.count_nonzero()
    assert all(torch.equal(new[k], p[k]) and torch.equal(back[k], t[k]) for k in p)
    assert grad(lambda p: after(p, x)[1].loss)(p)["v"].tolist() == [2.0] * 3


def test_a_clip_of_no_gradient_has_a_derivative_by_the_weights():
    squares = lambda p, b: ((p["w"] ** 2).sum() * b.sum(), b.sum())
    step = fz.train_step(fz.value_and_grad(squares), fz.clip_by_global_norm(1.0), fz.sgd(0.1), policy="float64")
    state = step.init({"w": torch.zeros(3).double()})
    after = lambda b: fz.parts(fz.differentiable(step)(state, b)[0])["w"].sum()
    assert grad(after)(torch.ones(4).double()).tolist() == [0.0] * 4


def test_a_loss_scale_at_its_floor_changes_nothing():
    """There the first leaf that is not finite is looked for in every update."""
    step, plain = made(3, tx=(fz.scale_loss(init=1.0, hysteresis=1), fz.sgd(0.1))), made(3, tx=(fz.sgd(0.1),))
    rows, found = batches(1)[0], []
    for each in (step, plain):
        state, smooth = each.init(params()), fz.differentiable(each)
        after = lambda p, smooth=smooth, state=state: smooth(fz.with_parts(state, p), rows)
        found.append(grad(lambda p, after=after: after(p)[1].loss + fz.parts(after(p)[0])["scale"])(fz.parts(state)))
    for k, x in found[1].items():
        torch.testing.assert_close(found[0][k], x, rtol=1e-12, atol=1e-14)
    state = step.init(params())
    with pytest.raises(RuntimeError, match="scale_loss: its scale is read as a number"):
        vmap(fz.differentiable(step), in_dims=(0, None))(fz.stack([state, state]), rows)
    with pytest.raises(RuntimeError, match="scale_loss: its scale is read as a number"):
        make_fx(fz.differentiable(step))(state, rows)


def test_a_state_that_was_donated_is_refused():
    step = fz.donate(made(3))
    state, rows = step.init(params()), batches(1)[0]
    new, _ = step(state, rows)
    for call in (lambda: fz.differentiable(step)(state, rows), lambda: fz.parts(state)):
        with pytest.raises(RuntimeError, match="this state was donated at step 0 and its memory is in use"):
            call()
    assert fz.differentiable(step)(new, rows)[1].ok


def test_what_an_optimizer_captures_is_refused():
    """Only what is in its state has a derivative."""

    class Learned:
        def __init__(self, by):
            self.by = by

        def init(self, p):
            return ()

        def update(self, g, s, p):
            return fz.tree.map(lambda x: -self.by * x, g), s

    def moved(by, kind):
        tx = {
            "schedule": lambda: fz.sgd(lambda n: by * 0.9**n),
            "rules": lambda: fz.adamw([("emb", 0.1), ("", lambda n: by * 0.9**n)]),
            "pair": lambda: fz.lift(
                (lambda p: (), lambda g, s, p: (fz.tree.map(lambda x: -by * x, g), s)), "pair", True
            ),
            "object": lambda: fz.lift(Learned(by), "object", elementwise=True),
        }[kind]()
        step = made(3, tx=(tx,))
        return fz.parts(fz.differentiable(step)(step.init(params()), batches(1)[0])[0])["scale"]

    for kind in ("schedule", "rules", "pair", "object"):
        assert moved(double(0.1), kind).isfinite()
        with pytest.raises(TypeError, match="whose derivative would be lost; keep the number in its state"):
            grad(lambda by, kind=kind: moved(by, kind))(double(0.1))
        with pytest.raises(TypeError, match="captures a tensor of shape"):
            moved(double(0.1).requires_grad_(), kind)


def test_an_unroll_and_a_block_refuse_what_their_object_holds():
    class Inner:
        def __init__(self, by):
            self.by = by

        def __call__(self, c, x):
            return c * self.by, x

        def block(self, p, x):
            return x + torch.tanh(x @ p["w"]) * self.by

    xs = [torch.tensor(1.0)] * 4
    for fn in (lambda by: Inner(by), lambda by: Inner(by).__call__):
        with pytest.raises(TypeError, match="unroll: fn captures a tensor"):
            grad(lambda by, fn=fn: fz.unroll(fn(by), torch.tensor(1.0), xs, remat=2)[0])(torch.tensor(0.5))

    def scaled_by(by):
        deep = lambda p, b: loss_of(fz.layers(Inner(by).block, p["blocks"], p["emb"][b["word"]]), p, b)
        step = made(3)
        state = step.init(params())
        return fz.sharded_loss(step, deep, state)(fz.parts(state), batches(1)[0])

    with pytest.raises(TypeError, match="the block captures a tensor of shape"):
        grad(scaled_by)(double(0.5))


def test_tensors_of_a_state_that_only_look_like_parts_are_refused():
    """Two vectors as long as this rank's parts are not its parts: their derivatives would miss the other ranks'."""

    def init(p):
        return {
            "first": torch.ones(2).double(),
            "second": torch.ones(2).double(),
            "m": fz.tree.map(torch.zeros_like, p),
        }

    def update(g, s, p):
        return fz.tree.map(lambda x: -x * s["first"].sum() * s["second"].sum(), g), s

    def run(stage):
        flat = lambda p, b: ((p["a"] * p["b"]).sum() * b.sum(), b.new_tensor(float(len(b))))
        tx = fz.lift((init, update), "learned", elementwise=True)
        source = fz.value_and_grad(flat, batch=P("data"))
        step = fz.train_step(*fz.zero(source, tx, stage=stage), mesh={"data": 2}, policy="float64")
        state = step.init({"a": torch.ones(4).double(), "b": torch.ones(4).double()})
        with pytest.raises(TypeError, match=r"the state of learned holds a tensor of shape \(2,\)"):
            grad(lambda p: fz.parts(fz.differentiable(step)(fz.with_parts(state, p), torch.ones(2))[0])["a"].sum())(
                fz.parts(state)
            )

    simulate({"data": 2})(run, 3)


def test_a_first_call_may_be_inside_any_transform():
    """What a chain keeps from its first call on is of no transform: all second derivatives at once, by torch's own."""
    found = []
    for before in (True, False):
        step = made(3)
        smooth, state, rows = fz.differentiable(step), step.init(params()), batches(1)[0]
        after = lambda p, smooth=smooth, state=state, rows=rows: smooth(fz.with_parts(state, p), rows)[1]
        if before:
            after(fz.parts(state))
        found.append(torch.func.hessian(lambda p, after=after: after(p).loss + after(p).grad_norm)(fz.parts(state)))
        p = fz.parts(state)
        along = vmap(lambda s, after=after, p=p: after({k: x * s for k, x in p.items()}).loss)
        assert along(double([1.0, 2.0])).isfinite().all()
    assert largest(*found) < 1e-13


def weightless(stage, units):
    """A meta-gradient through two updates in which one of two ranks has no row that counts, against plain torch's."""
    mean = lambda p, b: torch.nn.functional.cross_entropy(
        fz.layers(block, p["blocks"], p["emb"][b["word"]]) @ p["out"], b["y"]
    )
    loss = fz.mean_loss(mean, lambda b: (b["y"] != -100).sum())
    source = fz.value_and_grad(loss, batch=P("data"), units=units)
    step = fz.train_step(*fz.zero(source, fz.sgd(0.5), stage=stage), mesh={"data": 2}, policy="float64")
    state, smooth = step.init(params()), fz.differentiable(step)
    b = {"word": torch.arange(8) % 5, "y": torch.tensor([0, 1, 1, 0, *[-100] * 4])}
    size = fz.sharded_loss(step, lambda p, b: (p["out"].square().sum() + p["emb"].square().sum(), double(1.0)), state)
    rows = step.local_rows(b)

    def after(p):
        return size(fz.parts(fz.unroll(smooth, fz.with_parts(state, p), [rows] * 2)[0]), rows)

    def plain(p):
        for _ in range(2):
            g = grad(lambda p: mean(fz.tree.unflatten(list(p.values()), FORM), b))(p)
            p = {k: x - 0.5 * g[k] for k, x in p.items()}
        return p["out"].square().sum() + p["emb"].square().sum()

    got, want = grad(after)(fz.parts(state)), cut(size, grad(plain)(dict(fz.tree.paths(params()))))
    return max((got[k] - x).abs().max().item() if x.numel() else 0.0 for k, x in want.items())


@pytest.mark.parametrize("units", [(), ("blocks",)], ids=["whole", "units"])
def test_a_rank_whose_rows_count_for_nothing(run_world, units):
    for stage in (0, 1, 3):
        assert all(gap < 1e-12 for gap in run_world(2, weightless, stage, units)), stage
