"""The launcher refuses in one sentence: what is wrong, where, what to write instead."""

from __future__ import annotations

import socket

import pytest

from funczero.launch import job as jobs
from funczero.launch.flags import parse
from funczero.launch.hostfile import choose, parse_hostfile
from funczero.launch.orders import devices, prepare
from funczero.launch.run import main
from funczero.launch.transports import describe
from funczero.world import environment

HOSTS = {"worker-1": 4, "worker-2": 2}

LINES = {
    "worker-1": "F, line 1: 'worker-1' is no host; write NAME slots=N, for example worker-1 slots=4",
    "# x\nworker-1 slots=4x": "F, line 2: 'worker-1 slots=4x' is no host; write NAME slots=N, for example worker-1 slots=4",
    "$(reboot) slots=1": "F, line 1: '$(reboot)' is no host name; write letters, digits, '.', '-', '_', and user@ or :port around them",
    "-oProxyCommand=x slots=1": "F, line 1: '-oProxyCommand=x' is no host name; write letters, digits, '.', '-', '_', and user@ or :port around them",
    "a slots=1\na slots=2": "F, line 2: 'a' is listed a second time; write it once, with all its slots",
    "# nobody": "F: no host in it; write a line for each, for example worker-1 slots=4",
}  # fmt: skip


@pytest.mark.parametrize("text", LINES)
def test_hostfiles(text):
    with pytest.raises(ValueError) as caught:
        parse_hostfile(text, "F")
    assert str(caught.value) == LINES[text]


FILTERS = {
    "both": (
        {"include": "worker-1", "exclude": "worker-2"},
        "--include and --exclude: only one of them can be given; --include names all that take part",
    ),
    "numbers too": (
        {"include": "worker-1", "num_nodes": 1},
        (
            "--num_nodes and --num_gpus count from the first slot, so they go with neither --include nor --exclude;"
            " name the slots, for example worker-1:0,1"
        ),
    ),
    "a host of nobody's": (
        {"include": "nope:0"},
        "--include=nope:0: no host 'nope' in the hostfile; it lists worker-1, worker-2",
    ),
    "a slot it lacks": (
        {"exclude": "worker-2:2"},
        "--exclude=worker-2:2: worker-2 has no slot 2; the hostfile gives it slots=2, counted from 0",
    ),
    "a range": (
        {"include": "worker-1:0-2"},
        "--include=worker-1:0-2: '0-2' is no slot of worker-1; write numbers with commas, for example worker-1:0,2",
    ),
    "too many hosts": (
        {"num_nodes": 3},
        "--num_nodes=3: the hostfile has 2 hosts; write at most that many, or list more hosts",
    ),
    "too many slots": (
        {"num_gpus": 3},
        "--num_gpus=3: worker-2 has slots=2; write at most that many, or more slots in the hostfile",
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(name):
    how, message = FILTERS[name]
    with pytest.raises(ValueError) as caught:
        choose(HOSTS, **how)
    assert str(caught.value) == message


TWO = "worker-1 slots=2\nworker-2 slots=4\n"
COMMANDS = {
    "no script": ("", "", "there is no script; write funczero launch [options] train.py [its arguments]"),
    "a typo": ("--num_gpu 2 x.py", "", "'--num_gpu' is no option; write --num_gpus"),
    "no value": ("--hostfile", "", "argument -H/--hostfile: expected one argument; funczero launch --help lists the options"),
    "deepspeed's own": ("--elastic_training x.py", "", "--elastic_training is an option of deepspeed's that does nothing here; leave it out: write --max_restarts=N"),
    "cores without binding": ("--bind_core_list=0-3 x.py", "", "--bind_core_list names cores that nobody is bound to; add --bind_cores_to_rank"),
    "no core": ("--bind_cores_to_rank --bind_core_list=0,a x.py", "", "--bind_core_list=0,a: 'a' is no core and no range; write for example 0,2-4,8"),
    "cores that overlap": ("--bind_cores_to_rank --bind_core_list=0,2-6,5-9 x.py", "", "--bind_core_list=0,2-6,5-9: '5-9' does not rise; name every core once, in rising order"),
    "cores that fall": ("--bind_cores_to_rank --bind_core_list=1,6-2 x.py", "", "--bind_core_list=1,6-2: '6-2' does not rise; name every core once, in rising order"),
    "two binders": ("--bind_cores_to_rank --launcher=mpich x.py", "", "--bind_cores_to_rank: --launcher=mpich binds by itself; name its own option in --launcher_args, or use --launcher=ssh"),
    "nobody knows the cores": ("--bind_cores_to_rank --launcher=impi x.py", "", "--bind_cores_to_rank: --launcher=impi is told every rank's cores; add --bind_core_list=0-7"),
    "a shell that is not there": ("--venv_script f --launcher=slurm x.py", "", "--venv_script: --launcher=slurm starts the ranks without a shell; name the environment's interpreter with --python"),
    "two kinds of script": ("--module --no_python x", "", "--module and --no_python: a script is a module's name or a program, not both; leave one out"),
    "no_ssh alone": ("--no_ssh x.py", "", "--no_ssh and --node_rank=N go together: N says which host of the hostfile this one is, counted from 0"),
    "a port that is none": ("--master_port=0 x.py", "", "--master_port=0 is no port; write a number from 1 to 65535"),
    "restarts below zero": ("--max_restarts=-1 x.py", "", "--max_restarts=-1: write 0 or more"),
    "impatience": ("--lost_after=1 x.py", "", "--lost_after=1.0: hosts speak once a second; write 3 seconds or more"),
    "hosts without a file": ("--num_nodes=2 x.py", "", "--num_nodes=2: without a hostfile there is this machine alone; list the hosts in a file and name it with --hostfile"),
    "no slot left": ("--exclude=worker-1@worker-2 x.py", TWO, "--exclude leaves no slot, so there is nothing to run there; write slots=1 or more, or exclude less"),
    "an empty host": ("x.py", "worker-1 slots=0\n", "worker-1 has slots=0, so there is nothing to run there; write slots=1 or more, or exclude less"),
    "a node that is not there": ("--no_ssh --node_rank=2 x.py", TWO, "--node_rank=2: there are 2 hosts, counted from 0; write at most 1"),
    "everybody's localhost": (
        "x.py",
        "localhost slots=1\nworker-2 slots=1\n",
        "rank 0 is on localhost, a name that means another machine on every host; add --master_addr=ADDRESS, as the other hosts reach this one",
    ),
    "a python for a shell": (
        "--python=/a;b/python x.py",
        TWO,
        "--python=/a;b/python: a shell on the hosts would read this path as more than one; name an interpreter whose path has letters, digits and ./_+- alone",
    ),
    "an open quotation": ("--launcher_args='a x.py", TWO, "--launcher_args='a: No closing quotation; close every quotation"),
    "pdsh and patterns": ("--launcher=pdsh x.py", "[fe80::1]:22 slots=1\na slots=1\n", "--launcher=pdsh: it reads '[fe80::1]' as a pattern; give the host a plain name, or use --launcher=ssh"),
    "pdsh and ports": ("--launcher=pdsh x.py", "a:1 slots=1\nb:2 slots=1\n", "--launcher=pdsh: it knows one port for all hosts; use --launcher=ssh, or --ssh_port"),
    "odd slots for mpi": (
        "--launcher=openmpi --include=worker-2:1,3 x.py",
        TWO,
        "--launcher=openmpi: it starts slots 0 to n-1 of a host, not worker-2:1,3; use --launcher=ssh for these",
    ),
    "users for mpi": (
        "--launcher=mpich x.py",
        "root@a slots=1\n",
        "--launcher=mpich: it takes no user or port with a host; put those of 'root@a' into ~/.ssh/config, or use --launcher=ssh",
    ),
    "a colon for mpi": ("--launcher=openmpi x.py a : b", TWO, "--launcher=openmpi: it reads an argument that is ':' alone as the start of another program; use --launcher=ssh"),
    "restarts for slurm": ("--launcher=slurm --max_restarts=1 x.py", TWO, "--launcher=slurm: it has neither --pass_local_rank nor --max_restarts; use --launcher=ssh"),
    "uneven mpich": ("--launcher=mpich x.py", TWO, "--launcher=mpich: it starts as many processes on every host, but the slots are [2, 4]; use --num_gpus=2, or --launcher=ssh"),
    "uneven slurm": ("--launcher=slurm x.py", TWO, "--launcher=slurm: it starts as many tasks on every host, but the slots are [2, 4]; use --num_gpus=2, or --launcher=ssh"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines(tmp_path, name):
    words, text, message = COMMANDS[name]
    (tmp_path / "hosts").write_text(text)
    front = [f"--hostfile={tmp_path / 'hosts'}"] if text else []
    with pytest.raises(ValueError) as caught:
        describe(jobs.make_plan(parse([*front, *words.split()]), {}, str(tmp_path)))
    assert str(caught.value) == message


def test_a_hostfile_that_was_named_is_there(capsys):
    assert main(["--hostfile=/no/hosts", "x.py"]) == 2
    said = (
        "--hostfile=/no/hosts: cannot be read (No such file or directory); name a file of lines such as worker-1"
        " slots=4, or leave --hostfile out for this machine alone"
    )
    assert capsys.readouterr().err == f"funczero launch: {said}\n"


def test_a_tool_that_is_not_installed(monkeypatch, capsys, tmp_path):
    (tmp_path / "hosts").write_text(TWO)
    monkeypatch.setenv("PATH", "")
    assert main([f"--hostfile={tmp_path / 'hosts'}", "--launcher=slurm", "--num_gpus=2", "x.py"]) == 2
    assert (
        capsys.readouterr().err
        == "funczero launch: srun is not installed on this machine; install it, or choose another --launcher\n"
    )


def test_an_environment_file(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("A=1\nexport B=2\n")
    with pytest.raises(ValueError) as caught:
        jobs.env_file({}, str(tmp_path))
    assert (
        str(caught.value)
        == f"{tmp_path}/.deepspeed_env, line 2: 'export B=2' is no setting; write NAME=VALUE, without export and"
        " without quotes"
    )


def test_a_node_says_why_it_cannot_start(tmp_path, monkeypatch):
    orders = {"max_restarts": 0, "cwd": str(tmp_path / "none")}
    orders |= {
        "script": "x.py",
        "module": False,
        "no_python": False,
        "as_deepspeed": False,
        "slots": [0],
        "env": {},
        "node_rank": 1,
        "master_addr": "no host",
        "master_port": 1,
    }
    monkeypatch.chdir(tmp_path)

    def said(**changed):
        with pytest.raises(ValueError) as caught:
            prepare(orders | changed)
        return str(caught.value)

    assert (
        said()
        == f"the working folder '{tmp_path}/none' is not there (No such file or directory); every host needs it, so"
        " start from a shared one"
    )
    assert said(cwd=str(tmp_path)) == f"the script 'x.py' is not in {tmp_path}; every host needs it at the same place"
    with monkeypatch.context() as m:
        m.setattr("os.environ", {})
        for rank in (0, 1):  # rank 0's own host resolves it as well: nobody retries a name in silence
            told = said(cwd=str(tmp_path), module=True, node_rank=rank, master_addr="nosuch.invalid", nodes=2)
            here = f"means nothing on {socket.gethostname()} ("
            assert told.startswith(f"the address of rank 0's host, 'nosuch.invalid', {here}") and told.endswith(
                "); add --master_addr=ADDRESS that all hosts know"
            )


def test_devices_that_are_not_shown():
    with pytest.raises(ValueError) as caught:
        devices([0, 2], "4,5")
    assert (
        str(caught.value)
        == "slot 2 is asked for, but CUDA_VISIBLE_DEVICES='4,5' shows 2 devices here; use slots below 2"
    )


WORLDS = {
    "hosts without an address": (
        {
            "OMPI_COMM_WORLD_RANK": "0",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        (
            "init_distributed: OpenMPI started 4 processes on more than one host and says no address of rank 0's; add"
            " -x MASTER_ADDR=HOST to mpirun, HOST being the host of rank 0 as the others reach it"
        ),
    ),
    "a rank outside": (
        {"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"},
        (
            "init_distributed: SLURM_PROCID='4' and SLURM_STEP_NUM_TASKS='4' are not a rank below a world size; start"
            " with SLURM"
        ),
    ),
}


@pytest.mark.parametrize("name", WORLDS)
def test_worlds(name):
    environ, message = WORLDS[name]
    with pytest.raises(RuntimeError) as caught:
        environment.read(environ)
    assert str(caught.value) == message
