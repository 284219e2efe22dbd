"""Ten programs for DeepSpeed, with only the import line changed: the numbers of DeepSpeed 0.19.8, of one of
them plain torch's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

PROGRAMS = Path(__file__).parent / "programs_deepspeed"
GOLDEN = json.loads((Path(__file__).parent / "golden/program_losses.json").read_text())["losses"]
QUICK = "accumulated", "groups", "partitioned"


def run(name):
    source = (PROGRAMS / f"{name}.py").read_text()
    assert source.splitlines().count("import deepspeed") == 1
    source = source.replace("\nimport deepspeed\n", "\nimport funczero.deepspeed as deepspeed\n")
    space = {"__name__": "__main__"}
    exec(compile(source, f"{name}.py", "exec"), space)
    return space["losses"]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in GOLDEN])
def test_a_program_gives_deepspeeds_numbers(name, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.testing.assert_close(torch.tensor(run(name)), torch.tensor(GOLDEN[name]), rtol=1e-5, atol=1e-6)


def test_every_program_is_run():
    assert sorted(GOLDEN) == sorted(p.stem for p in PROGRAMS.glob("*.py")) and len(GOLDEN) == 10
