"""The options that DeepSpeed's launcher has, too: cores, a process id, a script before the ranks, how much is said."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from funczero.launch import cores, orders
from funczero.launch.error import LaunchError
from funczero.launch.flags import parse, silent
from funczero.launch.job import make_plan
from funczero.launch.run import saved_pid
from funczero.launch.transports import commands_of, describe, rank_launcher

ROOT = Path(__file__).parents[1]


@pytest.fixture
def plan(tmp_path):
    def make(*words, text="worker-1 slots=2\nworker-2 slots=2\n"):
        (tmp_path / "hosts").write_text(text)
        return make_plan(parse([f"--hostfile={tmp_path / 'hosts'}", *words, "train.py", "a"]), {}, "/work")

    return make


def with_numactl(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "numactl"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nexport BOUND="$2"; shift 2; exec "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")


def test_cores_are_dealt_in_equal_neighbouring_parts(tmp_path, monkeypatch):
    monkeypatch.delenv("KMP_AFFINITY", raising=False)
    assert cores.parse_cores("0,2-4,6,8-9") == (0, 2, 3, 4, 6, 8, 9)
    assert cores.dealt(range(8), 3, "h") == [(0, 1), (2, 3), (4, 5)] and cores.own_cores()
    with pytest.raises(LaunchError, match="worker-1 has 1 cores for 2 ranks; start fewer, or leave it out"):
        cores.dealt((0,), 2, "worker-1")
    monkeypatch.setattr(cores.shutil, "which", lambda name: None)
    with pytest.raises(LaunchError, match="there is no numactl on worker-1; install it there, or leave the option out"):
        cores.bound((0, 1), 2, "worker-1")
    monkeypatch.undo()
    with_numactl(tmp_path, monkeypatch)
    monkeypatch.delenv("KMP_AFFINITY", raising=False)
    assert cores.bound((0, 1, 2, 3), 2, "h") == [["numactl", "-C", "0-1"], ["numactl", "-C", "2-3"]]
    monkeypatch.setenv("KMP_AFFINITY", "compact")
    with pytest.raises(LaunchError, match="KMP_AFFINITY is set on h and binds threads, too; unset it"):
        cores.bound((0, 1), 2, "h")


def test_orders_bind_on_the_host(plan, tmp_path, monkeypatch):
    p = plan("--bind_cores_to_rank", "--bind_core_list=0-3")
    told = json.loads(commands_of(p)[0].stdin)
    assert told["cores"] == [0, 1, 2, 3] and json.loads(commands_of(plan())[0].stdin)["cores"] is None
    assert json.loads(commands_of(plan("--bind_cores_to_rank"))[0].stdin)["cores"] == []
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "KMP_AFFINITY"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("KMP_AFFINITY")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.chdir(tmp_path)
    with_numactl(tmp_path, monkeypatch)
    (tmp_path / "train.py").touch()
    monkeypatch.setattr(orders, "resolve", lambda *where: None)
    told |= {"cwd": str(tmp_path), "env": {}, "node_rank": 1}
    assert orders.prepare(told) is None
    assert (
        told["bound"] == [["numactl", "-C", "0-1"], ["numactl", "-C", "2-3"]] and os.environ["OMP_NUM_THREADS"] == "2"
    )


def test_intel_mpi_is_told_every_ranks_cores(plan, monkeypatch):
    monkeypatch.setenv("PATH", "")  # numactl is needed on the hosts, not here
    p = plan("--launcher=impi", "--python=python3", "--bind_cores_to_rank", "--bind_core_list=0-7")
    words = shlex.join(rank_launcher(p).argv)
    front, *ranks = words.split(" -n 1 ")
    assert front.startswith("mpirun -ppn 2 -hosts worker-1,worker-2 -wdir /work") and len(ranks) == 4
    want = [f"-env OMP_NUM_THREADS 4 numactl -C {c} python3 -u train.py a" for c in ("0-3", "4-7", "0-3", "4-7")]
    assert [r.removesuffix(" :") for r in ranks] == want


def test_a_shell_reads_a_script_first(plan):
    p = plan("--venv_script=/opt/venv/bin/activate")
    assert commands_of(p)[0].argv[-1] == ". /opt/venv/bin/activate && exec python -m funczero.launch.node"
    p = plan("--venv_script=/opt/v/activate", "--python=python3", text="localhost slots=2\n")
    command = commands_of(p)[0]
    assert command.argv == ("bash", "-c", ". /opt/v/activate && exec python3 -m funczero.launch.node")
    assert command.env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT) and ". /opt/v/activate" in describe(p)
    with pytest.raises(LaunchError, match=r"--venv_script=a b: a shell on the hosts would read this path as more than"):
        commands_of(plan("--venv_script=a b"))


def test_a_process_id_stands_in_a_file_while_the_run_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / f"{os.getpid()}.deepspeed"
    with saved_pid():
        assert path.read_text() == str(os.getpid())
        with (
            pytest.raises(LaunchError, match="--save_pid: .* is there already, of an older run; delete it"),
            saved_pid(),
        ):
            pass
        assert path.exists()
    assert not path.exists()


def test_how_much_is_said():
    level = lambda *words: silent(parse([*words, "x.py"]))
    assert [level(f"--log_level={x}") for x in ("debug", "INFO", "warning", "error")] == [False, False, True, True]
    assert level("-q") and level("--quiet") and not level()


@pytest.mark.slow
def test_ranks_run_bound_behind_a_script_and_under_a_saved_id(tmp_path, monkeypatch):
    with_numactl(tmp_path, monkeypatch)
    (tmp_path / "activate").write_text("export FROM_SCRIPT=yes\n")
    (tmp_path / "x.py").write_text(
        "import os, pathlib, tempfile\n"
        "saved = [p.name for p in pathlib.Path(tempfile.gettempdir()).glob('*.deepspeed')]\n"
        "print(os.environ['BOUND'], os.environ['OMP_NUM_THREADS'], os.environ['FROM_SCRIPT'], len(saved))\n"
    )
    words = ["--num_gpus=2", "--bind_cores_to_rank", "--bind_core_list=0-3", "--save_pid", "--log_level=error"]
    script = [f"--venv_script={tmp_path / 'activate'}", f"--python={sys.executable}0"[:-1], "x.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "funczero.cli", "launch", *words, *script],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[rank 0] 0-1 2 yes 1", "[rank 1] 2-3 2 yes 1"], done
    assert not list(tmp_path.glob("*.deepspeed"))
