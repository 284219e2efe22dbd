"""Loops that somebody else wrote, unmodified, killed and resumed: their losses are plain torch's, and each other's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

MISSING = [n for n in ("transformers", "accelerate") if importlib.util.find_spec(n) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} are not installed")
LOOPS = Path(__file__).parent / "loops"
ROOT = LOOPS.parent.parent
ALL = "trainer", "accelerated", "engine"


def start(script, stage, folder, world, *more, shim=True):
    """A script of somebody's in so many processes; with the shim `import deepspeed` means ours in them."""
    launched = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "TORCHELASTIC_", "ACCELERATE_")
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(launched)},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    launch = [sys.executable, "-m", "funczero.cli", "launch", *["--as_deepspeed"] * shim, f"--num_gpus={world}"]
    words = [*launch, str(LOOPS / f"{script}.py"), str(stage), str(folder), *more]
    return subprocess.Popen(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder.parent
    )


def told(process, folder, killed=False):
    """What it left."""
    out, _ = process.communicate(timeout=400)
    assert process.returncode == (137 if killed else 0), out[-4000:]
    return json.loads((folder / "told.json").read_text())


@cache
def truth():
    """Plain torch's run."""
    sys.path.insert(0, str(LOOPS))
    try:
        import same
    finally:
        sys.path.remove(str(LOOPS))
    return same.by_hand()


def losses(log):
    """Of updates alone, out of a Trainer's log or a list of them."""
    return [x["loss"] if isinstance(x, dict) else x for x in log if not isinstance(x, dict) or "loss" in x]


def furthest(got, want):
    """The largest relative distance."""
    assert len(got) == len(want)
    return max(abs(a / b - 1) for a, b in zip(got, want, strict=True))


COMBINATIONS = [(s, w) for s in range(4) for w in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loops", "stage", "world"),
    [
        (ALL[:1], 3, 2),
        (ALL[1:2], 2, 2),
        *((ALL, *at) for at in COMBINATIONS),
    ],
)
def test_a_loop_that_is_killed_and_resumed_is_plain_torchs(tmp_path, loops, stage, world):
    """The updates that both lives make have the same bits; gradient checkpointing, a clip and warmup included."""
    lives = {loop: start(loop, stage, tmp_path / loop, world, "killed") for loop in loops}
    for loop, life in lives.items():
        told(life, tmp_path / loop, killed=True)
    lives = {loop: start(loop, stage, tmp_path / loop, world, "resumed") for loop in loops}
    want, whole = truth(), {}
    for loop, life in lives.items():
        got = told(life, tmp_path / loop)
        before, after = losses(got["killed"]), losses(got["resumed"])
        if loop == "trainer":  # its log goes on in the checkpoint
            assert after[:4] == before[:4]
            after = after[4:]
        assert len(before) == 7 and len(after) == 4
        assert before[4:] == after[:3]
        whole[loop] = before[:4] + after
        _check(got, tmp_path / loop / "final" / "model.safetensors", want)
        print(loop, stage, world, f"{furthest(whole[loop], want['losses']):.1e}")
    for got in whole.values():
        assert all(furthest(got, other) < 1e-6 for other in (want["losses"], *whole.values()))


def _check(got, saved, want):
    from safetensors.torch import load_file
    from transformers import GPT2LMHeadModel

    if "eval" in got:
        logged = [x["eval_loss"] for x in got["resumed"] if "eval_loss" in x][:2]
        norms = [x["grad_norm"] for x in got["resumed"] if "grad_norm" in x]
        assert furthest([*logged, got["eval"], got["test"]], [*want["evals"], want["evals"][-1], want["test"]]) < 2e-6
        assert furthest(norms, want["norms"]) < 2e-6 and got["words"] == want["words"]
    weights, trained = load_file(saved), want["trained"].state_dict()
    assert weights.keys() | {"lm_head.weight"} == trained.keys()
    gaps = {n: (x - trained[n]).abs().max().item() for n, x in weights.items()}
    keys = [n for n in gaps if n.endswith("c_attn.bias")]  # a key's bias has no gradient but rounding
    assert all(gap < (1e-5 if n in keys else 1e-6) for n, gap in gaps.items()), gaps
    if (saved.parent / "config.json").exists():
        words = torch.tensor([[5, 6, 7, 8]])
        model = GPT2LMHeadModel.from_pretrained(saved.parent)
        assert torch.allclose(model(words).logits.double(), want["trained"](words).logits, rtol=1e-4, atol=1e-5)
