"""Learning rates as functions of applied updates: their formulas, and the traces of DeepSpeed 0.19.8."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from funczero import schedules

GOLDEN = json.loads((Path(__file__).parent / "golden/lr_schedules.json").read_text())["cases"]
WARMUP = {
    "warmup_min_lr": "start",
    "warmup_max_lr": "peak",
    "warmup_num_steps": "warmup",
    "warmup_type": "kind",
    "total_num_steps": "total",
}
CYCLE = {
    "cycle_first_step_size": "first", "cycle_second_step_size": "second", "cycle_first_stair_count": "first_stairs",
    "cycle_second_stair_count": "second_stairs", "decay_step_size": "decay_steps",
}  # fmt: skip
NAMES = {
    "LRRangeTest": (
        schedules.lr_range_test,
        {
            "lr_range_test_" + a: b
            for a, b in {"min_lr": "start", "step_size": "steps", "step_rate": "rate", "staircase": "staircase"}.items()
        },
    ),
    "WarmupLR": (schedules.warmup_lr, WARMUP),
    "WarmupDecayLR": (schedules.warmup_decay_lr, WARMUP),
    "WarmupCosineLR": (
        schedules.warmup_cosine_lr,
        {**WARMUP, "warmup_min_ratio": "start_ratio", "cos_min_ratio": "end_ratio"},
    ),
    "OneCycle": (
        schedules.one_cycle,
        {**CYCLE, "cycle_min_lr": "low", "cycle_max_lr": "high", "decay_lr_rate": "decay_rate"},
    ),
    "OneCycle momentum": (
        schedules.one_cycle_momentum,
        {**CYCLE, "cycle_min_mom": "low", "cycle_max_mom": "high", "decay_mom_rate": "decay_rate"},
    ),
}
UNKNOWN_KIND = {"warmup_max_lr": 0.001, "warmup_num_steps": 6, "warmup_type": "exp"}  # there: a warning, and log


def at(f, *updates):
    return [f(torch.tensor(u)).item() for u in updates]


def made(name, params, group, n, i, base=0.1):
    """The schedule of one group: lists have an entry a group, a missing peak is the group's own rate."""
    fn, names = NAMES[name]
    one = {k: v for k, v in params.items() if k in names}
    for k, v in one.items():
        if isinstance(v, list) and len(v) == n:
            one[k] = v[i]
    own = {names[k]: v for k, v in one.items()}
    if name == "WarmupDecayLR":
        own.setdefault("peak", 0.001)
    if name in ("WarmupLR", "WarmupCosineLR"):
        own.setdefault("peak", group.get("lr", base))
    return fn(**own)


TRACES = [c for c in GOLDEN if "trace" in c]


@pytest.mark.parametrize("case", TRACES, ids=lambda c: f"{c['schedule']}-{TRACES.index(c)}")
def test_a_schedule_is_deepspeeds_trace(case):
    name, params, groups = case["schedule"], case["params"], case["groups"]
    if params == UNKNOWN_KIND:
        with pytest.raises(ValueError, match="kind='exp' is neither 'log' nor 'linear'"):
            made(name, params, groups[0], 1, 0)
        params = {**params, "warmup_type": "log"}
    for i, group in enumerate(groups):
        f = made(name, params, group, len(groups), i)
        g = (
            made("OneCycle momentum", params, group, len(groups), i)
            if "betas" in case["trace"][0] and params.get("cycle_momentum", True)
            else None
        )
        for row in case["trace"]:
            assert at(f, row["calls"]) == pytest.approx([row["lr"][i]], rel=1e-12, abs=1e-18)
            if g:
                assert (*at(g, row["calls"]), 0.99) == pytest.approx(tuple(row["betas"][i]), rel=1e-12)


@pytest.mark.parametrize("case", [c for c in GOLDEN if "error" in c], ids=lambda c: f"{c['schedule']}-{c['params']}")
def test_what_deepspeed_refuses_is_refused(case):
    with pytest.raises((ValueError, TypeError)):
        made(case["schedule"], case["params"], {}, 1, 0)


@pytest.mark.parametrize("case", [c for c in GOLDEN if "resume_at" in c], ids=lambda c: c["schedule"])
def test_a_resumed_schedule_goes_on(case):
    """Right after loading DeepSpeed shows the constructor's rate until its next step; here it is schedule(updates) at
    once.
    """
    f = made(case["schedule"], case["params"], {}, 1, 0)
    n = case["resume_at"]
    assert at(f, *range(n + 1, n + 5)) == pytest.approx([lr for (lr,) in case["lr_after_next_steps"]], rel=1e-12)
    assert at(f, n)[0] != case["lr_right_after_load_state_dict"][0]


def test_every_golden_case_is_replayed():
    kinds = [k for c in GOLDEN for k in ("trace", "error", "resume_at") if k in c]
    assert len(kinds) == len(GOLDEN) and len(set(kinds)) == 3


def test_a_constant_is_constant():
    assert at(schedules.constant(0.3), 0, 1, 10**9) == [0.3] * 3


@pytest.mark.parametrize(
    ("peak", "warmup", "total", "end"), [(1.0, 10, 110, 0.0), (3e-4, 0, 7, 1e-5), (1.0, 5, 5, 0.5), (2.0, 0, 0, 1.0)]
)
def test_warmup_cosine_is_its_formula(peak, warmup, total, end):
    def formula(u):
        if u < warmup:
            return peak * u / warmup
        done = min((u - warmup) / max(total - warmup, 1), 1.0)
        return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2

    points = range(0, total + 20)
    assert at(schedules.warmup_cosine(peak, warmup, total, end), *points) == pytest.approx(
        [formula(u) for u in points], rel=1e-12, abs=1e-15
    )


def test_the_last_update_has_the_last_value():
    f = schedules.warmup_cosine(1.0, 2, 12, end=0.25)
    assert at(f, 2, 12, 13, 10**6) == [1.0, 0.25, 0.25, 0.25]


ALL = {
    "constant": schedules.constant(1),
    "warmup_cosine": schedules.warmup_cosine(1, 1, 2),
    "warmup_lr": schedules.warmup_lr(1, 3),
    "warmup_decay_lr": schedules.warmup_decay_lr(1, 7, 3),
    "warmup_cosine_lr": schedules.warmup_cosine_lr(1, 7, 3),
    "one_cycle": schedules.one_cycle(1, 2, 3),
    "one_cycle, stairs on one side": schedules.one_cycle(1, 2, 4, 5, 0, 2),
    "one_cycle_momentum": schedules.one_cycle_momentum(0.8, 0.9, 3),
    "one_cycle_momentum, tail": schedules.one_cycle_momentum(0.8, 0.9, 3, decay_steps=2, decay_rate=0.1),
    "lr_range_test": schedules.lr_range_test(1, 3, staircase=True),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_values_are_finite_float64_without_dims_whatever_counts(name, dtype):
    for u in (0, 1, 2, 3, 8, 10**6):
        y = ALL[name](torch.tensor(u, dtype=dtype))
        assert y.dtype == torch.float64 and y.dim() == 0 and y.isfinite()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: schedules.warmup_lr(1.0, 0),
            "warmup_lr: warmup=0 is not a positive whole number of updates; write an int of at least 1",
        ),
        (lambda: schedules.warmup_decay_lr(1.0, 6.0), "warmup_decay_lr: total=6.0 is not a positive whole number"),
        (lambda: schedules.lr_range_test(steps=True), "lr_range_test: steps=True is not a positive whole number"),
        (
            lambda: schedules.one_cycle([1.0, 2.0], 3.0),
            r"one_cycle: low=\[1.0, 2.0\] is not a number; make one schedule for every group",
        ),
        (lambda: schedules.constant("0.1"), "constant: value='0.1' is a string and no number; write a finite number"),
        (lambda: schedules.constant(float("nan")), "constant: value=nan is not finite; write a finite number"),
        (
            lambda: schedules.warmup_cosine(torch.tensor(1.0), 1, 2),
            r"warmup_cosine: peak=tensor\(1.\) is a tensor and no number",
        ),
        (lambda: schedules.warmup_cosine(1.0, 1, float("inf")), "warmup_cosine: total=inf is not finite"),
        (lambda: schedules.warmup_lr(float("inf"), 3), "warmup_lr: peak=inf is not finite"),
        (lambda: schedules.warmup_lr(True, 3), "warmup_lr: peak=True is a bool and no number"),
        (
            lambda: schedules.one_cycle(1.0, 2.0, 3, first_stairs=-1),
            "one_cycle: first_stairs=-1 is below 0; write an int of at least 0",
        ),
        (
            lambda: schedules.one_cycle(1.0, 2.0, 3, decay_steps=-1),
            "one_cycle: decay_steps=-1 is below 0; write a finite number of at least 0",
        ),
        (
            lambda: schedules.lr_range_test(staircase="yes"),
            "lr_range_test: staircase='yes' is a string and neither True nor False",
        ),
        (lambda: schedules.from_torch("StepLR", "1", step_size=2), "from_torch: lr='1' is a string and no number"),
        (lambda: schedules.from_torch("StepLR", -1, step_size=2), "from_torch: lr=-1 is below 0"),
        (
            lambda: schedules.one_cycle(1.0, 2.0, 3, -1),
            "one_cycle: first=3 must be positive and second=-1 not negative",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()
