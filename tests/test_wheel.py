"""A wheel holds all that a run needs: it is built, installed beside the environment, and trains from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ASK = """
import sys
import torch
import funczero as fz
assert fz.__file__.startswith(sys.argv[1]), fz.__file__
heavy = {"jax", "orbax", "sphinx", "tensorboard", "transformers", "lightning"} & set(sys.modules)
assert not heavy, heavy
step = fz.train_step(fz.value_and_grad(lambda p, b: ((p["w"] * b).sum(), b.sum())), fz.adamw(0.1))
state, metrics = step(step.init({"w": torch.tensor(1.0)}), torch.ones(2))
assert metrics.loss == 1 and step.params(state)["w"] < 1
"""
DOCTOR = """
import runpy, sys
sys.argv = [f"{sys.argv[1]}/bin/funczero", "doctor", "--no_trial"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def copied(source):
    """What a wheel is built of."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("funczero", "kernels"):
        own = lambda at, names: {*skip(at, names), *(n for n in names if Path(at, n).is_symlink())}
        shutil.copytree(ROOT / name, source / name, ignore=own)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)


def test_a_wheel_trains(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    copied(source)
    words = ["install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--target"]
    subprocess.run([sys.executable, "-m", "pip", *words, site, source], check=True, timeout=120)
    wanted = {p.relative_to(source) for n in ("funczero", "kernels") for p in (source / n).rglob("*") if p.is_file()}
    wanted = {Path("funczero", p) if p.parts[0] == "kernels" else p for p in wanted}
    assert not [str(p) for p in wanted if not (site / p).is_file()]
    env = {**os.environ, "PYTHONPATH": str(site)}
    words = [sys.executable, "-c", ASK + DOCTOR, site]  # one process: torch is imported once
    said = subprocess.run(words, timeout=120, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.endswith("all is well\n"), (said.stdout, said.stderr)


@pytest.mark.slow
def test_an_empty_environment_is_enough(tmp_path):
    """Source and wheel are built and checked as an index would; in an environment of its own two ranks train."""
    source, dist = tmp_path / "source", tmp_path / "dist"
    copied(source)
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    run = lambda *words: subprocess.run(words, check=True, timeout=900, env=alone, cwd=tmp_path, capture_output=True)
    for name in ("tools", "empty"):
        run(sys.executable, "-m", "venv", tmp_path / name)
    tools, python = tmp_path / "tools" / "bin" / "python", tmp_path / "empty" / "bin" / "python"
    run(tools, "-m", "pip", "install", "-q", "build", "twine")
    run(tools, "-m", "build", "--outdir", dist, source)
    built = sorted(dist.iterdir())
    assert [p.suffix for p in built] == [".whl", ".gz"]
    run(tools, "-m", "twine", "check", "--strict", *built)
    run(python, "-m", "pip", "install", "-q", built[0])
    run(python, "-c", ASK, tmp_path / "empty")
    shutil.copy(ROOT / "examples" / "vae.py", tmp_path)
    run(python, "vae.py", "--steps=3", "--batch=8", "--nproc=2", "--stage=3", "--save_every=2", "--out=run")
    run(
        python,
        "vae.py",
        "--steps=5",
        "--batch=8",
        "--nproc=1",
        "--stage=1",
        "--save_every=2",
        "--resume=auto",
        "--out=run",
    )
    said = run(tmp_path / "empty" / "bin" / "funczero", "report", "run").stdout.decode()
    assert "report.html" in said and (tmp_path / "report.html").stat().st_size > 10_000
