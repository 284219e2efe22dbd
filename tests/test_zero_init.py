"""zero.Init: what a parent writes into its children has the values of plain torch on rank 0, on any world; calls of one
rank alone end with a sentence.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from engines import config
from torch import nn

import funczero.deepspeed as deepspeed
from funczero.deepspeed import comm
from funczero.world.ledger import DivergenceError


class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)
        self.gain = nn.Parameter(torch.ones(()))
        nn.init.zeros_(self.up.bias)


class Parent(nn.Module):
    """Writes into its children in the ways that models do."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 5, padding_idx=2)
        self.blocks = nn.ModuleList(Leaf() for _ in range(3))
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.table.weight
        self.norm = nn.LayerNorm(5)
        self.apply(self.start)
        nn.init.orthogonal_(self.blocks[0].up.weight)
        nn.init.trunc_normal_(self.blocks[0].down.weight, std=0.1)
        nn.init.kaiming_uniform_(self.blocks[1].up.weight, a=math.sqrt(5))
        for n, p in self.named_parameters():
            if n.endswith("down.weight"):
                p.data.normal_(0.0, 0.02 / math.sqrt(2 * len(self.blocks)))
        with torch.no_grad():
            self.blocks[2].up.weight.copy_(torch.eye(7, 5))
            self.blocks[2].up.weight[1:3, ::2].mul_(3)
            self.blocks[2].up.bias[0] = 4.0
            self.blocks[2].gain.fill_(0.5)
            self.blocks[1].up.weight /= self.blocks[1].up.weight.norm()
        self.blocks[1].up.bias.data = torch.full((7,), 2.0)
        self.blocks[1].down.bias.data[1:] = 1.0

    def start(self, m):
        if isinstance(m, nn.Linear):
            m.weight.data.normal_(mean=0.0, std=0.02)
            if m.bias is not None:
                m.bias.data.zero_()
        if isinstance(m, nn.Embedding):
            m.weight.data.normal_(mean=0.0, std=0.02)
            m.weight.data[m.padding_idx].zero_()
        if isinstance(m, nn.LayerNorm):
            nn.init.constant_(m.weight, 0.9)

    def forward(self, ids):
        x = self.table(ids)
        for b in self.blocks:
            x = x + b.down(torch.tanh(b.up(x))) * b.gain
        return self.head(self.norm(x))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def gpt2():
    import transformers

    shape = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(shape)


def built(make, stage):
    """Is the model that zero.Init built plain torch's on rank 0, before and after initialize?"""
    torch.manual_seed(6 + comm.get_rank())  # rank 0's values count
    with deepspeed.zero.Init(config_dict_or_path=config(stage)):
        model = make()
    held = [p.part.numel() for p in model.parameters()]
    torch.manual_seed(6)
    plain = make().state_dict()
    engine, *_ = deepspeed.initialize(model=model, config=config(stage))
    whole = engine.module.state_dict()
    same = plain.keys() == whole.keys() and all(torch.equal(whole[n], x) for n, x in plain.items())
    return same and sum(held) <= sum(p.numel() for p in model.parameters()) / comm.get_world_size() + 8 * len(held) * 8


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("make", [Parent, encoder])
def test_children_that_a_parent_initialises_are_plain_torchs(make, stage):
    assert built(make, stage)


@pytest.mark.parametrize("make", [Parent, encoder, pytest.param(gpt2, marks=pytest.mark.slow)])
def test_they_are_on_two_ranks(run_world, make):
    assert all(run_world(2, built, make, 3))


def test_after_it_a_write_is_refused_and_a_read_with_a_gradient_always():
    with deepspeed.zero.Init():
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        row = net[0].weight.data[0]
        assert row.shape == (3,) and row.dtype == torch.float32
        with pytest.raises(RuntimeError, match="parameter 'weight' is sharded"):
            F.linear(torch.ones(3), net[0].weight)
        with torch.no_grad():
            assert F.linear(torch.ones(3), net[0].weight).shape == (3,)
    for write in (lambda: nn.init.zeros_(net[0].weight), lambda: row.zero_(), lambda: net[0].weight.data):
        with pytest.raises(
            RuntimeError, match="'weight' is sharded .* or open it: with deepspeed.zero.GatheredParameters"
        ):
            write()


# --- one rank alone ---------------------------------------------------------------------------------------------------
def apart(call):
    """What ranks hear when rank 0 writes alone, or both write other values."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    engine, *_ = deepspeed.initialize(model=net, config=config(1))
    engine.backward(engine(torch.ones(4, 6)).sum())
    engine.step()
    p, rank = net[0].weight, comm.get_rank()
    try:
        if call == "alone" and rank == 0:
            deepspeed.utils.safe_set_full_fp32_param(p, torch.zeros(6, 6))
        if call == "other":
            deepspeed.utils.safe_set_full_fp32_param(p, torch.full((6, 6), float(rank)))
        if call == "moment":
            deepspeed.utils.safe_set_full_optimizer_state(p, torch.full((6, 6), float(rank)), "exp_avg")
        engine.backward(engine(torch.ones(4, 6)).sum())
        engine.step()
    except DivergenceError as error:
        return str(error)
    return ""


def test_ranks_that_write_apart_are_told(run_world):
    for call, name in (
        ("alone", "safe_set_full_fp32_param('0.weight')"),
        ("other", "safe_set_full_fp32_param('0.weight')"),
        ("moment", "safe_set_full_optimizer_state('0.weight', 'exp_avg')"),
    ):
        one, other = run_world(2, apart, call)
        assert one == other and name in one, one


ALONE = """
import sys, torch
import funczero.deepspeed as deepspeed
from torch import nn
call, utils = sys.argv[1], deepspeed.utils
make = lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
if call.startswith("Init"):
    with deepspeed.zero.Init():
        net = make()
        if call == "Init write" and deepspeed.comm.get_rank() == 0:
            nn.init.zeros_(net[0].weight)
else:
    net = make()
zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
c = {"train_batch_size": 8, "optimizer": {"type": "Adam"}, **zero}
if call == "Init gathered" and deepspeed.comm.get_rank() == 0:
    with deepspeed.zero.GatheredParameters(net[0].weight):
        pass
engine, *_ = deepspeed.initialize(model=net, config=c)
for step in range(4):
    engine.backward(engine(torch.ones(4, 6)).square().mean())
    engine.step()
    if step == 1 and deepspeed.comm.get_rank() == 0 and not call.startswith("Init"):
        p = net[0].weight
        if call == "gathered":
            with deepspeed.zero.GatheredParameters(p, modifier_rank=0):
                pass
        else:
            {"parameter": utils.safe_get_full_fp32_param, "gradient": utils.safe_get_full_grad,
             "moment": lambda p: utils.safe_get_full_optimizer_state(p, "exp_avg")}[call](p)
print("went on")
"""
SAYS = {
    "Init write": "the parameter 'weight' of zero.Init, opened",
    "Init gathered": "the parameter 'weight' of zero.Init, opened",
    "gathered": "GatheredParameters('0.weight')",
    "parameter": "safe_get_full_fp32_param('0.weight')",
    "moment": "safe_get_full_optimizer_state('0.weight', 'exp_avg')",
}


@pytest.mark.slow
@pytest.mark.parametrize("call", SAYS)
def test_a_call_of_one_rank_alone_ends_with_a_sentence(tmp_path, call):
    (tmp_path / "alone.py").write_text(ALONE)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "alone.py", call]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, cwd=tmp_path, env=environ())
    assert done.returncode != 0 and "went on" not in done.stdout
    said = [line for line in done.stderr.splitlines() if SAYS[call] in line and "every rank must" in line]
    assert said, done.stderr


def environ():
    import os

    root = str(Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
