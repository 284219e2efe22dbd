"""An experiment of forty lines: one result at every stage, and no process that outlives the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from funczero.writers import records

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "forty_lines.py"


def start(*words):
    return subprocess.Popen(
        [sys.executable, SCRIPT, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def alive(pid):
    return os.path.exists(f"/proc/{pid}")


def test_it_is_of_forty_lines():
    assert len(SCRIPT.read_text().splitlines()) <= 40


@pytest.mark.slow
def test_it_has_one_result_at_every_stage(tmp_path):
    runs = [
        start(f"--out={tmp_path}/{stage}", f"--stage={stage}", *words)
        for stage, words in ((0, ["--nproc=1", "--accumulate=2"]), (3, ["--nproc=2", "--write=tensorboard"]))
    ]
    for run in runs:
        out, _ = run.communicate(timeout=300)
        assert run.returncode == 0, out
    kept = ("step", "loss", "grad_norm", "lr", "accuracy")
    one, two = (
        [{n: r[n] for n in kept if n in r} for r in records(tmp_path / name / "metrics.jsonl")] for name in "03"
    )
    assert one == two and len(one) == 304 and one[-1]["accuracy"] > 0.97
    assert list((tmp_path / "3" / "tensorboard").iterdir())


@pytest.mark.slow
def test_no_process_outlives_a_launcher_that_is_killed(tmp_path):
    run = start(f"--out={tmp_path}", "--steps=1000000")
    until = time.time() + 120
    while not ((log := tmp_path / "metrics.jsonl").exists() and log.stat().st_size) and time.time() < until:
        time.sleep(0.1)
    ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)  # its output closes when the last process has ended; nobody may have reaped it yet
    left = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in ranks if alive(pid)]
    assert len(ranks) == 2 and set(left) <= {"Z", "X"}
