"""Loss scaling is a seed: DeepSpeed's state machine, the unscaled gradient's bits, and a skip that touches nothing
else.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo

import funczero as fz
from funczero import P
from funczero.testing import tree_hash
from funczero.transforms.loss_scale import ScaleLoss, update_scale

GOLDEN = json.loads((Path(__file__).parent / "golden/loss_scaler.json").read_text())["cases"]
FP16 = "params=float32,compute=float16,accumulate=float32"


def machine(scale, hysteresis, iteration=0, last=-1, weight=1.0):
    i = torch.int64
    return ScaleLoss(
        torch.tensor(float(scale), dtype=torch.float64),
        *(torch.tensor(x, dtype=i) for x in (hysteresis, iteration, last)),
        torch.tensor(weight),
        torch.tensor([-1, -1]),
    )


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: c["note"])
def test_the_state_machine_is_deepspeeds_state_by_state(case):
    p = case["params"]
    s = machine(p["init_scale"], p["delayed_shift"])
    rules = dict(
        window=p["scale_window"],
        hysteresis=p["delayed_shift"],
        floor=p["min_scale"],
        consecutive=p["consecutive_hysteresis"],
    )
    for overflow, want in zip(case["overflow"], case["after"], strict=False):
        dead = bool(overflow) and s.scale <= rules["floor"] and s.hysteresis <= 1
        new = update_scale(s, torch.tensor(bool(overflow)), **rules)
        assert (new.scale.item(), new.hysteresis.item()) == (want["scale"], want["hysteresis"])
        if "error" in want:  # DeepSpeed raises here; the same predicate fills `stuck`, and the next call raises
            assert dead and (new.scale, new.hysteresis) == (s.scale, s.hysteresis)
            return
        assert (new.iteration.item(), new.last_overflow.item()) == (want["cur_iter"], want["last_overflow_iter"])
        s = new
    assert len(case["after"]) == len(case["overflow"])


# --- one linear leaf a rank can spoil ---------------------------------------------------------------------------------
def params():
    return {
        "a": torch.linspace(-1, 1, 12).view(4, 3),
        "blocks": [{"w": torch.linspace(0, 1, 9).view(3, 3)} for _ in range(2)],
        "spike": torch.ones(5),
    }


def loss(p, b):
    """`spike` alone meets b["spike"], whose gradient is not finite where that is not."""
    x = fz.layers(lambda q, x: torch.tanh(x @ q["w"]), p["blocks"], (b["x"].to(p["a"].dtype) @ p["a"]))
    return (x.square().sum(1).to(b["w"].dtype) * b["w"]).sum() + (p["spike"][3].to(b["w"].dtype) * b["spike"]).sum(), b[
        "w"
    ].sum()


def batch(bad=None, weight=1.0, n=8):
    """n rows; the rows of rank `bad` (of two, at k = 2) spoil the gradient."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(3))
    b = {"x": x, "w": torch.full((n,), weight), "spike": torch.zeros(n)}
    if bad is not None:
        b["spike"][bad] = torch.inf
    return b


def make(stage, *left, tx=None, k=2, policy=None, units=("blocks",), **kw):
    g = fz.value_and_grad(loss, batch=P("data"), units=units)
    return fz.train_step(
        *fz.zero(g, *left, *(tx or (fz.clip_by_global_norm(1.0), fz.adamw(1e-2))), stage=stage, accumulate=k),
        mesh={"data": -1},
        policy=policy,
        **kw,
    )


def counters(state):
    return [x.tolist() for x in state.chain["scale_loss"][:4]]


def kept(state):
    """What a skipped update leaves alone."""
    return {
        "params": state.params,
        "views": state.views,
        "adamw": state.chain["adamw"],
        "updates": state.updates,
        "key": state.key,
    }


def overflow_on_rank_one():
    """By stage: what the metrics, the scaler and all other leaves say of an overflow on rank 1 alone, after one good
    update.
    """
    out = []
    for stage in range(4):
        step = make(stage, fz.scale_loss(init=8.0, weight=8, hysteresis=2))
        micro = (
            4 if stage in (0, 1) else 2
        )  # ranks' rows: whole halves where time is summed first, else every other micro-batch
        state, m0 = step(step.init(params()), step.local_rows(batch()))
        before = kept(state)
        new, m = step(state, step.local_rows(batch(bad=micro)))
        after = kept(new)
        third, m3 = step(new, step.local_rows(batch(bad=micro)))
        out.append(
            (
                m0.ok.item(),
                m.ok.item(),
                m.empty.item(),
                m.scale.item(),
                tree_hash(before) == tree_hash(after),
                int(new.step),
                int(new.updates),
                counters(new),
                m3.scale.item(),
                counters(third),
            )
        )
    return out


def test_an_overflow_on_one_rank_skips_on_all_and_touches_nothing_else(run_world):
    #       good, bad,  empty, scale, untouched, step, updates, [scale, hysteresis, iteration, last], ...
    want = (True, False, False, 8.0, True, 2, 1, [8.0, 1, 2, 1], 8.0, [4.0, 1, 3, 2])
    assert zoo.everywhere(run_world, 2, overflow_on_rank_one) == [want] * 4


def stuck():
    """By stage: the skip at the floor, and what the next call says in this rank."""
    out = []
    for stage in range(4):
        step = make(stage, fz.scale_loss(init=1.0, weight=8, hysteresis=1))
        state, m = step(step.init(params()), step.local_rows(batch(bad=4 if stage in (0, 1) else 2)))
        with pytest.raises(FloatingPointError) as caught:
            step(state, step.local_rows(batch()))
        out.append((m.ok.item(), str(caught.value)))
    return out


def test_at_the_floor_the_next_call_names_the_leaf_and_the_rank_on_every_rank(run_world):
    said = (
        "scale_loss: the gradient overflowed at the smallest loss scale (1); the first non-finite leaf was 'spike' on"
        " rank 1: look at the data and the learning rate there, or write scale_loss(floor=...) smaller"
    )
    assert zoo.everywhere(run_world, 2, stuck) == [(False, said)] * 4


def test_a_stream_at_the_floor_names_the_leaf_too():
    g = fz.value_and_grad(loss, batch=P("data"), units=("blocks",))
    step = fz.train_step(
        fz.shard(
            "data", g, fz.accumulate(2, stream=True), fz.scale_loss(init=1.0, weight=4, hysteresis=1), fz.adamw(1e-2)
        ),
        mesh={"data": 1},
    )
    state = step.init(params())
    for b in (batch(bad=1, n=2), batch(n=2), None):
        state, m = step(state, b)
    assert not m.ok
    with pytest.raises(FloatingPointError, match="'spike' on rank 0"):
        step(state, batch(n=2))


def test_a_static_scale_skips_and_never_falls_nor_raises():
    step = make(3, fz.scale_loss(init=4.0, weight=8, dynamic=False, hysteresis=1))
    state, seen = step.init(params()), []
    for bad in (0, 0, None):
        state, m = step(state, step.local_rows(batch(bad)))
        seen.append((m.ok.item(), m.scale.item()))
    assert seen == [(False, 4.0), (False, 4.0), (True, 4.0)] and int(state.updates) == 1 and int(state.step) == 3


# --- the unscaled gradient --------------------------------------------------------------------------------------------
def trained(stage, *left, updates=5, tx=None):
    """Masters' bits, the norms, and the scales that were used."""
    step = make(stage, *left, tx=tx)
    state, log = step.init(params()), []
    for _ in range(updates):
        state, m = step(state, step.local_rows(batch()))
        log.append(m)
    return (
        tree_hash([step.params(state), [m.loss for m in log]]),
        [m.grad_norm.item() for m in log],
        [m.scale.item() for m in log],
    )


@pytest.mark.parametrize("tx", [(fz.adamw(1e-2),), (fz.sgd(0.5, momentum=0.9),)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("stage", [0, 3])
def test_the_scale_leaves_no_trace_in_fp32_not_even_when_it_doubles(stage, tx):
    """Bit for bit the weights without it (norms to their 33 bits); DeepSpeed halves the update on which its scale
    doubles.
    """
    plain, norms, ones = trained(stage, tx=tx)
    scaled, theirs, scales = trained(stage, fz.scale_loss(init=2.0**15, window=2), tx=tx)
    assert scales == [2.0**15] * 3 + [2.0**16] * 2 and ones == [1.0] * 5
    assert scaled == plain and theirs == pytest.approx(norms, rel=2**-32)


def test_the_doubling_update_moves_as_far_as_the_one_before():
    """A linear loss under SGD: every update is the same step."""
    g = fz.value_and_grad(lambda p, b: ((p["w"] * b["x"]).sum(), torch.tensor(4.0)), batch=P("data"))
    step = fz.train_step(
        fz.shard("data", g, fz.scale_loss(init=4.0, weight=4, window=1), fz.sgd(1.0)), mesh={"data": 1}
    )
    state, at, scales = step.init({"w": torch.zeros(2)}), [torch.zeros(2)], []
    for _ in range(4):
        state, m = step(state, {"x": torch.ones(4, 2)})
        at.append(step.params(state)["w"])
        scales.append(m.scale.item())
    assert scales == [4.0, 4.0, 8.0, 16.0]
    assert [(b - a).tolist() for a, b in zip(at, at[1:])] == [[-1.0, -1.0]] * 4


def measured():
    """weight=None: n as taken at the first update that weighs anything, after an empty one."""
    seen = []
    step = make(3, fz.scale_loss(init=16.0))
    state = step.init(params())
    for weight in (0.0, 3.0, 5.0):
        state, m = step(state, step.local_rows(batch(weight=weight)))
        seen.append((state.chain["scale_loss"].weight.item(), m.weight.item(), m.ok.item()))
    return seen, tree_hash(step.params(state))


def given():
    step = make(3, fz.scale_loss(init=16.0, weight=32))
    state = step.init(params())
    for weight in (0.0, 3.0, 5.0):
        state, _ = step(state, step.local_rows(batch(weight=weight)))
    return tree_hash(step.params(state))


@pytest.mark.parametrize("world", [1, 2])
def test_the_weight_is_measured_once_as_a_power_of_two(run_world, world):
    seen, bits = zoo.everywhere(run_world, world, measured)
    assert seen == [
        (0.0, 0.0, False),
        (32.0, 24.0, True),
        (32.0, 40.0, True),
    ]  # 24 is nearer to 32 than to 16, in octaves
    assert bits == zoo.everywhere(run_world, world, given)


@pytest.mark.parametrize("weight", [None, 8])
def test_an_update_that_weighs_nothing_is_skipped_without_touching_the_scale(weight):
    step = make(3, fz.scale_loss(init=16.0, weight=weight, window=1))
    state, _ = step(step.init(params()), step.local_rows(batch()))
    new, m = step(state, step.local_rows(batch(weight=0.0)))
    assert (m.ok.item(), m.empty.item(), m.weight.item(), m.loss.item()) == (False, True, 0.0, 0.0)
    assert tree_hash(new.chain) == tree_hash(state.chain) and tree_hash(new.params) == tree_hash(state.params)
    assert int(new.step) == int(state.step) + 1 and int(new.updates) == int(state.updates)


def halves(*left):
    """A gradient of 2**-26 in fp16, where nothing below 2**-24 exists."""
    g = fz.value_and_grad(
        lambda p, b: ((p["w"] * b["x"].half()).float().sum() * 2.0**-26, torch.tensor(float(len(b["x"])))),
        batch=P("data"),
    )
    step = fz.train_step(*fz.zero(g, *left, fz.sgd(2.0**26), stage=3), mesh={"data": -1}, policy=FP16)
    state, m = step(step.init({"w": torch.zeros(3)}), step.local_rows({"x": torch.ones(4, 3)}))
    return step.params(state)["w"].tolist(), m.ok.item(), m.grad_norm.item()


def with_and_without():
    return halves(), halves(fz.scale_loss(init=2.0**14))


def test_a_scale_keeps_what_fp16_would_lose(run_world):
    lost, kept = zoo.everywhere(run_world, 2, with_and_without)
    assert lost == ([0.0] * 3, True, 0.0)
    assert kept == ([-1.0] * 3, True, pytest.approx(3**0.5 * 2.0**-26))


def test_fp16_compute_trains_and_recovers_from_overflows():
    step = make(3, fz.scale_loss(init=2.0**24, window=100, hysteresis=1), policy=FP16)
    state, log = step.init(params()), []
    for _ in range(40):
        state, m = step(state, step.local_rows(batch()))
        log.append(m)
    applied = [m.ok.item() for m in log]
    assert not applied[0] and all(applied[-20:])  # the first scales overflow fp16
    assert log[-1].loss < 0.7 * log[0].loss and log[-1].scale < 2.0**24


def test_without_a_scale_a_gradient_that_is_not_finite_is_skipped_too():
    step = make(3)
    state = step.init(params())
    new, m = step(state, step.local_rows(batch(bad=0)))
    assert (
        not m.ok
        and m.grad_norm == torch.inf
        and tree_hash(new.params) == tree_hash(state.params)
        and int(new.updates) == 0
    )
