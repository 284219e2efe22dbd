"""What stands around an engine: client optimizers and schedulers, groups, the loader, and DeepSpeed's smaller names."""

from __future__ import annotations

import argparse
import os

import pytest
import torch
import torch.nn.functional as F
import zoo
from cover import EACH, places
from engines import ADAM, Net, a, b, config, make
from torch import nn
from torch.utils.data import TensorDataset

import funczero.deepspeed as deepspeed
from funczero.deepspeed import comm
from funczero.deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from funczero.deepspeed.runtime.lr_schedules import OneCycle, WarmupLR
from funczero.deepspeed.utils import (
    RepeatingLoader,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
)

BARE = {"gradient_clipping": 0.1, "optimizer": None}


def bare(stage, k=1, **more):
    return {key: x for key, x in config(stage, k, **{**BARE, **more}).items() if x is not None}


def two_groups(net):
    heavy = [p for p in net.parameters() if p.dim() > 1 and p.requires_grad]
    light = [p for p in net.parameters() if p.dim() <= 1 and p.requires_grad]
    return [{"params": heavy, "lr": 3e-3, "weight_decay": 0.1}, {"params": light, "lr": 1e-2, "weight_decay": 0.0}]


CLIENTS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, betas=(0.8, 0.9)),
    "Adam amsgrad": lambda ps: torch.optim.Adam(ps, amsgrad=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, momentum=0.5, centered=True),
    "NAdam": lambda ps: torch.optim.NAdam(ps),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps),
    "FusedAdam": lambda ps: FusedAdam(ps),
    "DeepSpeedCPUAdam": lambda ps: DeepSpeedCPUAdam(ps, adamw_mode=False),
}


def data(updates, rows):
    g = torch.Generator().manual_seed(11)
    return [
        {"x": torch.randn(rows, 4, generator=g), "y": torch.randint(3, (rows,), generator=g)} for _ in range(updates)
    ]


def against_torch(name, stage, updates=5, k=2):
    """The engine with a client's optimizer and a scheduler, and plain torch on the whole batch: the largest difference
    of a parameter.
    """
    net, plain = Net(), Net()
    mine, theirs = CLIENTS[name](two_groups(net)), CLIENTS[name](two_groups(plain))
    decay = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n))
    engine, face, _, scheduler = deepspeed.initialize(
        model=net, optimizer=mine, lr_scheduler=decay(mine), config=bare(stage, k)
    )
    other = decay(theirs)
    for batch in data(updates, 4 * k * comm.get_world_size()):
        for micro in zoo.split(engine.train_step.local_rows(batch), k):
            engine.backward(F.cross_entropy(engine(micro["x"]), micro["y"]))
            engine.step()
        theirs.zero_grad()
        F.cross_entropy(plain(batch["x"]), batch["y"]).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        theirs.step()
        other.step()
        assert face.param_groups[1]["lr"] == theirs.param_groups[1]["lr"] == scheduler.get_last_lr()[1]
    whole = engine.train_step.params(engine.state)
    return max((whole[n] - p.detach()).abs().max().item() for n, p in plain.named_parameters())


def all_of(tried):
    return {(n, s): against_torch(n, s) for n, s in tried}


@EACH
@pytest.mark.parametrize("world", [1, 2])
def test_client_optimizers_give_torchs_values_at_every_stage(run_world, world, whole):
    names = list(CLIENTS) if world == 1 or not whole else ["AdamW", "SGD", "NAdam"]
    tried = [(n, s) for n in names for at, s in places(n, names, whole) if at == world]
    for case, gap in zoo.everywhere(run_world, world, all_of, tried).items():
        assert gap < 2e-5, (case, gap)


def test_what_cannot_be_a_clients_optimizer():
    net = Net()
    ps = [p for p in net.parameters() if p.requires_grad]
    for made, said in (
        (torch.optim.LBFGS(ps), "LBFGS cannot work here: it runs the forward again"),
        (torch.optim.SparseAdam(ps), "SparseAdam cannot work here: gradients are dense"),
        (torch.optim.Adafactor(ps), "Adafactor keeps '.*' as no tensor like its parameter"),
        (torch.optim.AdamW(Net().parameters()), "its parameter of shape .* is not one of the model's"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            deepspeed.initialize(model=net, optimizer=made, config=bare(0))


class Signed(torch.optim.Optimizer):
    """Nobody knows it."""

    def __init__(self, params, lr=0.1, whole=False):
        super().__init__(params, {"lr": lr, "whole": whole})

    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g["params"]:
                p.sub_(g["lr"] * (p.grad / p.grad.norm() if g["whole"] else p.grad.sign()))


def unknown_classes():
    net = Net()
    ps = [p for p in net.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=net, optimizer=lambda groups: Signed(groups), config=bare(2))
    engine.backward(engine(a[0]).sum())
    engine.step()
    try:
        deepspeed.initialize(model=Net(), optimizer=lambda groups: Signed(groups, whole=True), config=bare(2))
    except TypeError as e:
        return len(ps) > 0, str(e).splitlines()[0]


def test_an_unknown_class_is_tried_on_rows_of_leaves(run_world):
    ok, said = zoo.everywhere(run_world, 2, unknown_classes)
    assert ok and said.startswith(
        "signed: it needs whole leaves (elementwise=False), but they are cut over ['data'] here; write a chain without"
        " shard (stage 0)"
    )


@pytest.mark.parametrize("lr", [float("nan"), -1.0])
@pytest.mark.parametrize("mine", [True, False], ids=["client", "config"])
def test_a_rate_that_somebody_writes_into_a_group_is_read_before_it_counts(lr, mine):
    net = Net()
    ps = [p for p in net.parameters() if p.requires_grad]
    made = (
        {"optimizer": torch.optim.AdamW(ps), "config": bare(0)}
        if mine
        else {"model_parameters": ps, "config": config(0)}
    )
    engine, face, *_ = deepspeed.initialize(model=net, **made)
    face.param_groups[0]["lr"] = lr
    engine.backward(engine(a[0]).sum())
    with pytest.raises(ValueError, match="(AdamW: param_groups.0.|adamw): lr=.* write a finite number of at least 0"):
        engine.step()


def test_groups_of_the_configs_optimizer_are_leaves_and_edits_count():
    net, plain = Net(), Net()
    engine, face, _, _ = deepspeed.initialize(model=net, model_parameters=two_groups(net), config=config(1))
    other = torch.optim.AdamW(two_groups(plain))
    assert (
        isinstance(face, torch.optim.Optimizer)
        and engine.get_lr() == [3e-3, 1e-2]
        and engine.get_mom() == [(0.9, 0.999)] * 2
    )
    for u in range(4):
        if u == 2:
            for groups in (face.param_groups, other.param_groups):
                groups[0]["lr"], groups[0]["weight_decay"] = 0.02, 0.3
                for g in groups:
                    g["betas"] = (0.5, 0.9)
        engine.backward(F.cross_entropy(engine(a[0]), a[1]))
        engine.step()
        other.zero_grad()
        F.cross_entropy(plain(a[0]), a[1]).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        other.step()
    assert engine.state.chain["param_groups"]["lr"].tolist() == [0.02, 0.01]
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
    with pytest.raises(RuntimeError, match="add_param_group: the groups of an engine are fixed"):
        face.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(deepspeed.ConfigError, match="group 0 has 'momentum', which AdamW does not take by group"):
        fresh = Net()
        deepspeed.initialize(
            model=fresh, model_parameters=[{"params": list(fresh.parameters()), "momentum": 0.9}], config=config(0)
        )


def test_parameters_that_are_not_named_stay_where_they_are():
    net = Net()
    before = net.first.weight.detach().clone()
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.last.parameters(), config=config(2))
    engine.backward(F.cross_entropy(engine(a[0]), a[1]))
    engine.step()
    assert torch.equal(net.first.weight, before) and not torch.equal(net.last.weight, Net().last.weight)


def test_deepspeeds_own_schedules_over_the_face():
    engine, face, _, scheduler = deepspeed.initialize(
        model=Net(), lr_scheduler=lambda o: WarmupLR(o, warmup_max_lr=0.5, warmup_num_steps=3), config=config(0)
    )
    seen = []
    for _ in range(5):
        seen.append(face.param_groups[0]["lr"])
        engine.backward(F.cross_entropy(engine(a[0]), a[1]))
        engine.step()
    assert (
        seen[:2] == [0, 0]
        and 0 < seen[2] < 0.5
        and seen[4] == 0.5
        and scheduler.state_dict() == {"last_batch_iteration": 4}
    )
    with pytest.raises(TypeError, match="OneCycle: 'cycle_min_lr' is missing"):
        OneCycle(face)


# --- the loader -------------------------------------------------------------------------------------------------------
def epochs(stage, stop, resume, directory):
    """Items that this rank sees in two epochs, saved and loaded in between at micro-batch `stop`."""
    set_ = TensorDataset(torch.arange(22.0)[:, None].expand(22, 4).clone(), torch.zeros(22, dtype=torch.long))

    def build():
        return deepspeed.initialize(
            model=Net(), config=config(stage, 2, micro=2, dataloader_drop_last=True), training_data=set_
        )

    engine, _, loader, _ = build()
    seen = []
    for _ in range(2):
        assert len(loader) == 2 * (22 // (4 * comm.get_world_size()))
        for x, y in loader:
            seen.append(x[:, 0].tolist())
            engine.backward(F.cross_entropy(engine(x), y))
            engine.step()
            if resume and len(seen) == stop:
                engine.save_checkpoint(directory)
                engine, _, loader, _ = build()
                engine.load_checkpoint(directory)
                break
        else:
            continue
        for x, y in loader:
            seen.append(x[:, 0].tolist())
            engine.backward(F.cross_entropy(engine(x), y))
            engine.step()
    return seen


@pytest.mark.parametrize("world", [1, 2])
def test_the_loader_deals_shuffles_and_resumes_in_mid_window(run_world, world, tmp_path):
    plain = run_world(world, epochs, 2, 0, False, tmp_path)
    again = run_world(world, epochs, 2, 3, True, tmp_path)
    assert plain == again
    half = len(plain[0]) // 2
    for part in (slice(0, half), slice(half, None)):
        items = sorted(i for rank in plain for rows in rank[part] for i in rows)
        assert len(set(items)) == len(items) == 22 // (4 * world) * 4 * world
    assert plain[0][:half] != plain[0][half:]


def test_a_loader_without_end_and_a_dataset_without_length():
    assert [x for x, _ in zip(RepeatingLoader([1, 2]), range(5), strict=False)] == [1, 2, 1, 2, 1]
    with pytest.raises(TypeError, match="training_data: a generator has no length"):
        deepspeed.initialize(model=Net(), config=config(0), training_data=(x for x in ()))


def test_a_loader_of_ones_own():
    engine = make(1, 2)
    items = TensorDataset(torch.arange(16.0)[:, None].expand(16, 4).clone(), torch.zeros(16, dtype=torch.long))
    assert len(engine.deepspeed_io(items)) == 4 and [
        len(x) for x, _ in engine.deepspeed_io(items, batch_size=6, route="eval")
    ] == [6, 6, 4]
    assert (engine.get_data_parallel_rank(), engine.get_tensor_parallel_rank(), engine.destroy()) == (0, 0, None)


# --- smaller names ----------------------------------------------------------------------------------------------------
def whole_values(stage):
    net, plain = Net(), Net()
    engine, *_ = deepspeed.initialize(model=net, config=config(stage, 2, **{**ADAM, "gradient_clipping": 0}))
    mine, theirs = net.blocks[1].a.weight, plain.blocks[1].a.weight
    assert safe_get_full_grad(mine) is None
    for x, y in (a, b):
        engine.backward(F.cross_entropy(engine(x), y))
        (F.cross_entropy(plain(x), y) / 2).backward()
        grad = safe_get_full_grad(mine) if x is b[0] else None
        engine.step()
    torch.testing.assert_close(grad, theirs.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(safe_get_full_optimizer_state(mine, "exp_avg"), 0.1 * theirs.grad, rtol=1e-4, atol=1e-7)
    assert safe_get_full_optimizer_state(mine, "exp_avg_sq").shape == theirs.shape
    safe_set_full_fp32_param(mine, torch.full_like(theirs, 0.5))
    assert bool((safe_get_full_fp32_param(mine) == 0.5).all()) and bool(
        (engine.module.state_dict()["blocks.1.a.weight"] == 0.5).all()
    )
    with pytest.raises(KeyError, match="this optimizer keeps no 'momentum'; it keeps"):
        safe_get_full_optimizer_state(mine, "momentum")
    return True


@pytest.mark.parametrize("stage", range(4))
def test_whole_gradients_moments_and_masters(run_world, stage):
    assert zoo.everywhere(run_world, 2, whole_values, stage)


def test_names_that_are_here_and_names_that_are_not():
    args = deepspeed.add_config_arguments(argparse.ArgumentParser()).parse_args(
        ["--deepspeed", "--deepspeed_config", "x.json"]
    )
    assert args.deepspeed and args.deepspeed_config == "x.json"
    with pytest.raises(deepspeed.ConfigError, match="x.json"):
        deepspeed.initialize(args=args, model=Net())
    here = deepspeed.get_accelerator()
    assert here.is_available() and here.device_count() >= 1 and here.communication_backend_name() in ("gloo", "nccl")
    assert deepspeed.checkpointing.checkpoint(torch.sin, torch.ones(1, requires_grad=True)).requires_grad
    deepspeed.utils.logger.debug("quiet")
    for name, said in (
        ("init_inference", "no inference engine"),
        ("pipe", "no pipeline"),
        ("nothing", "does not exist here"),
    ):
        with pytest.raises(AttributeError, match=f"^deepspeed.{name}: .*{said}"):
            getattr(deepspeed, name)


def test_a_fixed_scale_and_the_engines_small_questions():
    engine = make(0, 2, fp16={"enabled": True, "initial_scale_power": 4})
    assert (engine.optimizer.cur_scale, engine.dynamic_loss_scale(), engine.loss_scale(), engine.fp16_enabled()) == (
        16,
        True,
        0,
        True,
    )
    engine.optimizer.override_loss_scale(8)
    assert engine.optimizer.loss_scale == 8 and engine.get_batch_info() == (8, 4, 2) == (
        engine.train_batch_size(),
        engine.train_micro_batch_size_per_gpu(),
        engine.gradient_accumulation_steps(),
    )
    assert (
        engine.get_global_grad_norm() is None
        and not engine.was_step_applied()
        and engine.config["fp16"]["enabled"] is True
    )
    assert os.environ.get("LOCAL_RANK") == str(engine.local_rank)
