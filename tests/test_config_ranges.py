"""Every number of a config has a range, and what lies outside of it is refused by its key."""

from __future__ import annotations

import pytest
import torch
import torch.distributed
from configs import FREE, in_force, resolve

from funczero import deepspeed as ds
from funczero.deepspeed.config.key import HONOURED, REFUSED
from funczero.deepspeed.config.optimizers import rates_of
from funczero.deepspeed.config.options import SCHEDULERS, optimizer_keys, scheduler_keys
from funczero.deepspeed.config.triad import NAMES
from funczero.optim.from_torch import ELEMENTWISE
from funczero.optim.schedules import TORCH

NEEDS = {  # what a scheduler type cannot do without
    "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3},
    "WarmupDecayLR": {"total_num_steps": 10},
    "WarmupCosineLR": {"total_num_steps": 10},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 2]},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-3, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 10, "cycle_momentum": False},
}
ADAM = {"type": "Adam"}


def everything():
    """(keys of a config, path, key): every number that a config can hold, in every optimizer and scheduler."""
    for path, key in FREE.items():
        if key.kind in ("int", "number") and key.handling != REFUSED and path not in NAMES and not key.choices:
            yield lambda x, path=path: in_force(path, x), path, key
    for name in (*ELEMENTWISE, "SGD", "Lion", "Lamb", "Muon"):
        for k, key in optimizer_keys(name, "", False).items():
            if key.kind in ("int", "number", "rate", "pair") and key.handling == HONOURED:
                yield (
                    lambda x, name=name, k=k: {"optimizer": {"type": name, "params": {k: x}}},
                    f"optimizer.params.{k}",
                    key,
                )
    for name in (*SCHEDULERS, *TORCH):
        for k, key in scheduler_keys(name, "").items():
            if key.kind in ("int", "number", "rate", "counts"):
                yield (
                    lambda x, name=name, k=k: {
                        "optimizer": ADAM,
                        "scheduler": {"type": name, "params": NEEDS.get(name, {}) | {k: x}},
                    },
                    f"scheduler.params.{k}",
                    key,
                )


def test_every_number_has_a_range():
    """Below it, above it, not finite, or with more digits than Python prints: refused by its key; nothing negative but
    where -1 is a word of DeepSpeed's.
    """
    seen = 0
    for keys, path, key in everything():
        wrap = (lambda x: [x, x]) if key.kind == "pair" else (lambda x: [x]) if key.kind == "counts" else lambda x: x
        low = -1.0 if path.startswith("flops_profiler.") else 0.0
        assert key.low >= low and key.high <= 2**63, (path, key)
        for x in (-2, -9e18, 2**64, 10**5000, float("nan"), float("inf"), -float("inf"), True):
            with pytest.raises(ds.ConfigError) as caught:
                resolve(**keys(wrap(x)))
            assert str(caught.value).startswith(f"config: {path}: ") and "; write " in str(caught.value), (
                path,
                x,
                str(caught.value),
            )
            seen += 1
    assert seen > 900


NONSENSE = {
    "lr": (
        {"optimizer": {"type": "Adam", "params": {"lr": 9e18}}},
        "optimizer.params.lr: 9e+18 is out of range; write at most 10000",
    ),
    "lr of SGD": (
        {"optimizer": {"type": "SGD", "params": {"lr": 9e18}}},
        "optimizer.params.lr: 9e+18 is out of range; write at most 10000",
    ),
    "a negative cycle": (
        {"optimizer": ADAM, "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": -1e-3, "cycle_max_lr": 1e-3}}},
        "scheduler.params.cycle_min_lr: -0.001 is out of range; write at least 0",
    ),
    "a negative ramp": (
        {"optimizer": ADAM, "scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_step_rate": -1.0}}},
        "scheduler.params.lr_range_test_step_rate: -1.0 is out of range; write at least 0",
    ),
    "rows": ({"train_batch_size": 2**63}, "train_batch_size: 9223372036854775808 is out of range; write at most 1e+09"),
    "rows of many steps": (
        {"train_batch_size": None, "train_micro_batch_size_per_gpu": 10**6, "gradient_accumulation_steps": 10**6},
        (
            "train_batch_size: 1000000 * 1000000 * 2 = 2000000000000 rows an update are out of range; write a batch of"
            " at most 1e+09"
        ),
    ),
    "a scale of nothing": (
        {"fp16": {"enabled": True, "initial_scale_power": -3}},
        "fp16.initial_scale_power: -3 is out of range; write at least 0",
    ),
    "a scale of everything": (
        {"fp16": {"enabled": True, "initial_scale_power": 1000}},
        "fp16.initial_scale_power: 1000 is out of range; write at most 32",
    ),
    "a floor above": (
        {"fp16": {"enabled": True, "initial_scale_power": 4, "min_loss_scale": 32}},
        "fp16.min_loss_scale: the smallest scale is above the first one, 2^4; write 1, or a larger initial_scale_power",
    ),
    "a function": (
        {"optimizer": ADAM, "scheduler": {"type": "CyclicLR", "params": NEEDS["CyclicLR"] | {"scale_fn": "print"}}},
        'scheduler.params.scale_fn: "print" would change the training: a file describes no function; delete the key',
    ),
    "a list of words": (
        {"optimizer": ADAM, "scheduler": {"type": "MultiStepLR", "params": {"milestones": ["a"]}}},
        'scheduler.params.milestones: ["a"] is not a list of whole numbers; write a list of whole numbers',
    ),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_by_its_key(name):
    keys, said = NONSENSE[name]
    with pytest.raises(ds.ConfigError) as caught:
        resolve(**keys)
    assert str(caught.value) == f"config: {said}"


def test_no_value_in_its_range_makes_a_rate_that_is_not_finite():
    """Whatever numbers a config holds: one sentence, or rates that are finite for every update."""
    for keys, path, key in everything():
        if path.startswith("scheduler.") and key.kind != "counts":
            for x in (0, 1e-300, 0.5, 1, 2, 7, key.high, key.low):
                try:
                    lr, momentum = rates_of(resolve(**keys(x)))
                except ds.ConfigError:
                    continue
                for rate in (lr, momentum):
                    values = (
                        [float(rate(torch.tensor(u))) for u in (0, 1, 2)]
                        if callable(rate) and "total_steps" not in path
                        else []
                    )
                    assert all(abs(v) < 1e13 for v in values), (path, x, values)
