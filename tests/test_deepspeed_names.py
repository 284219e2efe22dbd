"""What programs for DeepSpeed import, ask and set beside the three calls does what it says, or refuses when used."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from engines import Net, config
from torch import nn

import funczero as fz
import funczero.deepspeed as deepspeed
from funczero.deepspeed import comm, moe, runtime, utils
from funczero.launch import flags, job
from funczero.world.ledger import DivergenceError

NAMES = """
accelerator.get_accelerator checkpoint.utils.clone_tensors_for_torch_save checkpointing.checkpoint comm.init_distributed
moe.utils.is_moe_param ops.adagrad.DeepSpeedCPUAdagrad ops.adam.DeepSpeedCPUAdam ops.adam.FusedAdam
ops.lion.DeepSpeedCPULion runtime.activation_checkpointing.checkpointing.checkpoint
runtime.base_optimizer.DeepSpeedOptimizer runtime.base_optimizer.ZeROOptimizer runtime.engine.DeepSpeedEngine
runtime.lr_schedules.VALID_LR_SCHEDULES runtime.lr_schedules.get_config_from_args runtime.utils.clip_grad_norm_
runtime.utils.memory_status runtime.utils.see_memory_usage runtime.zero.GatheredParameters runtime.zero.Init
runtime.zero.partition_parameters.ZeroParamStatus runtime.zero.partition_parameters._orig_torch_arange
runtime.zero.partition_parameters.get_accelerator
runtime.zero.partition_parameters.zero_wrapper_for_fp_tensor_constructor utils.groups._get_data_parallel_world_size
utils.log_dist utils.logger utils.logging.logger utils.numa.get_numactl_cmd utils.set_z3_leaf_modules
utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint zero.GatheredParameters zero.Init
zero.register_external_parameter
""".split()  # noqa: SIM905
SHIM = str(Path(job.SHIM))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there_as_a_module_and_as_an_attribute(name):
    path, _, last = name.rpartition(".")
    found, value = importlib.import_module(f"funczero.deepspeed.{path}"), deepspeed
    for part in name.split("."):
        value = getattr(value, part)
    assert getattr(found, last) is value


def test_under_deepspeeds_own_name_everything_is_the_very_same():
    script = f"""
import importlib, importlib.metadata
for name in {NAMES!r}:
    path, _, last = name.rpartition(".")
    ours, theirs = (importlib.import_module(f"{{root}}.{{path}}") for root in ("funczero.deepspeed", "deepspeed"))
    assert ours is theirs and hasattr(theirs, last) and ours.__spec__.name == f"funczero.deepspeed.{{path}}", name
import deepspeed
assert importlib.metadata.version("deepspeed") == deepspeed.__version__ == "0.19.8+funczero"
try:
    import deepspeed.inference
except ModuleNotFoundError as error:
    print(error)
"""
    env = {**os.environ, "PYTHONPATH": job.with_shim(os.pathsep.join(sys.path))}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "No module named 'deepspeed.inference'\n"), done


def test_the_launcher_puts_the_name_before_any_other():
    o = flags.parse(["--as_deepspeed", "--num_gpus=2", "train.py", "--deepspeed"])
    plan = job.make_plan(o, {"PYTHONPATH": f"/a{os.pathsep}/b"}, "/w")
    assert o.as_deepspeed and o.args == ("--deepspeed",)
    assert plan.env["PYTHONPATH"] == os.pathsep.join([SHIM, "/a", "/b"])
    assert job.job(plan, plan.nodes[0])["as_deepspeed"] and (Path(SHIM) / "deepspeed" / "__init__.py").is_file()
    assert "PYTHONPATH" not in job.make_plan(o._replace(as_deepspeed=False), {}, "/w").env


def test_what_is_absent_refuses_when_it_is_used():
    for used, words in (
        (lambda: deepspeed.ops.lion.FusedLion([]), "deepspeed.ops.lion.FusedLion: it does not exist here; write"),
        (
            lambda: utils.numa.get_numactl_cmd("0", 1, 0),
            "get_numactl_cmd: it does not exist here; write numactl before",
        ),
        (lambda: moe.MoE(4), "deepspeed.moe.MoE: it does not exist here; write the experts as submodules"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            used()
    with pytest.raises(
        AttributeError, match="utils.groups._get_expert_parallel_group: there is data parallelism alone"
    ):
        utils.groups._get_expert_parallel_group()


def test_questions_about_experts_and_groups():
    net = Net()
    assert moe.utils.has_moe_layers(net) == (False, 0) and not moe.utils.is_moe_param(net.scale)
    groups = {"params": list(net.parameters())}
    assert moe.utils.split_params_into_different_moe_groups_for_optimizer(groups) == [groups]
    assert utils.groups._get_data_parallel_world_size() == comm.get_world_size() == 1
    assert utils.groups._get_data_parallel_rank() == comm.get_rank() == 0
    assert utils.set_z3_leaf_modules(net, ["Linear"]) == [m for m in net.modules() if type(m) is nn.Linear]
    with pytest.raises(ValueError, match="set_z3_leaf_modules: the model has no module of .'Conv2d'.; name a class"):
        utils.set_z3_leaf_modules(net, [nn.Conv2d])


def test_cloned_tensors_are_alone_and_tied_ones_stay_tied():
    buffer = torch.arange(6.0)
    z = torch.tensor([1 + 2j])
    assert torch.equal(deepspeed.checkpoint.utils.clone_tensors_for_torch_save([z, z.conj()])[1], z.conj())
    made = deepspeed.checkpoint.utils.clone_tensors_for_torch_save({"a": buffer[:3], "b": [buffer[:3], buffer[3:]]})
    assert made["a"] is made["b"][0] and made["a"].untyped_storage().nbytes() == 12
    assert torch.equal(made["b"][1], buffer[3:]) and made["a"].data_ptr() != buffer.data_ptr()


def test_a_schedule_from_the_command_line():
    lr = runtime.lr_schedules
    parser = lr.add_tuning_arguments(argparse.ArgumentParser())
    words = ["--lr_schedule=WarmupLR", "--warmup_num_steps=7", "--warmup_type=linear", "--cycle_min_lr=0.1"]
    block, error = lr.get_config_from_args(parser.parse_args(words))
    own = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.001, "warmup_num_steps": 7, "warmup_type": "linear"}
    assert error is None and block == {"type": "WarmupLR", "params": own}
    assert deepspeed.resolve(config(0, scheduler=block), 1).value("scheduler.params.warmup_num_steps") == 7
    assert lr.get_config_from_args(parser.parse_args([])) == (None, "--lr_schedule not specified on command line")
    odd = argparse.Namespace(lr_schedule="Linear")
    assert lr.get_config_from_args(odd) == (None, "Linear is not supported LR schedule")
    assert lr.VALID_LR_SCHEDULES == ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]


def test_memory_is_said_where_it_is_asked_for(capsys):
    runtime.utils.see_memory_usage("quiet")
    runtime.utils.see_memory_usage("loud", force=True)
    runtime.utils.memory_status("there")
    utils.log_dist("of rank 0", ranks=[0])
    utils.log_dist("of rank 1", ranks=[1])
    said = [line.split("] [INFO] ")[1] for line in capsys.readouterr().err.splitlines()]
    assert len(said) == 3 and said[0].startswith("loud | on the device ") and said[1].startswith("[rank 0] there | ")
    assert said[2] == "[rank 0] of rank 0"


# --- the engine's small questions -------------------------------------------------------------------------------------
def test_its_config_is_the_file_with_every_default():
    engine, *_ = deepspeed.initialize(model=Net(), config=config(2, 2))
    assert engine.config["zero_optimization"]["stage"] == 2 and engine.config["optimizer"]["params"]["lr"] == 1e-2
    assert engine.config["gradient_clipping"] == 1.0 and engine.config["train_batch_size"] == 8
    assert json.loads(json.dumps(engine.config)) and engine.wall_clock_breakdown() is False


@pytest.mark.parametrize("stage", range(4))
def test_an_engine_without_an_optimizer_evaluates(stage):
    net, plain = Net(), Net()
    engine, *rest = deepspeed.initialize(model=net, config={k: v for k, v in config(stage).items() if k != "optimizer"})
    x = torch.randn(4, 4)
    assert rest == [None, None, None] and torch.equal(engine(x), plain(x))
    for call, run in (("backward", lambda: engine.backward(engine(x).sum())), ("step", engine.step)):
        with pytest.raises(RuntimeError, match=f"^engine.{call}: neither the config nor the call of initialize names"):
            run()
    frozen = Net().requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=frozen, config={"train_batch_size": 4})
    assert torch.equal(engine(x), plain(x))
    with pytest.raises(deepspeed.ConfigError, match="there is a scheduler, but neither the config nor the call names"):
        deepspeed.initialize(model=Net(), config={"train_batch_size": 4}, lr_scheduler=lambda o: None)


def test_the_optimizer_of_the_call_counts_and_the_configs_is_named(caplog):
    net = Net()
    trained = [p for p in net.parameters() if p.requires_grad]
    engine, optimizer, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(trained, 0.5), config=config(0))
    assert optimizer.param_groups[0]["lr"] == 0.5 and isinstance(optimizer.optimizer, torch.optim.SGD)
    assert "config: optimizer.type: it is not read: the call gives an optimizer, a SGD" in caplog.text


def trained(engine, updates, k):
    for _ in range(updates * k):
        loss = engine(torch.ones(4, 4)).square().mean()
        engine.backward(loss)
        engine.step()
    return engine.global_steps


def test_another_batch_size_is_more_micro_batches():
    engine, *_ = deepspeed.initialize(model=Net(), config=config(1, 2))
    assert trained(engine, 1, 2) == 1
    engine.set_train_batch_size(12)
    assert engine.get_batch_info() == (12, 4, 3) and engine.config["train_batch_size"] == 12
    assert trained(engine, 1, 3) == 2
    engine.set_train_micro_batch_size(2)
    assert engine.get_batch_info() == (6, 2, 3)
    with pytest.raises(ValueError, match="8.0 rows do not divide"):
        engine.set_train_batch_size(8.0)
    assert engine.get_batch_info() == (6, 2, 3)
    with pytest.raises(
        ValueError, match="7 rows do not divide by 2 rows a micro-batch on 1 ranks; write a multiple of 2"
    ):
        engine.set_train_batch_size(7)
    engine.backward(engine(torch.ones(2, 4)).sum())
    with pytest.raises(RuntimeError, match="the window of micro-batches is open; call it right after an update"):
        engine.set_train_batch_size(12)


def test_a_window_of_another_length_is_divided_by_it():
    """Three micro-batches after a change give the update of an engine that was built for three."""
    one, *_ = deepspeed.initialize(model=Net(), config=config(2, 1))
    other, *_ = deepspeed.initialize(model=Net(), config=config(2, 3))
    one.set_train_batch_size(12)
    assert trained(one, 2, 3) == trained(other, 2, 3) == 2
    for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


class Rows(torch.utils.data.Dataset):
    """Rows that know their number."""

    def __len__(self):
        return 400

    def __getitem__(self, i):
        return torch.full((4,), float(i)), i


def over_rows(k):
    return deepspeed.initialize(model=nn.Linear(4, 1), config=config(1, k), training_data=Rows())


def test_rows_go_on_where_they_were_after_another_batch_size(tmp_path):
    engine, _, loader, _ = over_rows(2)
    rows = iter(loader)

    def take(n):
        for _ in range(n):
            engine.backward(engine(next(rows)[0]).mean())
            engine.step()

    take(6)
    engine.set_train_batch_size(16)
    take(12)
    engine.save_checkpoint(tmp_path)
    following = next(rows)[1].tolist()
    for k in (2, 4):
        other, _, theirs, _ = over_rows(k)
        other.load_checkpoint(tmp_path)
        assert other.micro_steps == 18 and next(iter(theirs))[1].tolist() == following


def test_an_engine_that_evaluates_reads_a_checkpoint_of_one_that_trains(tmp_path):
    engine, *_ = deepspeed.initialize(model=Net(), config=config(2))
    trained(engine, 2, 1)
    engine.save_checkpoint(tmp_path)
    other, *_ = deepspeed.initialize(model=Net(seed=1), config={k: v for k, v in config(0).items() if k != "optimizer"})
    path, _ = other.load_checkpoint(tmp_path)
    assert path == str(tmp_path / "global_step2")
    assert fz.testing.tree_hash(other.module_state_dict()) == fz.testing.tree_hash(engine.module_state_dict())


def open_apart(stage):
    """What ranks hear that open two parameters of one shape."""
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    zero = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    engine, *_ = deepspeed.initialize(model=net, config={**config(stage), **zero})
    try:
        with deepspeed.zero.GatheredParameters([net[comm.get_rank()].weight], modifier_rank=0):
            pass
        engine.backward(engine(torch.ones(4, 6)).sum())
        engine.step()
    except DivergenceError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_that_open_different_parameters_are_told_their_names(run_world, stage):
    one, other = run_world(2, open_apart, stage)
    assert one == other and "in GatheredParameters('1.weight') at step 0" in one and "'0.weight'" in one, one


def test_groups_show_every_key_and_what_stands_still_cannot_be_changed_unseen():
    engine, optimizer, *_ = deepspeed.initialize(model=Net(), config=config(0))
    (group,) = optimizer.param_groups
    assert group["eps"] == 1e-8 and group["bias_correction"] is True and group["betas"] == (0.9, 0.999)
    assert optimizer.get_loss_scale() == 1.0 and optimizer.optimizer is optimizer
    assert isinstance(optimizer, runtime.base_optimizer.ZeROOptimizer)
    group["eps"] = 1e-3
    with pytest.raises(
        ValueError, match="param_groups: 'eps' was changed from 1e-08, but it is the same for all groups"
    ):
        trained(engine, 1, 1)


def test_rows_a_second_are_of_updates():
    engine, *_ = deepspeed.initialize(model=Net(), config=config(0))
    assert engine.tput_timer.avg_samples_per_sec() == float("-inf")
    trained(engine, 3, 1)
    engine.tput_timer.update_epoch_count()
    timer = engine.tput_timer
    assert (timer.global_step_count, timer.epoch_count) == (3, 1)
    assert timer.avg_samples_per_sec() == pytest.approx(8 / timer.total_elapsed_time)


def test_an_output_that_is_no_file_and_a_line_an_update(capsys):
    with redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=Net(), config=config(3, steps_per_print=2))
        assert trained(engine, 4, 1) == 4
    assert [line.split("] [INFO] ")[1][:6] for line in capsys.readouterr().err.splitlines()] == ["step 2", "step 4"]


@pytest.mark.parametrize("stage", [1, 3])
def test_float32_weights_out_of_a_checkpoint(tmp_path, stage):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    engine, *_ = deepspeed.initialize(model=net, config=config(stage, precision="bf16"))
    engine.save_checkpoint(tmp_path / "run")
    of = utils.zero_to_fp32
    found = of.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "run")
    masters = engine.train_step.params(engine.state)
    assert all(found[n].dtype == torch.float32 and torch.equal(found[n], x) for n, x in masters.items())
    assert set(found) == {*masters, "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    with pytest.raises(RuntimeError, match='Unexpected key.*"1.weight"'):
        of.load_state_dict_from_zero_checkpoint(nn.Sequential(nn.Linear(4, 4)), tmp_path / "run")
    other = of.load_state_dict_from_zero_checkpoint(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), tmp_path / "run")
    assert all(torch.equal(other.get_parameter(n), x) for n, x in masters.items())
    of.convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "run", tmp_path / "out", tag="global_step0")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(fz.CheckpointError, match="there is no checkpoint '.*nothing'; name its folder and its tag"):
        of.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "run", "nothing")


# --- configs of the wild ----------------------------------------------------------------------------------------------
def test_what_deepspeed_does_not_read_is_passed_over_with_a_note():
    c = deepspeed.resolve(config(0, _comment="mine", cuda_visible_devices="0", checkpointing={"a": 1}), 1)
    for name in ("_comment", "cuda_visible_devices", "checkpointing"):
        assert f"{name} is passed over, as DeepSpeed does" in c.notes
    with pytest.raises(deepspeed.ConfigError, match="there is no such key; write 'gradient_clipping'"):
        deepspeed.resolve(config(0, gradient_cliping=1.0), 1)


def test_fp16s_other_keys_are_read_where_it_is_on():
    off = deepspeed.resolve(
        config(0, fp16={"enabled": False, "loss_scale_window": -1, "initial_scale_power": "auto"}), 1
    )
    assert "fp16 is off, so fp16.loss_scale_window, fp16.initial_scale_power are not read" in off.notes
    assert off.value("fp16.loss_scale_window") == 1000
    with pytest.raises(deepspeed.ConfigError, match="fp16.loss_scale_window: -1 is out of range"):
        deepspeed.resolve(config(0, fp16={"enabled": True, "loss_scale_window": -1}), 1)


def test_never_to_print_is_infinite():
    assert deepspeed.resolve(config(0, steps_per_print=float("inf")), 1).value("steps_per_print") is None
    assert deepspeed.resolve(config(0, steps_per_print=3), 1).value("steps_per_print") == 3
