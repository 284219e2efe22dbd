"""Loops that somebody else wrote, unmodified: their losses are plain torch's, and a resume has the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
LOOPS = Path(__file__).parent / "loops"
ROOT = LOOPS.parent.parent


def start(script, stage, folder, world, *more):
    """A script of somebody's in so many processes; without DeepSpeed one plain process."""
    launched = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "TORCHELASTIC_", "ACCELERATE_")
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(launched)},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    launch = [sys.executable, "-m", "funczero.cli", "launch", "--as_deepspeed", f"--num_gpus={world}"]
    words = [*(launch if stage >= 0 else [sys.executable]), str(LOOPS / script), str(stage), str(folder), *more]
    return subprocess.Popen(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder.parent
    )


def told(process, folder):
    """What it left."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, (out[-2000:], err[-4000:])
    return json.loads((folder / "told.json").read_text())


@pytest.mark.parametrize(
    ("stage", "world"),
    [(3, 2), *(pytest.param(s, w, marks=pytest.mark.slow) for s in range(4) for w in (1, 2) if (s, w) != (3, 2))],
)
def test_the_trainer_trains_evaluates_generates_saves_and_resumes(tmp_path, stage, world):
    """Gradient checkpointing, a clip, warmup and accumulation included."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    plain, ours = start("trainer.py", -1, tmp_path / "plain", 1), start("trainer.py", stage, tmp_path / "ours", world)
    want, got = told(plain, tmp_path / "plain"), told(ours, tmp_path / "ours")
    assert len(got["whole"]) == len(want["whole"]) == 8
    for a, b in zip(got["whole"], want["whole"], strict=True):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=2e-6) for k in a), (a, b)
    assert got["eval"] == pytest.approx(want["eval"], rel=2e-6) and got["test"] == pytest.approx(want["test"], rel=2e-6)
    assert got["words"] == want["words"]
    again = told(start("trainer.py", stage, tmp_path / "ours", world, "resume"), tmp_path / "ours")
    assert again["resumed"][-4:] == got["whole"][-4:]
    saved, truth = (load_file(tmp_path / x / "final" / "model.safetensors") for x in ("ours", "plain"))
    assert saved.keys() == truth.keys()
    for name, x in truth.items():
        torch.testing.assert_close(saved[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "world"),
    [(2, 2), *(pytest.param(s, w, marks=pytest.mark.slow) for s in range(4) for w in (1, 2) if (s, w) != (2, 2))],
)
def test_accelerates_loop_is_plain_torchs_and_resumes_to_the_same_bits(tmp_path, stage, world):
    folder = tmp_path / "ours"
    got = told(start("accelerated.py", stage, folder, world), folder)
    assert got["unwrapped"] and got["resumed"] == got["whole"][12:] and got["gap"] < 1e-6
    assert got["whole"] == pytest.approx(got["plain"], rel=1e-6)
