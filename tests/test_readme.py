"""The README's example, as a new user runs it: alone and under torchrun, unchanged, to the same last digit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def by_ranks(ends, script, folder):
    """What two ranks print that have the environment of torchrun's."""
    told = ends.run(
        folder / "life", f"import os; os.chdir({str(folder)!r})\n{script.read_text()}", 2, 120.0, short=True
    )
    assert [rank["code"] for rank in told] == [0, 0], told
    return "".join(rank["out"] for rank in told)


def by_torchrun(ends, script, folder):
    """What it prints as the README types it."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("start", [by_ranks, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def test_example_runs_alone_and_under_torchrun(ends, tmp_path, start):
    """Unchanged; its two ranks are started by torchrun itself in `make test-all`, and by others in `make test`."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    first, stages, exact, function, wires, checkpoints, before = blocks[:7]
    script = tmp_path / "example.py"  # in which the four stages build, too
    script.write_text(first + before + checkpoints + function + "\nlr = 3e-4\n" + stages + exact + wires)
    (tmp_path / "both").mkdir()
    own = f"import os; os.chdir({str(tmp_path)!r})\n{script.read_text()}"
    (one,) = ends.run(tmp_path / "one", own, limit=120.0, short=True)
    assert one["code"] == 0, one
    alone, both = one["out"], start(ends, script, tmp_path / "both")
    line = re.match(r"loss 0\.\d+ after 100 updates\n", alone)
    assert line and "16 bits would be" in alone and "plan on data=16" in alone, alone
    assert "calls of a step" in alone and list(tmp_path.glob("run/trace.json")), alone
    assert re.findall(r"loss 0\.\d+ after 100 updates", both) == [line[0].strip()] * 2  # two ranks may share a line


def test_the_experiment_in_forty_lines_is_the_file():
    own = (README.parent / "experiments" / "forty_lines.py").read_text()
    assert f"```python\n{own}```" in README.read_text() and len(own.splitlines()) <= 40
