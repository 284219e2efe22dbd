"""ds_config.json as a value: what DeepSpeed reads is read, every key is judged, nothing is silently ignored."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch
import torch.distributed
from configs import FREE, PAGE, in_force, place, resolve
from hypothesis import given
from hypothesis import strategies as st

from funczero import deepspeed as ds
from funczero.deepspeed.config.key import HONOURED, NO_OP, REFUSED
from funczero.deepspeed.config.keys import ALIASES, OFFLOADS
from funczero.deepspeed.config.options import OPTIMIZERS, SCHEDULERS
from funczero.deepspeed.config.triad import NAMES, derive
from funczero.layout.processes import default_device

GOLDEN = Path(__file__).parent / "golden"


# --- the batch triad --------------------------------------------------------------------------------------------------
TRIADS = json.loads((GOLDEN / "batch_triad.json").read_text())["cases"]
STRICTER = {  # DeepSpeed takes these; here they are errors
    '{"train_micro_batch_size_per_gpu": 2.5, "gradient_accumulation_steps": 2}': "two and a half rows",
    '{"train_micro_batch_size_per_gpu": true}': "true is no number",
    '{"train_micro_batch_size_per_gpu": 4, "sequence_parallel_size": 2}': "there is no sequence parallelism",
}


@pytest.mark.parametrize("case", TRIADS, ids=lambda c: f"{json.dumps(c['config'])} over {c['world_size']}")
def test_a_triad_is_deepspeeds(case):
    text = json.dumps(case["config"])
    if "error" in case or text in STRICTER:
        with pytest.raises(ds.ConfigError):
            ds.resolve(case["config"], case["world_size"])
        return
    c = ds.resolve(case["config"], case["world_size"])
    assert {name: c.value(name) for name in NAMES} == case["resolved"] == dict(zip(NAMES, c.triad))


def test_every_stricter_case_is_there():
    assert {json.dumps(c["config"]) for c in TRIADS} >= set(STRICTER)


number = st.none() | st.integers(-2, 40)


@given(number, number, number, st.integers(1, 9))
def test_a_triad_holds_or_says_two_ways_to_hold(batch, micro, steps, n):
    try:
        t = derive(batch, micro, steps, ds.WorldSize(n, "given"))
    except ds.ConfigError as e:
        assert len(e.fixes) == 2 and e.fixes[0] != e.fixes[1]
        for fix in e.fixes:
            derive(*(fix.get(name, x) for name, x in zip(NAMES, (batch, micro, steps))), ds.WorldSize(n, "given"))
        assert f"world size {n}: given" in str(e)
        assert all(f"{name}={'absent' if x is None else x}" in str(e) for name, x in zip(NAMES, (batch, micro, steps)))
        return
    assert t.batch == t.micro * t.steps * n and min(t) > 0
    assert all(x is None or x == y for x, y in zip((batch, micro, steps), t))


@pytest.mark.parametrize(
    ("environment", "size", "origin"),
    [({"WORLD_SIZE": "4"}, 4, "WORLD_SIZE of the environment"), ({}, 1, "the processes there are")],
)
def test_the_world_is_the_environments(monkeypatch, environment, size, origin):
    monkeypatch.setattr(
        torch.distributed, "is_initialized", lambda: False
    )  # other tests of this process may have joined a world
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, x in ({"RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"} | environment).items() if environment else ():
        monkeypatch.setenv(name, x)
    assert ds.resolve({"train_batch_size": 8}).world == (size, origin)


# --- reading ----------------------------------------------------------------------------------------------------------
TEXT = """{
  // the page's config, as people write it
  "train_batch_size": 8,  # "stage": 3
  /* "fp16": {"enabled": false},
     two lines */
  gradient_accumulation_steps: 1
  "optimizer": {"type": "Adam", "params": {"lr": 0.00015,},},
  "fp16": {
    "enabled": true,
  },
  "zero_optimization": true,
}
"""


def test_comments_commas_and_bare_keys_are_read_with_their_lines(tmp_path):
    file = tmp_path / "ds_config.json"
    file.write_text(TEXT)
    c, plain = ds.resolve(file, 2), ds.resolve(PAGE, 2)
    assert {p: v.value for p, v in c.values.items()} == {
        p: v.value for p, v in plain.values.items()
    } and c.name == "ds_config.json"
    lines = {p: v.line for p, v in c.values.items() if v.line}
    assert lines == {
        "train_batch_size": 3,
        "gradient_accumulation_steps": 6,
        "optimizer.type": 7,
        "optimizer.params.lr": 7,
        "fp16.enabled": 9,
        "zero_optimization.stage": 11,
    }


def test_base64_and_dicts_are_read_and_left_alone():
    encoded = base64.urlsafe_b64encode(json.dumps(PAGE).encode()).decode()
    before = json.dumps(PAGE)
    assert ds.resolve(encoded, 2).triad == ds.resolve(PAGE, 2).triad == (8, 4, 1) and json.dumps(PAGE) == before


# --- the table --------------------------------------------------------------------------------------------------------
def defaults():
    shown = lambda d: "required" if d is ... else list(d) if isinstance(d, tuple) else d
    table = lambda keys: {k: shown(v.default) for k, v in sorted(keys.items())}
    return {
        **{
            handling: table({k: v for k, v in ds.KEYS.items() if v.handling == handling})
            for handling in (HONOURED, REFUSED, NO_OP)
        },
        "optimizer.params": {k: table(v) for k, v in OPTIMIZERS.items()},
        "scheduler.params": {k: table(v) for k, v in SCHEDULERS.items()},
        "old spellings": dict(sorted(ALIASES.items())),
    }


def test_all_keys_and_defaults_are_the_golden_ones():
    """Beside those of DeepSpeed there is a block of our own, which it does not read."""
    ours = {"funczero.sums": "tree"}
    found = defaults()
    assert {k: found[HONOURED].pop(k) for k in ours} == ours
    assert found == json.loads((GOLDEN / "ds_config_defaults.json").read_text())["keys"]


def test_every_key_is_judged_and_says_why():
    for path, key in ds.KEYS.items():
        assert key.handling == HONOURED or key.say, path
        assert key.kind in ("int", "number", "flag", "text", "pair", "list", "rate", "any", "off", "every"), path


OTHER = {"int": 3, "number": 0.5, "flag": None, "text": "x", "list": ["x"], "any": "x", "off": {"enabled": True}}


@pytest.mark.parametrize("path", [p for p, k in FREE.items() if k.handling == NO_OP])
def test_a_no_op_leaves_a_note(path):
    key = ds.KEYS[path]
    other = (
        key.choices[-1]
        if key.choices and key.choices[-1] != key.default
        else key.choices[0] if key.choices else (not key.default) if key.kind == "flag" else OTHER[key.kind]
    )
    c = resolve(**place(path, other))
    assert [n for n in c.notes if n.startswith(f"{path} = ") and key.say in n] and c.value(path) == other
    assert not resolve(**place(path, key.default)).notes


def stands(path):
    """Is a key refused here? Offload is a note where there is no accelerator to take anything away from."""
    return path not in OFFLOADS or default_device().type != "cpu"


@pytest.mark.parametrize("path", [p for p, k in FREE.items() if k.handling == REFUSED and stands(p)])
def test_a_refused_key_stands_at_its_neutral_values_only(path):
    key = ds.KEYS[path]
    active = (not key.default) if key.kind == "flag" else "cpu" if key.choices else OTHER[key.kind]
    with pytest.raises(ds.ConfigError) as caught:
        resolve(**in_force(path, active))
    assert str(caught.value).startswith(f"config: {path}: ") and str(caught.value).endswith(key.say)
    for neutral in (key.default, *key.off):
        resolve(**place(path, neutral))


@pytest.mark.parametrize(
    "block",
    [
        {"amp": {"enabled": False, "opt_level": "O1"}},
        {"sparse_gradients": False},
        {"curriculum_learning": {}},
        {"tensor_parallel": {"autotp_size": 1}},
        {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}}},
        {"zero_optimization": {"mics_shard_size": -1}},
        {"zero_optimization": {"zenflow": None}},
        {"torch_autocast": {"enabled": False}},
    ],
)
def test_features_at_their_neutral_value_pass(block):
    c = resolve(**block)
    assert c.notes or next(iter(block)) in ("zero_optimization", "torch_autocast")


@pytest.mark.parametrize(
    "block",
    [
        {"amp": {"enabled": True}},
        {"amp": {"opt_level": "O1"}},
        {"sparse_gradients": True},
        {"amp": {"enabled": 0}},
        {"amp": "auto"},
        {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}},
        {"tensor_parallel": {"autotp_size": 2}},
        {"zero_optimization": {"mics_shard_size": 4}},
    ],
)
def test_features_that_are_on_are_refused(block):
    with pytest.raises(ds.ConfigError, match="is switched on: |would change the training: "):
        resolve(**block)


OLD = {
    "stage, true": ({"zero_optimization": True}, {"zero_optimization.stage": 1}),
    "stage, false": ({"zero_optimization": False}, {"zero_optimization.stage": 0}),
    "bfloat16": ({"bfloat16": {"enabled": True}}, {"bf16.enabled": True}),
    "without its prefix": (
        {"zero_optimization": {"stage": 3, "param_persistence_threshold": 7}},
        {"zero_optimization.stage3_param_persistence_threshold": 7},
    ),
    "fp16 weights": (
        {"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": True}},
        {"zero_optimization.stage3_gather_16bit_weights_on_model_save": True},
    ),
    "16-bit weights": (
        {"zero_optimization": {"gather_16bit_weights_on_model_save": True}},
        {"zero_optimization.stage3_gather_16bit_weights_on_model_save": True},
    ),
    "cpu_offload, off": (
        {"zero_optimization": {"cpu_offload": False}},
        {"zero_optimization.offload_optimizer.device": "none"},
    ),
    "allgather_size": (
        {"zero_optimization": True, "allgather_size": 1000},
        {"zero_optimization.allgather_bucket_size": 1000},
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_old_spellings_work_with_a_note(name):
    keys, want = OLD[name]
    c = resolve(**keys)
    for path, value in want.items():
        assert c.value(path) == value and c.values[path].origin.startswith("alias")
        assert any(f"is an old spelling of {path}" in n for n in c.notes)


def test_whole_numbers_may_be_floats_and_are_ints():
    c = resolve(zero_optimization={"reduce_bucket_size": 5e8, "stage": 2.0})
    assert (c.value("zero_optimization.reduce_bucket_size"), c.value("zero_optimization.stage")) == (500_000_000, 2)
    assert isinstance(c.value("zero_optimization.stage"), int) and isinstance(
        resolve(gradient_clipping=1).value("gradient_clipping"), float
    )


def test_auto_is_filled_from_arguments_in_one_place():
    keys = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "pipeline": {"stages": "auto"},
        "data_types": {"keep_in_fp32_modules": "auto"},
    }
    auto = {
        "train_batch_size": 16,
        "gradient_clipping": 0.5,
        "optimizer.params.lr": 1e-4,
        "bf16.enabled": True,
        "hidden_size": 100,
    }
    c = ds.resolve(keys, 2, auto)
    assert {p: v.value for p, v in c.values.items() if v.origin == "auto"} == {
        "train_batch_size": 16,
        "gradient_clipping": 0.5,
        "optimizer.params.lr": 1e-4,
        "bf16.enabled": True,
        "zero_optimization.reduce_bucket_size": 10_000,
        "zero_optimization.stage3_prefetch_bucket_size": 9_000,
        "zero_optimization.stage3_param_persistence_threshold": 1_000,
    }
    assert (
        ds.resolve(PAGE, 2, {"gradient_clipping": 0.5}).value("gradient_clipping") == 1.0
    )  # only what says auto is filled


def test_values_carry_their_origin():
    c = ds.resolve(PAGE, 4)
    origins = {p: v.origin for p, v in c.values.items()}
    assert [origins[p] for p in (*NAMES, "zero_optimization.stage", "gradient_clipping")] == [
        "dict",
        "derived",
        "dict",
        "alias zero_optimization: true",
        "default",
    ]
    assert c.triad == (8, 2, 1) and c.policy == "params=float32,compute=float16,accumulate=float32"


@pytest.mark.parametrize(
    ("kind", "params", "default"),
    [
        ("Adam", {}, 0.0),
        ("AdamW", {}, 0.0),
        ("adamw", {"torch_adam": True}, 0.01),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, 0.0),
    ],
)
def test_weight_decay_is_zero_unless_it_is_torchs_adamw(kind, params, default):
    assert resolve(optimizer={"type": kind, "params": params}).value("optimizer.params.weight_decay") == default


def test_what_a_scheduler_does_not_read_is_said():
    one = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": [1e-3]}}
    notes = lambda optimizer, scheduler: " ".join(resolve(optimizer=optimizer, scheduler=scheduler).notes)
    assert "optimizer.params.lr = 0.1 is not used: OneCycle" in notes({"type": "Adam", "params": {"lr": 0.1}}, one)
    assert "optimizer.params.betas is not used" in notes({"type": "Adam", "params": {"betas": [0.9, 0.9]}}, one)
    assert "OneCycle cycles no momentum: SGD has no betas" in notes({"type": "SGD"}, one)
    for own in ({}, {"warmup_max_lr": 0.1}):
        assert not notes({"type": "Adam", "params": {"lr": 0.1}}, {"type": "WarmupLR", "params": own})
    assert "lr = 0.1 is not used: WarmupDecayLR" in notes(
        {"type": "Adam", "params": {"lr": 0.1}}, {"type": "WarmupDecayLR", "params": {"total_num_steps": 5}}
    )


def test_where_deepspeed_does_otherwise_is_said():
    said = lambda **keys: " ".join(ds.differences(resolve(**keys)))
    assert "gradient_clipping is absent" in said() and "gradient_clipping" not in said(gradient_clipping=1.0)
    assert "summed in float32 here, in bfloat16 there" in said(bf16={"enabled": True})
    assert "in bfloat16 there" not in said(bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})
    assert "at stage 0, only the gradient is divided" in said(
        fp16={"enabled": True}
    ) and "on which the scale doubles" in said(fp16={"enabled": True})
    assert "doubles" not in said(fp16={"enabled": True, "loss_scale": 128}, zero_optimization={"stage": 1})
    sgd = {"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 1}}
    assert "zero_allow_untested_optimizer" in said(**sgd) and "untested" not in said(
        **sgd, zero_allow_untested_optimizer=True
    )
    assert "it enters the weights" in said() and "it enters the weights" not in said(zero_optimization=True)
