"""The launcher at work on this machine: `ssh` is a program that hands its last words to a shell, as sshd does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "tests" / "launched.py")
LAUNCH = [sys.executable, "-m", "funczero.cli", "launch"]

FAKE_SSH = r"""#!/bin/sh
echo "$@" >> "$SSH_LOG"
while [ "$1" != "--" ]; do shift; done
host="$2"; shift 2
case "$host" in down*) echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255;; esac
cd /; exec env -i PATH="$PATH" HOME=/nowhere PYTHONPATH="$FAKE_PYTHONPATH" TMPDIR="$TMPDIR" CUDA_VISIBLE_DEVICES="" \
    sh -c "$*"
"""


def free_port():
    """A port that nobody has; below the range from which the system gives them to whoever connects, so that nobody gets
    it before the launch does.
    """
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                return port
    raise AssertionError("no port is free")


@pytest.fixture
def world(tmp_path):
    """Two hosts that are both this machine, behind a fake ssh."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "tmp").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(FAKE_SSH)
    ssh.chmod(0o755)
    (tmp_path / "hosts").write_text("127.0.0.2 slots=1\n127.0.0.3 slots=1\n")
    mark = (  # what ranks and their children are known by: others may run the same script on this machine
        f"FUNCZERO_MARK={tmp_path}"
    )
    own = {"FUNCZERO_MARK": str(tmp_path), "FAKE_PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    own |= {"PATH": f"{ssh.parent}:{os.environ['PATH']}", "SSH_LOG": str(tmp_path / "ssh.log"), "PYTHONPATH": str(ROOT)}
    clean = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
    }

    started = []

    def start(*words, env=None, cwd=tmp_path, hostfile=True, port=None):
        front = (
            [f"--hostfile={tmp_path / 'hosts'}", "--master_addr=127.0.0.2", f"--master_port={port or free_port()}"]
            if hostfile
            else []
        )
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([*LAUNCH, *front, *words], env=clean | own | (env or {}), cwd=cwd, **pipes))
        return started[-1]

    start.left = lambda: marked(mark)
    yield start
    for process in started:  # of a test that failed
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)
    since = time.monotonic()
    while os.listdir(tmp_path / "tmp"):  # no pipe and no folder stays
        assert time.monotonic() - since < 5, os.listdir(tmp_path / "tmp")
        time.sleep(0.05)


def finish(process, timeout=60):
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it leaves nothing
        raise
    return process.returncode, out.decode(errors="surrogateescape"), err.decode(errors="surrogateescape")


def ready(process, times, word=b"ready"):
    while times:
        line = process.stdout.readline()
        assert line, process.stderr.read().decode()
        times -= word in line


def until(holds, seconds, seen=lambda: ""):
    """Look again and again until something holds; seen: what is there instead."""
    since = time.monotonic()
    while not holds():
        assert time.monotonic() - since < seconds, f"not within {seconds} s: {seen()}"
        time.sleep(0.05)


def ancestors(pid):
    """The parents of a process, up to the first."""
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def marked(mark):
    """Parents and command lines of everything that was started with a mark in its environment, by process id: seen from
    outside, whoever adopted it.
    """
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in Path(f"/proc/{name}/environ").read_bytes():
                found[int(name)] = (
                    ancestors(int(name))[0],
                    Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(),
                )
        except OSError:
            pass
    return found


def shown(out):
    """What every rank printed of itself, in the order of ranks."""
    found = [json.loads(line[line.index("{") :]) for line in out.splitlines() if '"argv"' in line]
    return sorted(found, key=lambda line: line["env"]["RANK"])


PIECES = [
    "; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "|touch pwned",
    "&& touch pwned",
    '"; touch pwned; "',
    "> pwned",
    "< /dev/null",
]
PIECES += [
    "'",
    '"',
    "''",
    "\n",
    "a\nb",
    "a\\nb",
    "\\",
    "-",
    "--",
    "-rf",
    "--hostfile=x",
    "$HOME",
    "${PATH}",
    "~",
    "*",
    "?",
    "[a]",
    "{a,b}",
    "!!",
    "#",
]
PIECES += [
    "%h",
    "%n",
    "%s",
    "a b",
    "  ",
    "\t",
    "",
    "ä",
    "日本",
    "\u202e",
    "😀",
    "\x01",
    "\x1b[31m",
    "\x1e{}",
    "\r",
    "\udcff",
    ":",
    "=",
    "a=b",
    "@",
    "^C",
]
HOSTILE = [*PIECES, *(f"{p}{q}" for p, q in zip(PIECES, PIECES[1:])), "x" * 5000, *(f"--opt={p}" for p in PIECES)][:130]


@pytest.mark.slow
def test_a_hundred_hostile_strings_arrive_as_they_are(world, tmp_path):
    """Through arguments, environment, the environment file, the folder's and the script's name; the shell behind ssh
    sees none of them.
    """
    folder = tmp_path / "a b'; touch pwned; $(touch pwned)\n\"ä"
    folder.mkdir()
    script = folder / "$(touch pwned) -x.py"
    script.write_text(Path(SCRIPT).read_text())
    env = {f"FUNCZERO_{i}": value for i, value in enumerate(HOSTILE)}
    written = {f"FUNCZERO_F{i}": value for i, value in enumerate(HOSTILE) if "\n" not in value and "\r" not in value}
    (folder / ".deepspeed_env").write_bytes(
        b"".join(os.fsencode(f"{name}={value}\n") for name, value in written.items())
    )
    code, out, err = finish(world(script.name, "show", *HOSTILE, env=env, cwd=folder))
    assert code == 0, err
    assert len(HOSTILE) > 100 and len(shown(out)) == 2
    for rank in shown(out):
        assert rank["argv"] == ["show", *HOSTILE] and rank["cwd"] == str(folder)
        assert {
            name: value for name, value in rank["env"].items() if name[9:10].isdigit() or name[9:10] == "F"
        } == env | written
    assert not list(tmp_path.rglob("pwned")) and not Path("/pwned").exists()
    said = (tmp_path / "ssh.log").read_text().splitlines()
    assert sorted(said) == [
        f"-T -o BatchMode=yes -o ConnectTimeout=10 -- {host} {sys.executable} -m funczero.launch.node"
        for host in ("127.0.0.2", "127.0.0.3")
    ]


@pytest.mark.parametrize("text", HOSTILE[:60])
def test_hostile_hosts_and_filters_are_refused(text):
    from funczero.launch.hostfile import choose, parse_hostfile

    with pytest.raises(ValueError):
        choose({"worker-1": 2}, include=f"{text}@worker-1:{text}")
    try:
        hosts = parse_hostfile(f"h{text} slots=1\n{text}h slots=1\n")
    except ValueError:
        return
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789.-_@:[]%")
    assert all(set(host.lower()) <= allowed and not host.startswith("-") for host in hosts)


def test_a_dying_rank_ends_all_with_its_code_and_its_traceback_last(world, tmp_path):
    code, out, err = finish(world(SCRIPT, "die", "1"))
    assert code == 1 and time.time() - (tmp_path / "died").stat().st_mtime < 15
    lines = err.splitlines()
    assert "funczero launch: rank 1 on 127.0.0.3 failed with exit code 1" in lines, err
    at = lines.index("funczero launch: rank 1 on 127.0.0.3 failed with exit code 1")
    assert (
        lines[at + 1] == "Traceback (most recent call last):"
        and lines[-1] == "RuntimeError: rank 1 is unwell"
        and err.count("Traceback") == 1
    )
    assert world.left() == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "last"),
    [
        (("exit", "0", "41"), 41, "rank 0 on 127.0.0.2 failed with exit code 41"),
        (("kill", "1"), 137, "rank 1 on 127.0.0.3 was ended by SIGKILL"),
        (("deaf", "1"), 3, "rank 1 on 127.0.0.3 failed with exit code 3"),
    ],
)
def test_the_exit_code_is_the_first_failures(world, words, code, last):
    got, _, err = finish(world(SCRIPT, *words))
    assert got == code and last in err.splitlines()[-1] and world.left() == {}


@pytest.mark.slow
def test_a_rank_that_sigterm_does_not_end_is_killed_after_three_seconds(world):
    """Measured from the end of the one that it is killed for; the upper bound is the machine's, not the launcher's."""
    process = world("--num_gpus=2", SCRIPT, "deaf", "1", hostfile=False)
    ready(process, 1, b"going")
    since = time.monotonic()
    assert finish(process)[0] == 3 and 2.9 < time.monotonic() - since < 15 and world.left() == {}


@pytest.mark.slow
def test_a_host_that_is_down_is_named(world, tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.2 slots=1\ndown-1 slots=1\n")
    code, _, err = finish(world(SCRIPT, "daemon"))
    assert (
        code == 255
        and err.splitlines()[-1]
        == "funczero launch: host down-1 could not run its part: ssh: connect to host down-1 port 22: No route to host"
    )
    assert world.left() == {}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGKILL, -9)])
def test_the_end_of_the_launcher_ends_everything(world, number, code):
    process = world(SCRIPT, "daemon")
    ready(process, 2)
    process.send_signal(number)
    assert finish(process)[0] == code
    since = time.monotonic()
    while world.left():
        assert time.monotonic() - since < 5
        time.sleep(0.05)


def roles(launcher, mark):
    """The processes of a run on one host, by what they are there for.

    A program that was just started has no words for a moment, so it may take a few looks.
    """
    until(lambda: len(marked(mark)) == 8 and all(words for _, words in marked(mark).values()), 10)
    found, below = marked(mark), lambda pid, word: [
        p for p, (parent, words) in sorted(found.items()) if parent == pid and word in words
    ]
    (keeper,) = below(launcher, "funczero.launch.node")
    (guard,) = below(keeper, "funczero.launch.node")
    (agent,) = below(guard, "funczero.launch.node")
    ranks = below(agent, "launched.py")
    return {
        "launcher": launcher,
        "keeper": keeper,
        "guard": guard,
        "agent": agent,
        "rank 0": ranks[0],
        "rank 1": ranks[1],
        "a rank's child": below(ranks[0], "sleep")[0],
    }


@pytest.mark.parametrize(
    "who",
    [
        pytest.param(who, marks=pytest.mark.slow)
        for who in ("guard", "launcher", "keeper", "agent", "rank 0", "a rank's child")
    ],
)
def test_whoever_is_killed_nothing_is_left(world, tmp_path, who):
    """Neither the ranks, nor their children that left the session, nor a folder; and the launcher says that it was not
    well.
    """
    mark = f"FUNCZERO_MARK={tmp_path}"
    process = world("--num_gpus=2", SCRIPT, "daemon", hostfile=False)
    ready(process, 2)
    there = roles(process.pid, mark)
    os.kill(there[who], signal.SIGKILL)
    if who == "a rank's child":  # the run goes on
        time.sleep(0.5)
        assert process.poll() is None and there["rank 0"] in marked(mark)
        process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    left = lambda: (marked(mark), os.listdir(tmp_path / "tmp"))
    until(lambda: not any(left()), 60, left)
    last = err.splitlines()[-1] if err else ""
    assert {
        "launcher": code == -9,
        "keeper": code == 255 and "host localhost was lost: its connection ended with status 137" in last,
        "guard": code == 255 and "host localhost was lost: its connection ended with status 137" in last,
        "agent": code == 1 and "torchrun's agent ended with status 137" in last,
        "rank 0": code == 137 and "rank 0 on localhost was ended by SIGKILL" in last,
        "a rank's child": code == 130,
    }[who], (code, err)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_reaches_every_rank(world, number):
    process = world(SCRIPT, "save")
    ready(process, 2)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 0 and out.count(f"saved after {number.name}") == 2 and "is passed on to every rank" in err


@pytest.mark.slow
def test_torchrun_restarts_ranks(world):
    code, out, err = finish(world("--max_restarts=1", SCRIPT, "once"))
    assert code == 0, err
    assert [rank["env"]["RANK"] for rank in shown(out)] == [
        "0",
        "0",
        "1",
        "1",
    ] and "rank 0 on 127.0.0.2 ended with code 7; torchrun starts the ranks again" in err
    assert finish(world("--max_restarts=1", "--num_gpus=2", SCRIPT, "exit", "0", "5", hostfile=False))[0] == 5


@pytest.mark.slow
def test_one_host_without_a_hostfile(world):
    env = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    code, out, err = finish(
        world("--include=localhost:0,2", "--pass_local_rank", SCRIPT, "--deepspeed", env=env, hostfile=False)
    )
    assert code == 0, err
    assert [r["argv"] for r in shown(out)] == [["--local_rank=0", "--deepspeed"], ["--local_rank=1", "--deepspeed"]]
    want = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
        "CUDA_VISIBLE_DEVICES": "4,6",
    }
    assert all(r["env"].items() >= want.items() for r in shown(out))


@pytest.mark.slow
def test_output_is_prefixed_or_written_down(world, tmp_path):
    code, out, err = finish(world("--num_gpus=2", SCRIPT, "shrug", hostfile=False))
    assert (
        code == 0
        and sorted(out.splitlines()) == ["[rank 0] and on", "[rank 1] and on"]
        and err.count("ValueError: a small matter") == 2
    )
    code, out, err = finish(world("--num_gpus=2", "--log_dir=logs", SCRIPT, "shrug", hostfile=False))
    assert (code, out, err) == (0, "", "") and "and on" in (tmp_path / "logs" / "rank1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["absl", "argparse"])
def test_scripts_keep_their_flags(world, tmp_path, script):
    body = {
        "absl": (
            "from absl import app, flags\nflags.DEFINE_float('lr', 0, 'rate')\napp.run(lambda argv: print('ready',"
            " flags.FLAGS.lr, argv[1:]))\n"
        ),
        "argparse": (
            "import argparse\np = argparse.ArgumentParser()\np.add_argument('--lr', type=float)\np.add_argument('rest',"
            " nargs='*')\na = p.parse_args()\nprint('ready', a.lr, a.rest)\n"
        ),
    }
    (tmp_path / "script.py").write_text(body[script])
    code, out, err = finish(world("--num_gpus=2", "script.py", "--lr=0.5", "x", hostfile=False))
    assert code == 0 and out.count("ready 0.5 ['x']") == 2, err


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_each_host_can_be_started_by_hand(world, restarts):
    port = free_port()
    both = [world("--no_ssh", f"--node_rank={n}", f"--max_restarts={restarts}", SCRIPT, port=port) for n in (0, 1)]
    for n, process in enumerate(both):
        code, out, err = finish(process)
        assert code == 0 and [r["env"]["RANK"] for r in shown(out)] == [str(n)], err
