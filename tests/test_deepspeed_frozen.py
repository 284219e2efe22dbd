"""`exclude_frozen_parameters`: frozen parameters are not in the checkpoint, and stay as they are when it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import Net, config, data

import funczero as fz
import funczero.deepspeed as deepspeed
from funczero.checkpoint import manifest
from funczero.deepspeed import comm
from funczero.deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as fp32

FROZEN = "first.weight", "first.bias", "blocks.0.a.weight", "last.bias"


def built(stage, seed=0):
    net = Net(seed=seed)
    for name in FROZEN:
        net.get_parameter(name).requires_grad_(False)
    return deepspeed.initialize(model=net, config=config(stage))[0]


def trained(engine, updates=2):
    for i in range(updates):
        x, y = data(seed=i)
        engine.backward(torch.nn.functional.cross_entropy(engine(x), y))
        engine.step()
    return engine.module_state_dict()


def one(directory, stage):
    engine = built(stage)
    before = trained(engine)
    engine.save_checkpoint(directory, "a", exclude_frozen_parameters=True)
    after = trained(engine, 1)
    other = built(stage, seed=9)
    own = other.module_state_dict()
    with pytest.raises(fz.CheckpointError, match="has no 'params/first.weight'.*; load_module_strict=False leaves"):
        other.load_checkpoint(directory, "a")
    assert all(torch.equal(x, own[n]) for n, x in other.module_state_dict().items())
    other.load_checkpoint(directory, "a", load_module_strict=False)
    loaded = other.module_state_dict()
    assert all(torch.equal(loaded[n], own[n] if n in FROZEN else x) for n, x in before.items())
    again = built(stage)
    again.load_checkpoint(directory, "a", load_module_strict=False)
    assert again.global_steps == 2
    return [after, trained(again, 1), before]


@pytest.mark.parametrize("world,stage", [(1, 0), (2, 1), (2, 2), (2, 3)])
def test_frozen_parameters_are_left_out_and_stay(run_world, tmp_path, world, stage):
    worlds = run_world(world, one, tmp_path, stage, timeout=240)
    before = worlds[0][2]
    for after, again, _ in worlds:
        assert all(torch.equal(again[n], x) for n, x in after.items())
    names = {n.removeprefix("params/") for n in manifest.load(tmp_path / "a").arrays if n.startswith("params/")}
    assert names == before.keys() - set(FROZEN)
    (tmp_path / "latest").write_text("a")
    for found in (fp32(tmp_path), fp32(tmp_path, exclude_frozen_parameters=True)):
        assert found.keys() == names and all(torch.equal(x, before[n]) for n, x in found.items())


def test_trained_parameters_that_are_frozen_later_are_kept(tmp_path):
    engine = built(0)
    trained(engine)
    engine.module.scale.requires_grad_(False)
    engine.save_checkpoint(tmp_path, "a", exclude_frozen_parameters=True)
    assert "params/scale" in manifest.load(tmp_path / "a").arrays
    engine.save_checkpoint(tmp_path, "b")
    assert fp32(tmp_path, "b").keys() == engine.module_state_dict().keys()
    assert fp32(tmp_path, "b", exclude_frozen_parameters=True).keys() == fp32(tmp_path, "a").keys()


def other_names(directory):
    engine = built(2)
    if comm.get_rank():
        engine.module.last.weight.requires_grad_(False)
        engine.optimizer.param_groups[0]["params"].clear()
    with pytest.raises(ValueError, match="rank 1 leaves out other leaves than rank 0"):
        engine.save_checkpoint(directory, "a", exclude_frozen_parameters=True)


def test_ranks_that_froze_others_are_told(run_world, tmp_path):
    run_world(2, other_names, tmp_path, timeout=240)
    assert not Path(tmp_path, "a").exists()


def test_a_name_that_is_no_parameter_is_refused(tmp_path):
    engine = built(0)
    for name in ("params/nothing", "step"):
        with pytest.raises(ValueError, match=f"without= names '{name}', which is no parameter"):
            fz.Checkpointer(tmp_path, step=engine.train_step).save(engine.state, "a", without=[name])
