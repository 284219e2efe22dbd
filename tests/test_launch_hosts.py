"""The launcher on real hosts: namespaces with sshd, pdsh, OpenMPI, MPICH and SLURM.

`make test-launch` runs it; what is not installed is skipped by name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hosts as machines
import pytest

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.skipif(bool(machines.missing()), reason=machines.missing()),
]
ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "tests" / "launched.py")
LAUNCH = [sys.executable, "-m", "funczero.cli", "launch"]
MODEL = [
    "--batch=8",
    "--length=32",
    "--layers=2",
    "--width=32",
    "--heads=2",
    "--sample=0",
    "--eval_every=1000",
    "--eval_batches=1",
    "--warmup=2",
]
SMALL = ["--steps=4", *MODEL]
LONG = ["--steps=60", "--save_every=5", "--resume=auto", *MODEL]
ENV = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMP_NUM_THREADS": "1",
}
TOOLS = {
    "ssh": (),
    "pdsh": ("pdsh",),
    "openmpi": ("mpirun.openmpi",),
    "mpich": ("mpiexec.hydra",),
    "slurm": ("srun", "slurmctld", "slurmd", "munged"),
}


@pytest.fixture(scope="module")
def hosts():
    with machines.cluster() as found:
        yield found


@pytest.fixture(scope="module")
def slurm(hosts):
    with machines.slurm(hosts) as env:
        yield env


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("worker-1 slots=1\nworker-2 slots=1\n")
    return f"--hostfile={path}"


def start(hosts, *words, at="worker-0", env=None, cwd=ROOT):
    """A launch on one host, not waited for."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = hosts[at].enter([*LAUNCH, *words])
    command = [f"--wd={cwd}" if word.startswith("--wd=") else word for word in command]
    return subprocess.Popen(command, env=ENV | (env or {}), text=True, **pipes)


def launch(hosts, *words, **how):
    """A launch on one host: exit code, output, errors."""
    process = start(hosts, *words, **how)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def inner(process):
    """The launcher itself, as seen from outside its namespace."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def wait_for(process, word, times):
    """Read until a word was printed so often."""
    while times:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        times -= word in line


def left(hosts):
    return {
        name: words
        for name, host in hosts.items()
        if (words := {p: w for p, w in host.processes().items() if "slurm" not in w and "munge" not in w})
    }


def until_nothing_is_left(hosts, seconds):
    """How long it took."""
    since = time.monotonic()
    while left(hosts):
        assert time.monotonic() - since < seconds, left(hosts)
        time.sleep(0.05)
    return time.monotonic() - since


def losses(folder):
    return [record["loss"] for record in map(json.loads, (folder / "metrics.jsonl").open()) if "loss" in record]


def losses_of(out, script, *flags):
    """The losses of a script that is run here without a launcher."""
    command = [sys.executable, script, *flags, f"--out={out}"]
    subprocess.run(command, cwd=ROOT, env=ENV, check=True, capture_output=True, timeout=300)
    return losses(out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of the same run on this machine, two processes, without a launcher."""
    out = tmp_path_factory.mktemp("alone")
    return losses_of(out, "experiments/train_gpt.py", *SMALL, "--nproc=2")


@pytest.mark.parametrize("transport", TOOLS)
def test_two_hosts_train_zero_3_to_the_same_bits(request, hosts, hostfile, tmp_path, alone, transport):
    if absent := machines.missing(*TOOLS[transport]):
        pytest.skip(absent)
    words = [f"--launcher={transport}", hostfile, "experiments/train_gpt.py", *SMALL, f"--out={tmp_path}"]
    code, out, err = launch(hosts, *words, env=request.getfixturevalue("slurm") if transport == "slurm" else None)
    assert code == 0, err
    assert losses(tmp_path) == alone and len(alone) == 4
    assert "held-out bits/byte" in out
    until_nothing_is_left(hosts, 5)


BY_HAND = [
    "mpirun.openmpi -n 2 --host worker-1:1,worker-2:1 -x MASTER_ADDR=worker-1",
    "mpiexec.hydra -n 2 -ppn 1 -hosts worker-1,worker-2 -genv MASTER_ADDR worker-1",
    "srun -n 2 -N 2",
]


@pytest.mark.parametrize("command", BY_HAND)
def test_without_the_launcher_the_same_program_is_reached(request, hosts, tmp_path, alone, command):
    tool = command.split()[0]
    if absent := machines.missing(*(TOOLS["slurm"] if tool == "srun" else (tool,))):
        pytest.skip(absent)
    words = hosts["worker-0"].enter(
        [*command.split(), sys.executable, str(ROOT / "experiments/train_gpt.py"), *SMALL, f"--out={tmp_path}"]
    )
    env = ENV | (request.getfixturevalue("slurm") if tool == "srun" else {})
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == alone


def test_a_host_that_is_included_is_the_one_that_runs(hosts, hostfile):
    code, out, err = launch(hosts, hostfile, "--include=worker-1", SCRIPT, at="worker-2")
    assert (code, json.loads(out)["host"]) == (0, "worker-1"), err


def test_preflight_is_one_table(hosts, hostfile, tmp_path):
    code, out, _ = launch(hosts, hostfile, "--preflight", SCRIPT)
    assert code == 0 and out.count("ready") == 2
    (tmp_path / "hosts").write_text("worker-1 slots=1\nnobody slots=1\n")
    code, out, _ = launch(hosts, f"--hostfile={tmp_path / 'hosts'}", "--preflight", "no_script.py")
    assert (
        code == 1
        and "no script no_script.py" in out
        and "not reached: ssh: Could not resolve hostname nobody" in " ".join(out.split())
    )


@pytest.mark.parametrize("transport", ["ssh", "pdsh"])
def test_a_dying_rank_ends_all_hosts(hosts, hostfile, transport):
    if absent := machines.missing(*TOOLS[transport]):
        pytest.skip(absent)
    process = start(hosts, f"--launcher={transport}", hostfile, SCRIPT, "daemon")
    wait_for(process, "ready", 2)
    victim = next(
        pid
        for pid, words in hosts["worker-2"].processes().items()
        if SCRIPT in words and "launch" not in words.split(SCRIPT)[0] and "node" not in words
    )
    since = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - since < 5 and process.returncode == 137
    assert err.splitlines()[-1].startswith("funczero launch: rank 1 on worker-2 was ended by SIGKILL (exit code 137")
    until_nothing_is_left(hosts, 5)


DEATHS = {
    "openmpi": (7,),
    "slurm": (7, 143),
}  # srun's code is the largest one; mpiexec.hydra waits for ranks that never call MPI_Init


@pytest.mark.parametrize("transport", DEATHS)
def test_a_dying_rank_ends_the_others_where_mpi_starts_them(request, hosts, hostfile, transport):
    if absent := machines.missing(*TOOLS[transport]):
        pytest.skip(absent)
    since = time.monotonic()
    code, _, err = launch(
        hosts,
        f"--launcher={transport}",
        hostfile,
        SCRIPT,
        "exit",
        "1",
        "7",
        env=request.getfixturevalue("slurm") if transport == "slurm" else None,
    )
    assert code in DEATHS[transport] and time.monotonic() - since < 20, err
    until_nothing_is_left(hosts, 5)


@pytest.mark.parametrize("name", ["worker-1", "worker-2"])
def test_a_lost_host_ends_the_others(hostfile, name):
    with machines.cluster() as hosts:
        process = start(hosts, hostfile, "--lost_after=4", SCRIPT, "daemon")
        wait_for(process, "ready", 2)
        since = time.monotonic()
        hosts[name].kill()  # as a power cut does: its connections may not even be closed
        _, err = process.communicate(timeout=20)
        assert time.monotonic() - since < 10 and process.returncode == 255
        assert f"host {name} was lost" in err.splitlines()[-1]
        del hosts[name]
        until_nothing_is_left(hosts, 5)


def test_a_pulled_cable_ends_both_sides(hostfile):
    with machines.cluster() as hosts:
        process = start(hosts, hostfile, "--lost_after=4", SCRIPT, "daemon")
        wait_for(process, "ready", 2)
        machines.cut(hosts, "worker-2")
        _, err = process.communicate(timeout=30)
        assert process.returncode == 255 and "host worker-2 was lost: it has not spoken for 4 seconds" in err
        for name in ("worker-1", "worker-2"):
            while left({name: hosts[name]}).get(name):
                time.sleep(0.1)
                live = [w for w in left({name: hosts[name]}).get(name, {}).values() if "sshd:" not in w]
                if not live:
                    break  # sshd itself waits for its own time-out on a dead line


@pytest.mark.parametrize("transport", ["ssh", "pdsh", "openmpi", "mpich"])
def test_a_killed_launcher_leaves_nothing(hosts, hostfile, transport):
    if absent := machines.missing(*TOOLS[transport]):
        pytest.skip(absent)
    mode = (
        ("daemon",) if transport in ("ssh", "pdsh") else ("die", "none")
    )  # a daemon of a rank's own is out of MPI's reach
    process = start(hosts, f"--launcher={transport}", hostfile, SCRIPT, *mode)
    wait_for(process, "ready", 2)
    os.kill(inner(process), signal.SIGKILL)
    process.wait(10)
    until_nothing_is_left(hosts, 6)


def test_ctrl_c_leaves_nothing(hosts, hostfile):
    process = start(hosts, hostfile, SCRIPT, "daemon")
    wait_for(process, "ready", 2)
    os.kill(inner(process), signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    until_nothing_is_left(hosts, 1)


@pytest.mark.parametrize("transport", ["ssh", "openmpi", "mpich"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_notice_is_passed_on(hosts, hostfile, transport, number):
    if absent := machines.missing(*TOOLS[transport]):
        pytest.skip(absent)
    process = start(hosts, f"--launcher={transport}", hostfile, SCRIPT, "save")
    wait_for(process, "ready", 2)
    os.kill(inner(process), number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert out.count(f"saved after {number.name if transport == 'ssh' else 'SIGUSR1'}") == 2


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The losses of a longer run that nobody disturbs, in one process."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return losses_of(out, "tests/elastic.py", *LONG, "--nproc=1")


def until_updates(process, folder, number):
    """Wait until the run has made so many updates."""
    since = time.monotonic()
    while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < number:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - since < 240, "the run did not come so far"
        time.sleep(0.02)


@pytest.mark.parametrize("what", ["rank 0", "rank 1", "worker-1", "worker-2"])
def test_what_is_lost_is_made_again_with_the_same_bits(hostfile, tmp_path, uninterrupted, what):
    with machines.cluster() as hosts:
        process = start(
            hosts, hostfile, "--max_restarts=1", "--lost_after=5", "tests/elastic.py", *LONG, f"--out={tmp_path}"
        )
        until_updates(process, tmp_path, 12)
        if what in hosts:
            hosts[what].kill()
        else:
            rank = hosts["worker-1" if what == "rank 0" else "worker-2"].processes()
            os.kill(next(pid for pid, words in rank.items() if "train_gpt.py" in words), signal.SIGKILL)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert losses(tmp_path) == uninterrupted and len(uninterrupted) == 60
        assert what not in hosts or f"{what} lost; start 1 of at most 1 again, on " in err


def test_fewer_hosts_go_on_with_the_same_bits(tmp_path):
    """Three ranks, two micro-batches of which one has none in its second place; a host is lost, and two ranks go on."""
    exact = [*LONG, "--sums=exact", "--micro_batch=2", "--batch=10", "--stage=1"]
    (tmp_path / "hostfile").write_text("worker-1 slots=2\nworker-2 slots=1\n")
    want = losses_of(tmp_path / "one", "experiments/train_gpt.py", *exact, "--nproc=1")
    with machines.cluster() as hosts:
        words = [f"--hostfile={tmp_path / 'hostfile'}", "--max_restarts=1", "--lost_after=5"]
        process = start(hosts, *words, "experiments/train_gpt.py", *exact, f"--out={tmp_path / 'many'}")
        until_updates(process, tmp_path / "many", 12)
        hosts["worker-2"].kill()
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "worker-2 lost; start 1 of at most 1 again, on worker-1" in err
        assert losses(tmp_path / "many") == want and len(want) == 60


def test_a_notice_saves_and_the_run_goes_on_elsewhere(hosts, hostfile, tmp_path, uninterrupted):
    words = [hostfile, "tests/elastic.py", *LONG, f"--out={tmp_path}"]
    process = start(hosts, *words)
    until_updates(process, tmp_path, 12)
    os.kill(inner(process), signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and 12 <= len(losses(tmp_path)) < 60, err
    code, out, err = launch(hosts, "--include=worker-2", *words)
    assert code == 0 and losses(tmp_path) == uninterrupted, err


def test_a_start_takes_little_longer_than_torchruns(hosts, hostfile, capsys):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--master-addr=worker-1",
        "--master-port=29511",
    ]
    times = {}
    for name in ("torchrun", "funczero launch") * 2:
        since = time.monotonic()
        if name == "torchrun":
            both = [
                subprocess.Popen(
                    hosts[f"worker-{n + 1}"].enter([*torchrun, f"--node-rank={n}", SCRIPT]),
                    env=ENV,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                for n in (0, 1)
            ]
            assert [process.wait(60) for process in both] == [0, 0]
        else:
            assert launch(hosts, hostfile, SCRIPT)[0] == 0
        times[name] = min(time.monotonic() - since, times.get(name, 1e9))
    with capsys.disabled():
        print(
            "\nfrom command to end on two hosts: "
            + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items())
        )
    assert times["funczero launch"] < times["torchrun"] + 10
