"""A config's chain trains as DeepSpeed means it, and not as its defects do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from cover import EACH
from hypothesis import given, settings
from hypothesis import strategies as st

import funczero as fz
from funczero import deepspeed as ds
from funczero.layout.processes import default_device, world_size
from funczero.testing import simulate, tree_hash

SCALER = json.loads((Path(__file__).parent / "golden/loss_scaler.json").read_text())["cases"]
PAGE = {
    "train_batch_size": 8, "gradient_accumulation_steps": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
    "fp16": {"enabled": True}, "zero_optimization": True,
}  # fmt: skip
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "gradient_clipping": 0}
GRADIENT = torch.tensor([0.3, -0.4])


def linear(params, batch):
    """A mean gradient of GRADIENT, times what the batch says."""
    w = params["w"]
    return (w.float() * GRADIENT * batch["x"][:, None]).sum(), torch.tensor(float(len(batch["x"])))


def run(config, world=None, loss=linear, xs=(1.0,), rows=8, policy=None):
    """(steps of w, metrics) of one update for every x of xs."""
    chain, c = fz.from_deepspeed({"train_batch_size": rows, **config}, loss, world=world or world_size())
    step = fz.train_step(*chain, **(c.arguments | ({"policy": policy} if policy else {})))
    state, log, ws = step.init({"w": torch.zeros(2)}), [], [torch.zeros(2)]
    for x in xs:
        state, m = step(state, step.local_rows({"x": torch.full((rows,), x)}))
        log.append(m)
        ws.append(step.params(state)["w"].clone())
    return [a - b for a, b in zip(ws, ws[1:])], log, state


# --- what DeepSpeed does right ----------------------------------------------------------------------------------------
def test_the_pages_config_trains():
    chain, c = fz.from_deepspeed(PAGE, zoo.loss_plain, world=1)
    assert c.triad == (8, 8, 1) and c.policy == "params=float32,compute=float16,accumulate=float32"
    step = fz.train_step(*chain, **c.arguments)
    assert step.grad.names == (
        "value_and_grad(batch=P('data'))",
        "shard('data',",
        "mean",
        "scale_loss",
        "clip_by_global_norm(1)",
        "adamw",
        ")",
    )
    state, seen = step.init(zoo.params()), []
    for _ in range(12):
        state, m = step(state, step.local_rows(zoo.batch(0)))
        seen.append(m)
    applied = [m for m in seen if m.ok]
    assert len(applied) > 4 and applied[-1].loss < applied[0].loss and applied[0].lr == 0.00015


def test_the_clip_has_deepspeeds_eps():
    (step,), (m,), _ = run({**SGD, "gradient_clipping": 0.25})
    assert m.grad_norm == pytest.approx(0.5, rel=1e-7)
    assert (step / GRADIENT).tolist() == pytest.approx([0.25 / (0.5 + 1e-6)] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("keys", "want"), [({}, 1.0), ({"gradient_clipping": 0}, 1.0), ({"gradient_clipping": 0.1}, 0.1 / (0.5 + 1e-6))]
)
def test_the_default_clip_is_one_and_zero_is_off(keys, want):
    own = {**SGD, **keys}
    if not keys:
        own.pop("gradient_clipping")
    chain, c = fz.from_deepspeed({"train_batch_size": 8, **own}, linear, world=1)
    assert c.value("gradient_clipping") == keys.get("gradient_clipping", 1.0)
    assert ("clip_by_global_norm(1)" in str(fz.train_step(*chain, **c.arguments))) == (not keys)
    assert (run(own)[0][0] / GRADIENT).tolist() == pytest.approx([want] * 2, rel=1e-6)


def summed():
    """By stage: the step with the sum over ranks, unclipped and clipped, and the norm."""
    out = []
    for stage in (0, 1, 2):
        own = {**SGD, "zero_optimization": {"stage": stage}, "gradient_allreduce_op": "Sum"}
        plain, clipped = run(own), run({**own, "gradient_clipping": 0.25})
        out.append((plain[0][0].tolist(), clipped[0][0].tolist(), clipped[1][0].grad_norm.item()))
    return out


def test_the_sum_is_world_times_the_mean_before_the_clip(run_world):
    for plain, clipped, norm in zoo.everywhere(run_world, 2, summed):
        assert plain == pytest.approx((2 * GRADIENT).tolist()) and norm == pytest.approx(1.0)
        assert clipped == pytest.approx((2 * GRADIENT * 0.25 / (1 + 1e-6)).tolist())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_lossy_wire_rounds_and_says_so(stage):
    own = {**SGD, "zero_optimization": {"stage": stage}, "communication_data_type": "bf16"}
    (step,), _, _ = run(own, rows=1)
    assert step.tolist() == (GRADIENT.bfloat16().float()).tolist()
    c = ds.resolve({"train_batch_size": 8, **own}, 1)
    assert c.notes == (
        "communication_data_type rounds gradients to bfloat16 before they are sent: the same-bits promise is off",
    )
    assert not ds.resolve({"train_batch_size": 8, **own, "communication_data_type": "fp32"}, 1).notes


def test_sums_in_a_narrow_dtype_are_asked_for_and_said():
    c = ds.resolve(
        {"train_batch_size": 8, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "torch.bfloat16"}}, 1
    )
    assert (
        c.policy == "params=float32,compute=bfloat16,accumulate=bfloat16"
        and "data_types.grad_accum_dtype sums gradients in bfloat16" in c.notes[0]
    )
    assert ds.resolve({"train_batch_size": 8, "bf16": {"enabled": True}}, 1).policy.endswith("accumulate=float32")


TYPES = {
    "Adam": ({}, "adamw"),
    "adam": ({"adam_w_mode": False}, "adam"),
    "ADAMW": ({"adam_w_mode": False}, "adamw"),
    "Lion": ({}, "lion"),
    "Adagrad": ({}, "adagrad"),
    "SGD": ({"momentum": 0.9, "nesterov": True}, "sgd"),
    "RMSprop": ({"alpha": 0.9}, "rmsprop"),
    "NAdam": ({"betas": [0.8, 0.9]}, "nadam"),
    "Rprop": ({"etas": [0.4, 1.1]}, "rprop"),
    "Lamb": ({"max_coeff": 5.0}, "lamb"),
    "Adafactor": ({"d": 2.0}, "adafactor"),
}


@EACH
@pytest.mark.parametrize("kind", TYPES)
def test_an_optimizer_is_its_type_at_every_stage(kind, whole):
    params, name = TYPES[kind]
    hashes, turn = set(), list(TYPES).index(kind) % 2
    for stage in range(4) if whole else (turn, turn + 2):
        config = {
            "train_batch_size": 24,
            "gradient_accumulation_steps": 8,
            "optimizer": {"type": kind, "params": {"lr": 1e-2, **params}},
            "zero_optimization": {"stage": stage},
        }
        chain, c = fz.from_deepspeed(config, zoo.loss_plain, world=1, units=("blocks",))
        masters, log, state, _ = zoo.train(chain, **c.arguments, updates=2)
        assert name in state.chain and log[-1].ok
        hashes.add(tree_hash(masters))
    assert len(hashes) == 1


def test_onecycle_moves_adams_momentum_and_forces_the_other():
    one = {
        "type": "OneCycle",
        "params": {
            "cycle_min_lr": 1e-3,
            "cycle_max_lr": 1e-2,
            "cycle_first_step_size": 2,
            "cycle_min_mom": 0.7,
            "cycle_max_mom": 0.95,
        },
    }
    config = {
        "train_batch_size": 24,
        "optimizer": {"type": "AdamW", "params": {"eps": 1e-6}},
        "scheduler": one,
        "gradient_clipping": 0,
    }
    chain, c = fz.from_deepspeed(config, zoo.loss_plain, world=1)
    got = zoo.train(chain, **c.arguments, updates=3)[0]
    lr, beta = fz.schedules.one_cycle(1e-3, 1e-2, 2), fz.schedules.one_cycle_momentum(0.7, 0.95, 2)
    want = zoo.train(
        fz.zero(fz.value_and_grad(zoo.loss_plain, batch=fz.P("data")), fz.adamw(lr, beta, 0.99, 1e-6, 0.0), stage=0),
        {"data": 1},
        updates=3,
    )[0]
    assert tree_hash(got) == tree_hash(want)


# --- the loss scale ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "case", [c for c in SCALER if "raise_error_at_min_scale" not in c["params"]], ids=lambda c: c["note"]
)
@pytest.mark.parametrize("stage", [0, 2])
def test_fp16_keys_are_the_golden_machine_through_a_whole_chain(case, stage):
    """Stage 0 too, where DeepSpeed has another machine. raise_error_at_min_scale is no key of the file."""
    p = case["params"]
    fp16 = {
        "enabled": True,
        "initial_scale_power": p["init_scale"].bit_length() - 1,
        "loss_scale_window": p["scale_window"],
        "min_loss_scale": p["min_scale"],
        "hysteresis": p["delayed_shift"],
        "consecutive_hysteresis": p["consecutive_hysteresis"],
    }
    config = {"train_batch_size": 8, **SGD, "fp16": fp16, "zero_optimization": {"stage": stage}}
    chain, c = fz.from_deepspeed(config, linear, world=1)
    step = fz.train_step(*chain, **c.arguments)
    state = step.init({"w": torch.zeros(2)})
    state = state._replace(
        chain={
            **state.chain,
            "scale_loss": state.chain["scale_loss"]._replace(weight=torch.tensor(8.0, dtype=torch.float64)),
        }
    )
    for overflow, want in zip(case["overflow"], case["after"], strict=False):
        state, m = step(state, {"x": torch.full((8,), torch.inf if overflow else 1e-4)})
        assert m.ok.item() == (not overflow)
        own = state.chain["scale_loss"]
        assert (own.scale.item(), own.hysteresis.item()) == (want["scale"], want["hysteresis"])
        if "error" in want:
            with pytest.raises(FloatingPointError, match="overflowed at the smallest loss scale"):
                step(state, {"x": torch.ones(8)})
            return
        assert (own.iteration.item(), own.last_overflow.item()) == (want["cur_iter"], want["last_overflow_iter"])


# --- DeepSpeed's defects, not copied ----------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", range(4))
def test_the_update_on_which_the_scale_doubles_is_whole(stage):
    """There it is halved, because the new scale divides a gradient that the old one multiplied."""
    steps, log, _ = run(
        {
            **SGD,
            "fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1},
            "zero_optimization": {"stage": stage},
        },
        xs=[0.5] * 5,
    )
    assert [m.scale.item() for m in log] == [16, 16, 32, 64, 128]
    assert all(s.tolist() == steps[0].tolist() for s in steps[1:2]) and all(
        s.tolist() == pytest.approx((0.5 * GRADIENT).tolist(), rel=2e-3) for s in steps
    )
    assert [m.grad_norm.item() for m in log] == pytest.approx([0.25] * 5, rel=2e-3)


@pytest.mark.parametrize("scale", [{"initial_scale_power": 4}, {"loss_scale": 128}])
def test_fp16_at_stage_zero_scales_the_loss(scale):
    """There the loss is not scaled and the gradient is divided: a step of 1/16, or 1/128."""
    (step,), (m,), _ = run({**SGD, "fp16": {"enabled": True, **scale}, "zero_optimization": {"stage": 0}})
    assert step.tolist() == pytest.approx((GRADIENT).tolist(), rel=2e-3) and m.scale.item() in (16, 128)


def test_a_static_scale_stands_still_and_overflows_skip():
    steps, log, _ = run(
        {**SGD, "fp16": {"enabled": True, "loss_scale": 128}, "zero_optimization": {"stage": 1}},
        xs=[1.0, torch.inf, 1.0],
    )
    assert (
        [m.scale.item() for m in log] == [128] * 3
        and [m.ok.item() for m in log] == [True, False, True]
        and steps[1].tolist() == [0, 0]
    )


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    """There fp32 at stage 0 applies it."""
    steps, log, _ = run({**SGD, "zero_optimization": {"stage": 0}}, xs=[1.0, torch.nan])
    assert steps[1].tolist() == [0, 0] and not log[1].ok


@pytest.mark.parametrize("group", [1, 2])
def test_qgz_takes_the_mean_of_every_leaf(group):
    """There matrices come out times the ranks of a node, vectors as the mean."""
    keys = {"stage": 3, "zero_quantized_gradients": True, "zero_hpz_partition_size": group}
    for rank in simulate({"ranks": 4})(run, {**SGD, "zero_optimization": keys}, 4):
        torch.testing.assert_close(rank[0][0], GRADIENT, atol=0.4 / 14 * 2, rtol=0)


OFFLOAD = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "nvme"}, "cpu_offload": True}


def test_every_offload_key_is_refused_by_name():
    """Only where there is something to take away: without an accelerator all is in memory already."""
    there = default_device().type != "cpu"
    for key, value in OFFLOAD.items():
        page = {"train_batch_size": 8, "zero_optimization": {"stage": 3, key: value}}
        if there:
            with pytest.raises(ds.ConfigError, match=f"zero_optimization.{key}.*would change the training"):
                ds.resolve(page, 1)
        else:
            notes = ds.resolve(page, 1).notes
            assert any(f"zero_optimization.{key}" in n and "there is no accelerator" in n for n in notes), notes


# --- lr == schedule(updates) ------------------------------------------------------------------------------------------
KINDS = {
    "WarmupLR": {"warmup_num_steps": 4, "warmup_min_lr": 1e-4},
    "WarmupDecayLR": {"warmup_num_steps": 3, "total_num_steps": 7, "warmup_type": "linear"},
    "WarmupCosineLR": {"warmup_num_steps": 3, "total_num_steps": 7},
    "OneCycle": {
        "cycle_min_lr": 1e-3,
        "cycle_max_lr": 1e-2,
        "cycle_first_step_size": 2,
        "decay_step_size": 2,
        "decay_lr_rate": 0.5,
    },
    "LRRangeTest": {"lr_range_test_step_size": 3, "lr_range_test_staircase": True},
    "StepLR": {"step_size": 2},
    "CosineAnnealingLR": {"T_max": 5},
    "CyclicLR": {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 2, "cycle_momentum": False},
    "MultiStepLR": {"milestones": [1, 4]},
}


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    optimizer=st.sampled_from(["Adam", "SGD", "Lion", "RMSprop"]),
    stage=st.integers(0, 3),
    k=st.sampled_from([1, 2, 4]),
    applied=st.lists(st.booleans(), min_size=1, max_size=9),
    resume=st.integers(0, 9),
)
def test_the_rate_is_the_schedule_at_the_applied_updates(kind, optimizer, stage, k, applied, resume):
    """Whatever is accumulated, skipped, and resumed in a step built anew from the state alone."""
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": k,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": optimizer, "params": {"lr": 0.01}},
        "scheduler": {"type": kind, "params": KINDS[kind]},
    }
    make = lambda: (lambda built: (fz.train_step(*built[0], **built[1].arguments), ds.rates_of(built[1]).lr))(
        fz.from_deepspeed(config, linear, world=1)
    )
    step, schedule = make()
    state, updates = step.init({"w": torch.zeros(2)}), 0
    for t, ok in enumerate(applied):
        if t == resume:
            step, schedule = make()
        state, m = step(state, step.local_rows({"x": torch.full((8,), 1.0 if ok else torch.nan)}))
        assert m.lr == schedule(torch.tensor(updates)) and m.ok.item() == ok
        updates += ok
        assert int(state.updates) == updates == int(m.updates)


# --- the Source and the optimizer of the caller -----------------------------------------------------------------------
def mean_loss(params, batch):
    """A mean of weight 1, as an engine's backward sees it."""
    return ((batch["x"].to(params["w"].dtype) @ params["w"]).float() - batch["y"]).square().mean(), torch.ones(())


def faces(world_rows=8, k=2):
    """By stage and precision: one hash of the functional chain, one of the pullback's, which takes a micro-batch a
    call.
    """
    out = []
    g = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(world_rows, 6, generator=g), "y": torch.randn(world_rows, generator=g)} for _ in range(3)]
    for stage in range(4):
        for precision in ({}, {"fp16": {"enabled": True, "initial_scale_power": 8}}, {"bf16": {"enabled": True}}):
            config = {
                "train_batch_size": world_rows,
                "gradient_accumulation_steps": k,
                "zero_optimization": {"stage": stage},
                "optimizer": {"type": "Adam"},
                **precision,
            }
            hashes = []
            for pullback in (False, True):
                chain, c = fz.from_deepspeed(
                    config, *(() if pullback else (mean_loss,)), pullback=pullback, weight=float(k * world_size())
                )
                step = fz.train_step(*chain, **c.arguments)
                state = step.init({"w": torch.linspace(-1, 1, 6)})
                for b in data:
                    rows = step.local_rows(b)
                    if not pullback:
                        state, m = step(state, rows)
                        continue
                    for micro in zoo.split(rows, k):
                        views = step.view(state)
                        loss, weight = mean_loss(views, micro)
                        state, m = step(state, (fz.pull(loss, views), loss, weight))
                        assert m is None
                    state, m = step(state, None)
                hashes.append(tree_hash((step.params(state), m)))
            out.append(hashes)
    return out


@pytest.mark.parametrize("world", [1, 2])
def test_a_pullback_gives_the_bits_of_the_functional_chain(run_world, world):
    assert all(a == b for a, b in zoo.everywhere(run_world, world, faces))


def test_the_scale_of_a_streamed_window_is_seeded_as_deepspeeds():
    chain, c = fz.from_deepspeed(
        {**PAGE, "train_batch_size": 24, "gradient_accumulation_steps": 3}, pullback=True, world=1
    )
    state = fz.train_step(*chain, **c.arguments).init({"w": torch.zeros(2)})
    assert state.chain["scale_loss"].weight == 4 and c.triad.steps == 3  # a power of two near the three mean losses


def test_an_optimizer_of_the_call_comes_first():
    warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.5, "warmup_type": "linear"}}
    names = lambda **kw: (
        fz.train_step(
            *(built := fz.from_deepspeed({"train_batch_size": 8, **kw.pop("keys", {})}, linear, world=1, **kw))[0],
            **built[1].arguments,
        ).grad.names
    )
    assert "sgd" in names(optimizer=fz.sgd(0.1)) and "sgd" in names(
        optimizer=fz.sgd(0.1), keys={"optimizer": {"type": "Adam"}}
    )
    assert "lion" in names(optimizer=lambda lr: fz.lion(lr), keys={"scheduler": warmup})
    assert "lion" in names(optimizer=fz.lion, keys={"optimizer": {"type": "Adam", "params": {"lr": 0.25}}})


def test_what_only_an_engine_reads_is_said_of_a_chain_without_one():
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "Adam"},
        "steps_per_print": 5,
        "checkpoint": {"tag_validation": "FAIL"},
        "dataloader_drop_last": False,
    }
    said = (
        "steps_per_print is an engine's, and this chain has none",
        "checkpoint.tag_validation is an engine's, and this chain has none",
    )
    assert fz.from_deepspeed(config, linear, world=1)[1].notes == said
    assert fz.from_deepspeed(config, pullback=True, world=1)[1].notes == ()


def test_leaves_up_to_the_threshold_stay_whole():
    """There, numel <= threshold."""
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 6},
        "optimizer": {"type": "Adam"},
    }
    chain, c = fz.from_deepspeed(config, linear, world=2)
    specs = fz.train_step(*chain, **c.arguments).specs({"six": torch.zeros(6), "seven": torch.zeros(7)})
    assert fz.tree.map(str, specs["params"], is_leaf=lambda x: isinstance(x, fz.P)) == {
        "six": "P()",
        "seven": "P('data')",
    }
