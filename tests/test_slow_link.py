"""The experiment of the slow link at its smallest: bytes are the closed form, and it ends all that it makes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
SMALL = ["--layers=1", "--width=64", "--rates=1000", "--rounds=1", "--micros=2", "--updates=1"]
pytestmark = pytest.mark.slow


@pytest.fixture
def nodes(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import two_nodes

    if why := two_nodes.missing():
        pytest.skip(why)


def start(*flags, path=os.environ["PATH"]):
    words = [sys.executable, EXPERIMENTS / "slow_link.py", *SMALL, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, env=os.environ | {"PATH": path}, **pipes)


def below(pid):
    """All processes that a process has started, and theirs."""
    children = []
    with contextlib.suppress(OSError):
        children = [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [x for child in children for x in below(child)]


def test_bytes_are_the_closed_form_by_the_count_and_by_the_interface(nodes, tmp_path):
    run = start(f"--out={tmp_path}")
    out, err = run.communicate(timeout=900)
    assert run.returncode == 0, err
    found = json.loads((tmp_path / "found.json").read_text())
    for x in found["bytes"]:
        assert x["counted"] == x["closed"] or x["chain"] == "ddp", x
        assert 0 <= x["unnamed"] < x["closed"] / 4, x  # gloo's 48 a message, and what TCP repeats on a busy machine
    assert {v["chain"] for v in found["visits"]} == {x["chain"] for x in found["bytes"]} and len(found["bytes"]) == 7
    assert "times as fast" in out and (tmp_path / "slow_link.png").stat().st_size > 1000


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_running(nodes, tmp_path, how):
    run = start("--rounds=1000", f"--out={tmp_path}")
    assert "parameters" in run.stdout.readline(), run.stderr.read()
    started = below(run.pid)
    assert len(started) == 2 * 2 + 2 * 4  # two nodes and their holders, four ranks and what entered the nodes for them
    run.send_signal(how)
    run.communicate(timeout=300)
    assert run.returncode == (-how if how == signal.SIGKILL else 128 + how)
    until = time.monotonic() + 120
    while (left := [pid for pid in started if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left


def test_what_cannot_be_run_is_one_sentence(tmp_path):
    for flags, path, said in (
        (["--width=100"], os.environ["PATH"], "is no multiple of 64"),
        ([], str(tmp_path), "not installed: ip, tc" if os.geteuid() == 0 else "need root"),
    ):
        run = start(*flags, path=path)
        out, err = run.communicate(timeout=300)
        assert run.returncode == 2 and not out and said in err and err.count("\n") == 1
