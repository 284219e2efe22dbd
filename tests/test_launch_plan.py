"""The launcher before anything runs: flags, plans, command lines, environments, what is shown."""

from __future__ import annotations

import base64
import json
import os
import shlex
import zlib

import pytest

from funczero.launch import job as jobs
from funczero.launch.flags import FLAGS, REFUSED, Options, hint, parse
from funczero.launch.orders import devices
from funczero.launch.report import Failure, Report
from funczero.launch.run import main
from funczero.launch.transports import describe, node_command, pdsh_command, rank_launcher

TWO = "worker-1 slots=2\nworker-2 slots=4\n"


@pytest.fixture
def plan(tmp_path):
    """A plan of a command line, with a hostfile of two hosts unless it is another text."""

    def make(*words, text=TWO, environ=None, script=("train.py",)):
        (tmp_path / "hosts").write_text(text)
        return jobs.make_plan(
            parse([f"--hostfile={tmp_path / 'hosts'}", "--python=python3", *words, *script]),
            environ or {},
            str(tmp_path),
        )

    return make


def test_every_option_is_a_field_and_every_field_an_option():
    names = {name.removeprefix("--") for names, _ in FLAGS for name in names}
    accepted = {
        "no_local_rank",
        "no_ssh_check",
        "num_accelerators",
        "enable_each_rank_log",
        "-H",
        "-i",
        "-e",
        "-m",
        "-q",
    }
    assert names - accepted == set(Options._fields) - {"script", "args"} and not names & {
        n.removeprefix("--") for n in REFUSED
    }


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ("-H F -i worker-1 train.py", {"include": "worker-1", "hostfile": "F"}),
        ("-e worker-1@worker-2:0 -H F x.py", {"exclude": "worker-1@worker-2:0"}),
        (
            "--num_nodes 2 --num_gpus=4 --master_addr h --master_port 7 x.py",
            {"num_nodes": 2, "num_gpus": 4, "master_addr": "h", "master_port": 7},
        ),
        ("--num_accelerators 3 x.py", {"num_gpus": 3}),
        ("--launcher PDSH x.py", {"launcher": "pdsh"}),
        ("--no_local_rank --no_ssh_check --force_multi x.py", {"force_multi": True}),
        ("--enable_each_rank_log logs x.py", {"log_dir": "logs"}),
        ("--module pkg.train", {"module": True, "script": "pkg.train"}),
        ("--no_python ./run.sh", {"no_python": True, "script": "./run.sh"}),
    ],
)
def test_deepspeeds_names_work(words, want):
    found = parse(words.split())._asdict()
    assert {name: found[name] for name in want} == want


def test_what_follows_the_script_is_the_scripts():
    words = ["--deepspeed", "--deepspeed_config", "ds.json", "--num_gpus=3", "--", "-H", "", "--lr=1 e"]
    o = parse(["--num_gpus", "2", "client_entry.py", *words])
    assert o.args == tuple(words) and (o.script, o.num_gpus) == ("client_entry.py", 2)
    assert (
        hint(o)
        == "--num_gpus stands behind client_entry.py and belongs to it; an option of funczero launch stands in front of"
        " the script"
    )
    assert hint(parse(["x.py", "--deepspeed", "--lr", "1"])) == ""


def test_ranks_are_dealt_host_by_host(plan):
    p = plan()
    assert [(n.host, n.slots, n.rank, n.first) for n in p.nodes] == [
        ("worker-1", (0, 1), 0, 0),
        ("worker-2", (0, 1, 2, 3), 1, 2),
    ]
    assert (p.world, p.master_addr, p.master_port) == (6, "worker-1", 29500)
    p = plan("--include=worker-2:1,3")
    assert [(n.host, n.slots, n.first) for n in p.nodes] == [("worker-2", (1, 3), 0)] and (
        p.master_addr,
        p.master_port,
    ) == ("127.0.0.1", 0)


def test_a_lost_host_leaves_the_same_run_on_the_others(plan):
    p = plan("--master_addr=10.0.0.1")
    q = jobs.without(p, {"worker-1"})
    assert (
        [(n.host, n.rank, n.first) for n in q.nodes] == [("worker-2", 0, 0)]
        and q.world == 4
        and q.master_addr == "127.0.0.1"
        and q.run != p.run
    )
    assert jobs.without(p, {"worker-2"}).master_addr == "10.0.0.1"


@pytest.mark.parametrize(
    ("host", "bare", "port"),
    [
        ("h", "h", ""),
        ("u@h", "h", ""),
        ("h:22", "h", "22"),
        ("u@h:22", "h", "22"),
        ("[::1]:22", "::1", "22"),
        ("[fe80::1]", "fe80::1", ""),
        ("fe80::1", "fe80::1", ""),
    ],
)
def test_addresses_of_hosts(host, bare, port):
    assert (jobs.bare(host), jobs.port_of(host)) == (bare, port)


def test_the_remote_command_is_constant(plan):
    p = plan(
        "--ssh_port=2200",
        "--launcher_args=-o 'User=a b'",
        text="worker-1 slots=1\nroot@worker-2:22 slots=1\n",
        script=("$(x).py", "; rm"),
        environ={"NCCL_SECRET": "$(y)"},
    )
    one, two = (node_command(p, node) for node in p.nodes)
    common = ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-p"]
    assert list(one.argv) == [*common, "2200", "-o", "User=a b", "--", "worker-1", "python3 -m funczero.launch.node"]
    assert list(two.argv) == [*common, "22", "-o", "User=a b", "--", "root@worker-2", "python3 -m funczero.launch.node"]
    assert one.stdin.count(b"\n") == 1 and one.env == {}
    told = json.loads(one.stdin)
    assert (told["script"], told["args"], told["env"]["NCCL_SECRET"]) == ("$(x).py", ["; rm"], "$(y)")


def test_pdsh_gets_letters_and_digits(plan):
    command = pdsh_command(plan("--launcher=pdsh", script=("train.py", "a b", "'$(x)")))
    front, (remote,) = command.argv[:-1], command.argv[-1:]
    assert list(front) == ["pdsh", "-S", "-R", "ssh", "-f", "1024", "-w", "worker-1,worker-2"]
    *words, told = remote.split(" ")
    assert words == ["python3", "-m", "funczero.launch.node", "%n"] and set(told) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_="
    )
    orders = json.loads(zlib.decompress(base64.urlsafe_b64decode(told)))
    assert [o["host"] for o in orders] == ["worker-1", "worker-2"] and orders[1]["args"] == ["a b", "'$(x)"]


COMMANDS = {
    "openmpi": (
        "mpirun -n 4 --host worker-1:2,worker-2:2 -wdir CWD --tag-output -x PYTHONPATH -x MASTER_ADDR -x MASTER_PORT"
        " --bind-to none python3 -u train.py a"
    ),
    "mpich": (
        "mpirun -n 4 -ppn 2 -hosts worker-1,worker-2 -wdir CWD -prepend-rank -genvlist"
        " PYTHONPATH,MASTER_ADDR,MASTER_PORT --bind-to none python3 -u train.py a"
    ),
    "impi": (
        "mpirun -n 4 -ppn 2 -hosts worker-1,worker-2 -wdir CWD -prepend-rank -genvlist"
        " PYTHONPATH,MASTER_ADDR,MASTER_PORT,I_MPI_PIN --bind-to none python3 -u train.py a"
    ),
    "mvapich": (
        "mpirun -n 4 -ppn 2 -hosts worker-1,worker-2 -wdir CWD -prepend-rank -genvlist"
        " PYTHONPATH,MASTER_ADDR,MASTER_PORT,MV2_ENABLE_AFFINITY,MV2_SUPPORT_DL --bind-to none python3 -u train.py a"
    ),
    "slurm": (
        "srun --kill-on-bad-exit=1 --export=ALL --chdir=CWD --label --ntasks=4 --nodes=2 --ntasks-per-node=2"
        " --nodelist=worker-1,worker-2 --bind-to none python3 -u train.py a"
    ),
}


@pytest.mark.parametrize("launcher", COMMANDS)
def test_launchers_that_start_ranks(plan, monkeypatch, launcher):
    monkeypatch.setenv("PATH", "")
    p = plan(f"--launcher={launcher}", "--num_gpus=2", "--launcher_args=--bind-to none", script=("train.py", "a"))
    command = rank_launcher(p)
    assert shlex.join(command.argv).replace(p.cwd, "CWD") == COMMANDS[launcher]
    assert command.env["MASTER_ADDR"] == "worker-1" and command.stdin is None


def test_slurm_without_a_hostfile_asks_for_what_was_asked(tmp_path):
    for words, want in (((), ""), (("--num_nodes=2", "--num_gpus=8"), " --nodes=2 --ntasks-per-node=8")):
        p = jobs.make_plan(parse(["--launcher=slurm", "--python=python3", *words, "x.py"]), {}, "/w")
        command = rank_launcher(p)
        assert (
            " ".join(command.argv) == f"srun --kill-on-bad-exit=1 --export=ALL --chdir=/w --label{want} python3 -u x.py"
            and "MASTER_ADDR" not in command.env
        )


def test_other_hosts_get_what_deepspeed_exports(tmp_path, plan):
    environ = {
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "PYTHONPATH": "/a:/b",
        "PYTHONHASHSEED": "1",
        "OMP_NUM_THREADS": "2",
        "SECRET": "x",
        "PATH": "/bin",
    }
    env = jobs.export_environment(environ, str(tmp_path))
    assert env == {k: environ[k] for k in ("NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "PYTHONHASHSEED", "OMP_NUM_THREADS")} | {
        "PYTHONPATH": f"{tmp_path}:/a:/b"
    }


def test_the_second_environment_file_wins(tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "A=1\nB=1\n"), (here, "\n# a comment\nB=2 'x' $(y)\nC=\nD=a=b\r\n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text)
    assert jobs.env_file({"HOME": str(home)}, str(here)) == {"A": "1", "B": "2 'x' $(y)", "C": "", "D": "a=b"}
    (here / "other").write_text("E=1\n")
    assert jobs.env_file({"HOME": str(home), "DS_ENV_FILE": "other"}, str(here)) == {"E": "1"}


@pytest.mark.parametrize(
    ("slots", "visible", "want"),
    [([0, 1], None, "0,1"), ([1], "4,5", "5"), ([0, 1], "GPU-a, GPU-b,", "GPU-a,GPU-b"), ([0, 5], "", "")],
)
def test_devices_compose(slots, visible, want):
    assert devices(slots, visible) == want


def test_a_dry_run_says_everything(plan):
    text = describe(plan("--pass_local_rank", script=("train.py", "a b")))
    lines = text.splitlines()
    assert (
        lines[0] == "worker-1: ranks 0 to 1 of 6 on slots 0,1"
        and lines[5] == "worker-2: ranks 2 to 5 of 6 on slots 0,1,2,3"
    )
    assert (
        lines[1]
        == "  start  ssh -T -o BatchMode=yes -o ConnectTimeout=10 -- worker-1 'python3 -m funczero.launch.node'"
    )
    assert json.loads(lines[2].removeprefix("  stdin  "))["args"] == ["a b"]
    run = json.loads(lines[2].removeprefix("  stdin  "))["run"]
    assert lines[3].startswith(
        "  agent  torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=funczero --rdzv-endpoint=worker-1:29500"
        f" --rdzv-id={run} --rdzv-conf=rank=0 "
    )
    assert lines[4] == "  rank   python3 -u train.py 'a b' (and --local_rank=N)"


def test_without_ssh_one_host_is_started(plan):
    p = plan("--no_ssh", "--node_rank=1")
    assert (
        "worker-2: ranks 2 to 5 of 6" in describe(p)
        and "worker-1: " not in describe(p)
        and "ssh" not in node_command(p, p.nodes[1]).argv
    )


def test_restarts_are_torchruns(plan):
    p = plan("--max_restarts=3")
    words = jobs.torchrun_arguments(jobs.job(p, p.nodes[1]), "python3", "entry.py", "F")
    want = [
        "--rdzv-backend=funczero",
        "--rdzv-endpoint=worker-1:29500",
        f"--rdzv-id={p.run}",
        "--rdzv-conf=rank=1",
        "--local-addr=worker-2",
        "--max-restarts=3",
    ]
    assert words[2:8] == want


TRACE = ["Traceback (most recent call last):", '  File "x.py", line 1', "ValueError: bad"]


def test_the_cause_is_printed_last_and_once(capsys):
    report = Report(2, 4)
    report.lines("worker-1", 0, ["before", *TRACE[:1]], True)
    report.lines("worker-1", 0, [*TRACE[1:2], "RuntimeError: connection closed"], True)
    report.lines("worker-2", 3, TRACE, True)
    report.lines("worker-2", 3, ["more output"], False)
    first = report.failed([Failure(2.0, "worker-1", 0, 1), Failure(1.0, "worker-2", 3, 9)])
    out, err = capsys.readouterr()
    assert first.code == 9 and out == "[worker-2:3] more output\n"
    assert err.splitlines() == [
        "[worker-1:0] before",
        "funczero launch: after it rank 0 on worker-1 failed with exit code 1: RuntimeError: connection closed",
        "funczero launch: rank 3 on worker-2 failed with exit code 9",
        *TRACE,
    ]


def test_a_traceback_that_nobody_dies_of_is_shown_after_a_moment(capsys):
    report = Report(1, 2)
    report.lines("h", 1, TRACE, True)
    assert capsys.readouterr().err == ""
    report.release(1e12)
    assert capsys.readouterr().err.splitlines() == [f"[rank 1] {line}" for line in TRACE]


def test_a_lost_host_is_the_cause_whatever_its_ranks_neighbours_say(capsys):
    first = Report(2, 2).failed(
        [Failure(1.0, "worker-1", 0, 1), Failure(2.0, "worker-2", None, 255, "gone", lost=True)]
    )
    assert (
        first.host == "worker-2"
        and capsys.readouterr().err.splitlines()[-1] == "funczero launch: host worker-2 was lost: gone"
    )


def test_each_rank_has_its_own_file(tmp_path, capsys):
    report = Report(2, 2, str(tmp_path / "logs"))
    report.lines("worker-1", 0, ["a"], False)
    report.lines("worker-2", 1, ["b", *TRACE], True)
    report.failed([Failure(1.0, "worker-2", 1, 1)])
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[1:] == TRACE
    assert (tmp_path / "logs/rank0.log").read_text() == "a\n" and (
        tmp_path / "logs/rank1.log"
    ).read_text().splitlines() == ["b", *TRACE]


def test_help_and_dry_run_are_commands(capsys):
    assert main(["--help"]) == 0 and "--hostfile" in capsys.readouterr().out
    assert (
        main(["--num_gpus=2", "--dry_run", os.path.basename(__file__)]) == 0
        and "ranks 0 to 1 of 2" in capsys.readouterr().out
    )
