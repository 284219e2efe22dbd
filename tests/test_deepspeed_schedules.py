"""DeepSpeed's questions about schedules, with the answers of DeepSpeed 0.19.8."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from engines import Net, a, config

import funczero.deepspeed as deepspeed
from funczero.deepspeed.runtime import lr_schedules

GOLDEN = json.loads((Path(__file__).parent / "golden/lr_groups.json").read_text())
IDS = lambda case: f"{case['schedule']}-{'-'.join(case['params'])[:60]}"
near = lambda x: pytest.approx(x, rel=1e-12, abs=1e-15)
FIVE = "LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"


def two_groups():
    zeros = lambda: [torch.nn.Parameter(torch.zeros(1))]
    return torch.optim.Adam([{"params": zeros(), "lr": 0.1}, {"params": zeros(), "lr": 0.2}], betas=(0.9, 0.99))


def lrs(optimizer):
    return [g["lr"] for g in optimizer.param_groups]


def make(case, optimizer, **more):
    return getattr(lr_schedules, case["schedule"])(optimizer, **case["params"], **more)


@pytest.mark.parametrize("case", GOLDEN["groups"], ids=IDS)
def test_every_group_has_its_own_rates(case):
    optimizer = two_groups()
    schedule = make(case, optimizer)
    for row in case["rows"]:
        assert lrs(optimizer) == near(row["lr"]) and schedule.get_lr() == near(row["get_lr"])
        assert [g["betas"][0] for g in optimizer.param_groups] == near(row["betas"])
        assert row["last"] is None or schedule.get_last_lr() == near(row["last"])
        if row["mom"] is not None:
            assert schedule.get_mom() == [near(tuple(x)) for x in row["mom"]]
        if row["ratio"] is not None:
            assert schedule.get_lr_ratio() == near(row["ratio"])
        schedule.step()
    for name in ("min_lrs", "max_lrs"):
        assert case[name] is None or getattr(schedule, name) == near(case[name])


@pytest.mark.parametrize("case", GOLDEN["groups"], ids=IDS)
def test_a_position_is_loaded_begun_at_and_jumped_to(case):
    optimizer = two_groups()
    schedule = make(case, optimizer)
    schedule.load_state_dict({"last_batch_iteration": 5})
    assert lrs(optimizer) == near(case["loaded"]["lr"]) and schedule.get_lr() == near(case["loaded"]["get_lr"])
    schedule.step()
    assert lrs(optimizer) == near(case["loaded"]["after"]) and schedule.state_dict() == {"last_batch_iteration": 6}
    optimizer = two_groups()
    schedule = make(case, optimizer, last_batch_iteration=5)
    assert lrs(optimizer) == near(case["begun"]["lr"])
    schedule.step()
    assert lrs(optimizer) == near(case["begun"]["after"])
    optimizer = two_groups()
    make(case, optimizer).step(7)
    assert lrs(optimizer) == near(case["jumped"])


@pytest.mark.parametrize("case", GOLDEN["errors"], ids=IDS)
def test_what_cannot_be_is_refused(case):
    with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[case["error"]]):
        make(case, two_groups())


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("case", GOLDEN["tensors"], ids=IDS)
def test_a_rate_that_is_a_tensor_stays_the_clients(case, shape):
    lr = torch.full(shape, 0.1, dtype=torch.float64)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = make(case, optimizer)
    seen = [lr.item()]
    schedule.step(1)
    assert [*seen, lr.item()] == near(case["trace"]) and optimizer.param_groups[0]["lr"] is lr and lr.shape == shape


def test_all_schedules_are_asked():
    assert {c["schedule"] for c in GOLDEN["tensors"]} == set(lr_schedules.VALID_LR_SCHEDULES) == set(FIVE)
    names = ["LR_RANGE_TEST", "ONE_CYCLE", "WARMUP_LR", "WARMUP_DECAY_LR", "WARMUP_COSINE_LR"]
    assert [getattr(lr_schedules, n) for n in names] == list(FIVE)
    assert (lr_schedules.WARMUP_NUM_STEPS, lr_schedules.CYCLE_MIN_MOM) == ("warmup_num_steps", "cycle_min_mom")


@pytest.mark.parametrize("case", GOLDEN["arguments"], ids=lambda case: "".join(case["words"]) or "none")
def test_the_command_line_makes_deepspeeds_block(case):
    parser = lr_schedules.add_tuning_arguments(argparse.ArgumentParser())
    block, error = lr_schedules.get_config_from_args(parser.parse_args(case["words"]))
    assert error == case["error"] and (block is None) == (case["block"] is None)
    if block is not None:
        theirs = {n: x for n, x in case["block"]["params"].items() if x != -1}  # -1 is refused by their own class
        given = {n: x for n, x in block["params"].items() if n != "cycle_momentum"}  # their flag is never read
        assert given == theirs and list(lr_schedules.get_lr_from_config(block)) == case["lr"]
        total = (
            {"total_num_steps": 9} if "total_num_steps" in deepspeed.config.options.SCHEDULERS[block["type"]] else {}
        )
        getattr(lr_schedules, block["type"])(two_groups(), **block["params"], **total)


def test_the_flag_of_the_momentum_decides():
    for words, cycles in ([], False), (["--cycle_momentum"], True):
        parser = lr_schedules.add_tuning_arguments(argparse.ArgumentParser())
        block, _ = lr_schedules.get_config_from_args(parser.parse_args(["--lr_schedule=OneCycle", *words]))
        optimizer = two_groups()
        schedule = lr_schedules.OneCycle(optimizer, **block["params"])
        schedule.step(3)
        assert (optimizer.param_groups[0]["betas"] != (0.9, 0.99)) == cycles == (schedule.get_mom() is not None)


# --- in an engine -----------------------------------------------------------------------------------------------------
PARAMS = {
    "LRRangeTest": {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 1},
    "OneCycle": {"cycle_min_lr": 1e-3, "cycle_max_lr": 0.1, "cycle_first_step_size": 3, "decay_step_size": 5},
    "WarmupLR": {"warmup_num_steps": 4},
    "WarmupDecayLR": {"warmup_num_steps": 3, "total_num_steps": 6},
    "WarmupCosineLR": {"warmup_num_steps": 3, "total_num_steps": 6},
}


def update(engine):
    engine.backward(F.cross_entropy(engine(a[0]), a[1]))
    engine.step()


@pytest.mark.parametrize("kind", FIVE)
def test_the_configs_schedule_is_deepspeeds_class_and_the_optimizers_rate(kind):
    c = config(0, scheduler={"type": kind, "params": PARAMS[kind]})
    engine, optimizer, _, schedule = deepspeed.initialize(model=Net(), config=c)
    assert isinstance(schedule, getattr(lr_schedules, kind)) and engine.lr_scheduler is schedule
    plain = torch.optim.AdamW([torch.zeros(1)], lr=1e-2)
    twin = getattr(lr_schedules, kind)(plain, **PARAMS[kind])
    for _ in range(5):
        assert schedule.get_lr() == schedule.get_last_lr() == engine.get_lr() == lrs(optimizer) == near(twin.get_lr())
        if kind == "OneCycle":
            assert schedule.get_mom() == [near(x) for x in twin.get_mom()]
        update(engine)
        twin.step()
    assert schedule.state_dict() == twin.state_dict() == {"last_batch_iteration": 4}


def test_a_config_names_one_rate_a_group():
    net = Net()
    groups = [{"params": [*net.first.parameters()]}, {"params": [*net.last.parameters()], "lr": 0.5}]
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": [0.3, 0.4], "warmup_num_steps": 2}}
    c = config(0, scheduler=scheduler)
    engine, optimizer, _, schedule = deepspeed.initialize(model=net, model_parameters=groups, config=c)
    for _ in range(3):
        update(engine)
    assert lrs(optimizer) == [0.3, 0.4] == schedule.max_lrs and schedule.min_lrs == [0, 0]
    why = "scheduler.type: WarmupLR: warmup_max_lr names 2 numbers, but there is one group of parameters"
    with pytest.raises(deepspeed.ConfigError, match=why):
        deepspeed.initialize(model=Net(), config=c)
    own = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
    net = Net()
    groups = [{"params": [*net.first.parameters()], "lr": 0.1}, {"params": [*net.last.parameters()], "lr": 0.2}]
    engine, optimizer, _, schedule = deepspeed.initialize(
        model=net, optimizer=torch.optim.Adam(groups), config=config(0, scheduler=own)
    )
    for _ in range(3):
        update(engine)
    assert lrs(optimizer) == [0.1, 0.2] == schedule.max_lrs


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_clients_tensor_goes_through_the_engine(shape):
    lr, net, twin = torch.full(shape, 0.1, dtype=torch.float64), Net(), Net()
    mine = torch.optim.SGD(net.parameters(), lr=lr)
    make = lambda o: lr_schedules.WarmupLR(o, warmup_num_steps=3, warmup_type="linear")
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=mine, lr_scheduler=make, config=config(0, gradient_clipping=0)
    )
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    schedule = make(plain)
    for _ in range(4):
        assert mine.param_groups[0]["lr"] is lr and lr.item() == near(plain.param_groups[0]["lr"])
        update(engine)
        plain.zero_grad()
        F.cross_entropy(twin(a[0]), a[1]).backward()
        plain.step()
        schedule.step()
    for n, x in engine.module.state_dict().items():
        torch.testing.assert_close(x, twin.state_dict()[n], rtol=1e-6, atol=1e-6)


def test_the_calls_schedule_wins_and_one_of_another_optimizer_is_refused(caplog):
    c = config(0, scheduler={"type": "WarmupLR"})
    make = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)
    engine, optimizer, _, schedule = deepspeed.initialize(model=Net(), lr_scheduler=make, config=c)
    assert isinstance(schedule, torch.optim.lr_scheduler.StepLR)
    assert "scheduler.type: it is not read: the call gives lr_scheduler=" in caplog.text
    update(engine)
    assert lrs(optimizer) == [0.005]
    net = Net()
    with pytest.raises(ValueError, match="lr_scheduler: this StepLR moves another optimizer than the engine's"):
        deepspeed.initialize(model=net, lr_scheduler=make(torch.optim.Adam(net.parameters())), config=config(0))
    mine = torch.optim.Adam(net.parameters())
    assert (
        deepspeed.initialize(model=net, optimizer=mine, lr_scheduler=make(mine), config=config(0))[3].optimizer is mine
    )
