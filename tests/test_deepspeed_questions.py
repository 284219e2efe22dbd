"""DeepSpeed's questions about the loss scale, configs, initialize, tags and no_sync, with the answers of DeepSpeed
0.19.8.
"""

from __future__ import annotations

import argparse
import base64
import json

import pytest
import torch
import torch.nn.functional as F
from engines import Net, Norm, a, b, close, config, gradient, make, moved
from torch import nn

import funczero.deepspeed as deepspeed
from funczero.checkpoint import CheckpointError


# --- the loss scale ---------------------------------------------------------------------------------------------------
def scales(engine, overflows):
    """The scale after every update; an overflow is an infinite row."""
    out = []
    for bad in overflows:
        x = a[0].half()
        x = torch.full_like(x, torch.inf) if bad else x
        engine.backward(F.cross_entropy(engine(x).float(), a[1]))
        engine.step()
        out.append(engine.optimizer.cur_scale)
    return out


def scaled(**fp16):
    return make(2, fp16={"enabled": True, "initial_scale_power": 8, **fp16})


@pytest.mark.parametrize(
    "fp16, overflows, want",
    [
        ({"loss_scale_window": 2}, [0] * 7, [256, 256, 512, 512, 1024, 1024, 2048]),
        ({"initial_scale_power": 4, "hysteresis": 1}, [1] * 4, [8, 4, 2, 1]),
        ({"loss_scale_window": 2, "hysteresis": 1}, [1, 1, 0, 0, 0, 1], [128, 64, 64, 64, 128, 64]),
        ({"hysteresis": 3}, [1] * 4, [256, 256, 128, 64]),
        ({"hysteresis": 2, "consecutive_hysteresis": True}, [1, 0] * 3, [256] * 6),
        ({"hysteresis": 2}, [1, 0, 1, 0], [256, 256, 128, 128]),
        ({"loss_scale": 32}, [0, 1, 0], [32, 32, 32]),
    ],
    ids=["no overflow", "all", "some", "hysteresis", "consecutive", "used up", "static"],
)
def test_the_scale_moves_as_deepspeeds(fp16, overflows, want):
    engine = scaled(**fp16)
    assert scales(engine, overflows) == want
    assert (engine.skipped_steps, engine.global_steps) == (sum(overflows), len(overflows))


def test_what_an_overflow_used_up_survives_a_checkpoint(tmp_path):
    engine = scaled(hysteresis=2)
    assert scales(engine, [1]) == [256]
    engine.save_checkpoint(tmp_path)
    again = scaled(hysteresis=2)
    again.load_checkpoint(tmp_path)
    assert scales(again, [1]) == [128] and again.skipped_steps == 2


FP16 = {
    "loss_scale": ([0, 1.0, 128.0, 65536.0], [torch.inf, -torch.inf, torch.nan, -1.0, True]),
    "initial_scale_power": ([0, 16, 24, 32], [1.5, torch.inf]),
    "loss_scale_window": ([1, 1000, 2.0], [0, -1, 1.5, True]),
    "min_loss_scale": ([1, 2, 2.0], [0, 0.5, -1, True]),
    "hysteresis": ([1, 2, 5], [1.5]),
}


@pytest.mark.parametrize("key", FP16)
def test_numbers_of_fp16_are_judged_as_there(key):
    good, bad = FP16[key]
    of = lambda x: deepspeed.resolve(config(0, fp16={"enabled": True, key: x}), 1)
    assert [of(x).value(f"fp16.{key}") for x in good] == good
    for x in bad:
        with pytest.raises(deepspeed.DeepSpeedConfigError, match=f"fp16.{key}: "):
            of(x)


# --- configs ----------------------------------------------------------------------------------------------------------
def test_a_version_is_there():
    major, minor, patch = deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__
    assert deepspeed.__version__.startswith(f"{major}.{minor}.{patch}")
    assert (
        hasattr(deepspeed, "__git_hash__") and hasattr(deepspeed, "__git_branch__") and deepspeed.dist is deepspeed.comm
    )


def test_every_way_to_hand_over_a_config(tmp_path):
    c = config(1)
    (tmp_path / "c.json").write_text(json.dumps(c))
    (tmp_path / "c.hjson").write_text("# a comment\n" + json.dumps(c)[:-1] + ",}")
    coded = base64.urlsafe_b64encode(json.dumps(c).encode()).decode()
    ways = [{"config": x} for x in (c, str(tmp_path / "c.json"), str(tmp_path / "c.hjson"), coded)]
    path = str(tmp_path / "c.json")
    ways += [{"config_params": c}, {"args": argparse.Namespace(deepspeed_config=path)}]
    ways += [{"args": argparse.Namespace(deepscale_config=path, local_rank=0)}, {"args": None, "config": c}]
    for way in ways:
        engine, *_ = deepspeed.initialize(model=Net(), **way)
        assert engine.zero_optimization_stage() == 1 and engine.train_batch_size() == 4
    with pytest.raises(deepspeed.ConfigError, match="config= and args.deepspeed_config both name a config"):
        deepspeed.initialize(model=Net(), config=c, args=argparse.Namespace(deepspeed_config=path))
    with pytest.raises(TypeError, match="it needs a model"):
        deepspeed.initialize(model=None, config=c)
    (tmp_path / "twice.json").write_text('{"train_batch_size": 24, "train_batch_size": 24}')
    with pytest.raises(ValueError, match="it stands twice"):
        deepspeed.resolve(str(tmp_path / "twice.json"), 1)


def test_two_names_of_one_key_and_the_least_config():
    for key in ("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"):
        c = deepspeed.resolve({"train_batch_size": 1, "zero_optimization": {"stage": 3, key: True}}, 1)
        assert c.value("zero_optimization.stage3_gather_16bit_weights_on_model_save")
    for key in ("bf16", "bfloat16"):
        assert deepspeed.resolve({"train_batch_size": 1, key: {"enabled": True}}, 1).value("bf16.enabled")
    assert tuple(deepspeed.resolve({"train_batch_size": 64}, 1).triad) == (64, 64, 1)


@pytest.mark.parametrize("words, flag, path", [([], False, None), (["--deepspeed"], True, None)])
def test_the_two_flags_of_a_script(words, flag, path):
    plain = argparse.ArgumentParser()
    plain.add_argument("--num_epochs", type=int)
    with pytest.raises(SystemExit):
        plain.parse_args(["--deepspeed"])
    args = deepspeed.add_config_arguments(plain).parse_args(["--num_epochs", "2", *words])
    assert (args.num_epochs, args.deepspeed, args.deepspeed_config) == (2, flag, path)
    args = plain.parse_args([*words, "--deepspeed_config", "foo.json"])
    assert (args.deepspeed, args.deepspeed_config) == (flag, "foo.json")


# --- initialize -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [0, 3])
def test_without_an_optimizer_forwards_run_and_a_backward_is_refused(stage):
    c = {"train_batch_size": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    with deepspeed.zero.Init(enabled=stage == 3, config_dict_or_path=c):
        net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    engine, optimizer, loader, schedule = deepspeed.initialize(model=net, config=c)
    loss = engine(a[0].bfloat16()).sum()
    assert (optimizer, loader, schedule) == (None, None, None) and loss.dtype == torch.bfloat16
    for call in (lambda: engine.backward(loss), engine.step):
        with pytest.raises(RuntimeError, match="neither the config nor the call of initialize names an optimizer"):
            call()


@pytest.mark.parametrize("kind", ["none", "object", "function"])
@pytest.mark.parametrize("scheduler", ["config", "object", "function"])
def test_optimizers_and_schedulers_of_the_call(kind, scheduler):
    net, step = Net(), torch.optim.lr_scheduler.StepLR
    client = {"none": None, "object": torch.optim.Adam(net.parameters()), "function": torch.optim.AdamW}[kind]
    given = {"config": None, "object": None, "function": lambda o: step(o, 1)}[scheduler]
    if scheduler == "object":
        given = step(client if kind == "object" else torch.optim.Adam(net.parameters()), 1)
    more = {"scheduler": {"type": "WarmupLR", "params": {}}} if scheduler == "config" else {}
    call = lambda: deepspeed.initialize(
        model=net, config=config(0, **more), optimizer=client, lr_scheduler=given, model_parameters=net.parameters()
    )
    if scheduler == "object" and kind != "object":
        with pytest.raises(ValueError, match="lr_scheduler: this StepLR moves another optimizer than the engine's"):
            call()
        return
    _, optimizer, _, schedule = call()
    assert isinstance(
        optimizer.optimizer, {"object": torch.optim.Adam, "function": torch.optim.AdamW}.get(kind, object)
    )
    assert kind != "object" or optimizer.optimizer is client
    assert isinstance(schedule, deepspeed.runtime.lr_schedules.WarmupLR if scheduler == "config" else step)


# zero's stages take any dtype of sums with any of models; without zero they must be one
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("model", ["fp16", "bf16", "fp32"])
def test_dtypes_of_sums(stage, model):
    for sums in (None, "fp16", "bf16", "fp32"):
        c = config(stage, 1, model, data_types={"grad_accum_dtype": sums})
        if stage or sums in (None, model):
            assert deepspeed.resolve(c, 1).triad
    assert deepspeed.initialize(model=Net(), config=config(stage, 1, model, data_types={"grad_accum_dtype": "fp32"}))


# --- tags and buffers -------------------------------------------------------------------------------------------------
def tagged(directory):
    """By mode what a save with tags that differ said or logged."""
    from absl import logging

    logged: list[str] = []
    logging.get_absl_logger().addFilter(lambda r: logged.append(r.getMessage()) or True)
    out = {}
    for mode in ("FAIL", "WARN", "IGNORE"):
        engine, said = make(1, checkpoint={"tag_validation": mode}), []
        logged.clear()
        try:
            engine.save_checkpoint(directory / mode, tag=f"tag-{deepspeed.comm.get_rank()}")
        except ValueError as e:
            said = [str(e)]
        out[mode] = said + [x for x in logged if "the tag is" in x]
    return out


def test_tags_that_differ(run_world, tmp_path):
    first, second = run_world(2, tagged, tmp_path)
    assert first["FAIL"] == second["FAIL"] and "'tag-0' on rank 0 and 'tag-1' on rank 1" in first["FAIL"][0]
    warned = "save_checkpoint: the tag is 'tag-1' on rank 1, but rank 0's counts, which is 'tag-0'"
    assert (first["WARN"], second["WARN"]) == ([], [warned])
    assert first["IGNORE"] == second["IGNORE"] == []
    with pytest.raises(deepspeed.DeepSpeedConfigError, match='checkpoint.tag_validation: "foo" does not exist'):
        deepspeed.resolve({"train_batch_size": 2, "checkpoint": {"tag_validation": "foo"}}, 2)


def test_a_folder_without_latest_changes_nothing(tmp_path):
    engine = make(1)
    assert engine.load_checkpoint(tmp_path) == (None, None)
    with pytest.raises(CheckpointError):
        engine.load_checkpoint(tmp_path, tag="other")


@pytest.mark.parametrize("stage", [1, 3])
def test_buffers_are_compared_before_they_are_written(tmp_path, caplog, stage):
    c = config(stage)
    deepspeed.initialize(model=Norm(), config=c)[0].save_checkpoint(tmp_path)

    def changed(edit):
        net = Norm()
        edit(net)
        return deepspeed.initialize(model=net, config=c)[0]

    def one(net):
        net.layers[0][1].running_mean = torch.zeros(1)

    def lacks(net):
        net.layers[1][1].register_buffer("running_var", None)

    def more(net):
        net.register_buffer("scale", torch.tensor(3.0))

    engine = changed(one)
    with pytest.raises(
        CheckpointError, match=r"buffer 'layers.0.1.running_mean' has shape \(4,\) in the checkpoint, and \(1,\)"
    ):
        engine.load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="holds buffer 'layers.1.1.running_var', which the module lacks; build"):
        changed(lacks).load_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match="lacks buffer 'scale'; build the module as it was, or write load_module_st"
    ):
        changed(more).load_checkpoint(tmp_path)
    engine = changed(more)
    engine.load_checkpoint(tmp_path, load_module_strict=False)
    assert engine.module.scale == 3 and "buffers stay as the module has them: scale" in caplog.text


# --- no_sync ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [0, 1])
def test_backwards_inside_no_sync_are_plain_sums(stage):
    engine = make(stage)
    with engine.no_sync():
        engine.backward(F.cross_entropy(engine(a[0]), a[1]))
        engine.backward(F.cross_entropy(engine(b[0]), b[1]))
        with pytest.raises(RuntimeError, match="inside engine.no_sync"):
            engine.step()
        with pytest.raises(RuntimeError, match="it is open already"), engine.no_sync():
            pass
    engine.backward(F.cross_entropy(engine(a[0]), a[1]))
    engine.step()
    close(moved(engine), gradient((2, a), (1, b)))


@pytest.mark.parametrize("stage", [2, 3])
def test_no_sync_is_refused_where_gradients_are_sharded(stage):
    with (
        pytest.raises(RuntimeError, match=f"engine.no_sync: at stage {stage} gradients are sharded"),
        make(stage).no_sync(),
    ):
        pass
