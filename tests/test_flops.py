"""The flops profiler of an engine: closed forms, and an update that is counted has the bits of one that is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import funczero.deepspeed as deepspeed
from funczero.deepspeed.engine.flops import Flops
from funczero.testing import tree_hash

ROWS, MICROS, WIDE, OUT = 4, 2, 8, 3
FORWARD = 2 * ROWS * (2 * WIDE * WIDE + WIDE * OUT)  # three products of matrices
BACKWARD = 2 * FORWARD - 2 * ROWS * WIDE * WIDE  # the first one's input wants no gradient


class Net(nn.Module):
    """Blocks in a list, which is never called itself."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(2)), nn.Linear(WIDE, OUT)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def trained(stage, **block):
    """A hash of the weights after three updates, on this rank."""
    torch.manual_seed(0)
    model = Net()
    config = {"train_micro_batch_size_per_gpu": ROWS, "gradient_accumulation_steps": MICROS, "flops_profiler": block}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config |= {"optimizer": {"type": "AdamW"}, "zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    for _ in range(3 * MICROS):
        engine.backward(engine(torch.randn(ROWS, WIDE)).square().mean())
        engine.step()
    return tree_hash(engine.train_step.params(engine.state))


def both(stage, file):
    """The hashes of a run that is counted and of one that is not."""
    return trained(stage, enabled=True, output_file=file), trained(stage)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_what_is_counted_is_the_closed_form(run_world, tmp_path, stage, world):
    file = tmp_path / "deep" / "flops.txt"
    for counted, plain in run_world(world, both, stage, str(file)):
        assert counted == plain
    text = file.read_text()
    said = {n.strip(): x for n, x in re.findall(r"^(\S.*?)  +(\S.*)$", text, re.M)}
    one = lambda x: f"{x / 1e3:.3g} K"
    assert said["fwd flops per GPU"] == one(FORWARD) and said["bwd flops per GPU"] == one(BACKWARD)
    assert said["world size, which is the data parallel size"] == str(world)
    whole = 2 * (WIDE * WIDE + WIDE) + WIDE * OUT + OUT
    assert said["params of model"].strip() == str(whole)
    held = int(said["params per GPU (kept between updates, padding included)"])
    assert whole <= held if stage == 0 or world == 1 else whole / 2 <= held < whole
    assert {"fwd latency of an update", "FLOPS per GPU", "samples/second"} <= said.keys()
    assert "blocks (ModuleList)" in text and "update 1, one micro-batch of rank 0" in text


def test_what_is_asked_for_is_printed(tmp_path):
    file = tmp_path / "flops.txt"
    trained(1, enabled=True, profile_step=0, module_depth=1, top_modules=2, detailed=False, output_file=str(file))
    text = file.read_text()
    assert (
        "latencies: none, because this is the first update" in text
        and "depth 1, flops: blocks 1.02 K, head 192" in text
    )
    assert "depth 2" not in text and "by module" not in text
    trained(1, enabled=True, profile_step=99, output_file=str(tmp_path / "never"))
    assert not Path(tmp_path / "never").exists()
    with pytest.raises(deepspeed.ConfigError, match="flops_profiler.top_modules"):
        trained(0, enabled=True, top_modules=0)


def test_what_is_past_or_ends_in_an_error_is_not_counted():
    """A run that was resumed after the update says so; a forward that fails is no count, and the next one is."""
    engine, *_ = deepspeed.initialize(
        model=nn.Linear(1, 1), config={"train_batch_size": 1, "flops_profiler": {"enabled": True}}
    )
    config = engine.config_
    late, once = Flops(config, 0), Flops(config, 0)
    with late.of("fwd", lambda: 5):
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert not late.counted and not late.on
    with pytest.raises(RuntimeError), once.of("fwd", lambda: 1):
        torch.ones(2, 2) @ torch.ones(3, 2)
    assert not once.counted and once.on
    with once.of("fwd", lambda: 1):
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert once.counted and not Flops(config, 1).on
