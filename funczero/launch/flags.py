"""The command line of `funczero launch`: DeepSpeed's names, everything behind the script untouched."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from funczero.launch.cores import parse_cores
from funczero.launch.error import LaunchError

LAUNCHERS = ("ssh", "pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm")
LEVELS = ("debug", "info", "warning", "error", "critical")
HOSTFILE = "/job/hostfile"  # DeepSpeed's default: taken when it is there

FLAGS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (
        ("-H", "--hostfile"),
        {
            "default": "",
            "metavar": "F",
            "help": (
                f"lines NAME slots=N, shared with OpenMPI; default: {HOSTFILE} where it is there, else this machine"
            ),
        },
    ),
    (
        ("-i", "--include"),
        {"default": "", "metavar": "X", "help": "hosts and slots to use, for example worker-1:0,2@worker-2"},
    ),
    (("-e", "--exclude"), {"default": "", "metavar": "X", "help": "hosts and slots to leave out"}),
    (("--num_nodes",), {"type": int, "default": -1, "metavar": "N", "help": "the first N hosts"}),
    (
        ("--num_gpus", "--num_accelerators"),
        {
            "type": int,
            "default": -1,
            "metavar": "N",
            "help": "the first N slots of each host; on a CPU slots are processes",
        },
    ),
    (
        ("--master_addr",),
        {
            "default": "",
            "metavar": "A",
            "help": "address of rank 0's host as the others reach it; default: the first host's name",
        },
    ),
    (
        ("--master_port",),
        {"type": int, "default": None, "metavar": "P", "help": "port on it; default 29500, on one host a free one"},
    ),
    (
        ("--node_rank",),
        {
            "type": int,
            "default": -1,
            "metavar": "N",
            "help": "with --no_ssh: which host of the hostfile this one is, from 0",
        },
    ),
    (
        ("--no_ssh",),
        {
            "action": "store_true",
            "help": "start this host's processes alone; somebody runs the same command on each host",
        },
    ),
    (("--launcher",), {"type": str.lower, "default": "ssh", "choices": LAUNCHERS, "help": "what reaches the hosts"}),
    (("--launcher_args",), {"default": "", "metavar": "X", "help": "more options for it, split as a shell would"}),
    (
        ("--ssh_port",),
        {"type": int, "default": None, "metavar": "P", "help": "port of every sshd; a host's own :port goes first"},
    ),
    (
        ("--python",),
        {"default": sys.executable, "metavar": "F", "help": "the interpreter on the hosts; default: this one's path"},
    ),
    (
        ("--venv_script",),
        {
            "default": "",
            "metavar": "F",
            "help": "a file that a shell on the hosts reads first, such as venv/bin/activate",
        },
    ),
    (
        ("--bind_cores_to_rank",),
        {"action": "store_true", "help": "keep every rank on cores of its own, through numactl on the hosts"},
    ),
    (
        ("--bind_core_list",),
        {"default": "", "metavar": "L", "help": "the cores to deal, such as 0,2-4; default: all physical ones"},
    ),
    (
        ("--save_pid",),
        {
            "action": "store_true",
            "help": "while the run lasts, keep this process's id in <temporary folder>/<id>.deepspeed",
        },
    ),
    (
        ("--log_level",),
        {
            "type": str.lower,
            "default": "info",
            "choices": LEVELS,
            "help": "warning and higher: of this command's own lines those about failures alone",
        },
    ),
    (("-q", "--quiet"), {"action": "store_true", "help": "as --log_level=error"}),
    (("-m", "--module"), {"action": "store_true", "help": "the script is a module's name"}),
    (("--no_python",), {"action": "store_true", "help": "the script is a program of its own"}),
    (
        ("--as_deepspeed",),
        {
            "action": "store_true",
            "help": "in these processes and their children `import deepspeed` means funczero.deepspeed",
        },
    ),
    (
        ("--pass_local_rank",),
        {
            "action": "store_true",
            "help": "hand --local_rank=N to the script; otherwise nothing is added to its arguments",
        },
    ),
    (
        ("--log_dir", "--enable_each_rank_log"),
        {"default": "", "metavar": "D", "help": "write each rank's output to D/rank0.log, ... instead of here"},
    ),
    (
        ("--max_restarts",),
        {
            "type": int,
            "default": 0,
            "metavar": "N",
            "help": "start again after a failure, at most so often, on the hosts that are left",
        },
    ),
    (
        ("--lost_after",),
        {
            "type": float,
            "default": 15.0,
            "metavar": "S",
            "help": "seconds of silence after which a host is lost, and a host ends its processes",
        },
    ),
    (("--dry_run",), {"action": "store_true", "help": "print what would run on every host, and run nothing"}),
    (
        ("--preflight",),
        {"action": "store_true", "help": "ask every host whether the run could start, and start nothing"},
    ),
    (("--no_local_rank",), {"action": "store_true", "help": "accepted: it is the default"}),
    (
        ("--no_ssh_check",),
        {"action": "store_true", "help": "accepted: there is no check of its own, a host that is not reached is named"},
    ),
    (("--force_multi",), {"action": "store_true", "help": "reach this host as any other, through the launcher"}),
)

REFUSED = {
    "--autotuning": "funczero has no autotuning",
    "--elastic_training": "write --max_restarts=N",
}  # fmt: skip


class Options(NamedTuple):
    """What was asked for; fields as in FLAGS, then the script and what follows it."""

    hostfile: str
    include: str
    exclude: str
    num_nodes: int
    num_gpus: int
    master_addr: str
    master_port: int | None
    node_rank: int
    no_ssh: bool
    launcher: str
    launcher_args: str
    ssh_port: int | None
    python: str
    venv_script: str
    bind_cores_to_rank: bool
    bind_core_list: str
    save_pid: bool
    log_level: str
    quiet: bool
    module: bool
    no_python: bool
    as_deepspeed: bool
    pass_local_rank: bool
    log_dir: str
    max_restarts: int
    lost_after: float
    dry_run: bool
    preflight: bool
    force_multi: bool
    script: str
    args: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise LaunchError(f"{message}; funczero launch --help lists the options")


def parser() -> argparse.ArgumentParser:
    """The options in front of the script."""
    out = _Parser(
        "funczero launch",
        usage="funczero launch [options] SCRIPT [ARGUMENTS OF THE SCRIPT]",
        allow_abbrev=False,
        description=__doc__,
    )
    for names, settings in FLAGS:
        out.add_argument(*names, **settings)
    return out


def parse(argv: Sequence[str]) -> Options:
    """The command line as Options; the first word that is no option is the script, and what follows is the script's
    alone.

    Raises:
      LaunchError: an option is unknown or has no value, options contradict each other, or there is no script.

    >>> o = parse(["--num_gpus", "2", "train.py", "--num_gpus", "8", "--", "-x"])
    >>> o.num_gpus, o.script, o.args
    (2, 'train.py', ('--num_gpus', '8', '--', '-x'))
    """
    own, rest = _split(list(argv))
    found = vars(parser().parse_args(own))
    if not rest and not found["preflight"]:
        raise LaunchError("there is no script; write funczero launch [options] train.py [its arguments]")
    found = {name: found[name] for name in Options._fields[:-2]}
    out = Options(**found, script=rest[0] if rest else "", args=tuple(rest[1:]))
    _check(out)
    if not out.hostfile and os.path.exists(HOSTFILE):
        out = out._replace(hostfile=HOSTFILE)
    return out


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words in front of the script, and the others."""
    takes = {name: "action" not in settings for names, settings in FLAGS for name in names} | {
        "-h": False,
        "--help": False,
    }
    at = 0
    while at < len(argv) and argv[at].startswith("-"):
        name, equals, _ = argv[at].partition("=")
        if name in REFUSED:
            raise LaunchError(
                f"{name} is an option of deepspeed's that does nothing here; leave it out: {REFUSED[name]}"
            )
        if name not in takes:
            near = difflib.get_close_matches(name, takes, 1)
            raise LaunchError(
                f"{name!r} is no option; write {near[0] if near else 'the script, or one of funczero launch --help'}"
            )
        at += 1 + (takes[name] and not equals)
    return argv[:at], argv[at:]


def _check(o: Options) -> None:
    if o.module and o.no_python:
        raise LaunchError("--module and --no_python: a script is a module's name or a program, not both; leave one out")
    if o.no_ssh != (o.node_rank >= 0):
        raise LaunchError(
            "--no_ssh and --node_rank=N go together: N says which host of the hostfile this one is, counted from 0"
        )
    if o.master_port is not None and not 0 < o.master_port < 65536:
        raise LaunchError(f"--master_port={o.master_port} is no port; write a number from 1 to 65535")
    if o.max_restarts < 0:
        raise LaunchError(f"--max_restarts={o.max_restarts}: write 0 or more")
    if o.lost_after < 3:
        raise LaunchError(f"--lost_after={o.lost_after}: hosts speak once a second; write 3 seconds or more")
    _check_host_options(o)
    if any("\0" in word for word in (o.script, *o.args)):
        raise LaunchError(
            "an argument of the script holds a NUL character, which no process can be given; leave it out"
        )


def _check_host_options(o: Options) -> None:
    """Cores and the script before the ranks: which launchers know them."""
    if o.bind_core_list:
        parse_cores(o.bind_core_list)
        if not o.bind_cores_to_rank:
            raise LaunchError("--bind_core_list names cores that nobody is bound to; add --bind_cores_to_rank")
    if o.venv_script and o.launcher not in ("ssh", "pdsh"):
        raise LaunchError(
            f"--venv_script: --launcher={o.launcher} starts the ranks without a shell; name the environment's"
            " interpreter with --python"
        )
    if o.bind_cores_to_rank and o.launcher in ("openmpi", "mpich", "mvapich", "slurm"):
        raise LaunchError(
            f"--bind_cores_to_rank: --launcher={o.launcher} binds by itself; name its own option in --launcher_args, or"
            " use --launcher=ssh"
        )
    if o.bind_cores_to_rank and o.launcher == "impi" and not o.bind_core_list:
        raise LaunchError("--bind_cores_to_rank: --launcher=impi is told every rank's cores; add --bind_core_list=0-7")


def silent(o: Options) -> bool:
    """Are only failures said?"""
    return o.quiet or o.log_level in LEVELS[2:]


def hint(o: Options) -> str:
    """One line for an option that was written behind the script but looks like ours; '' where there is none."""
    ours = {name for names, _ in FLAGS for name in names if len(name) > 2} - {"--local_rank", "--module"}
    there = [name for word in o.args if (name := word.partition("=")[0]) in ours]
    return (
        f"{there[0]} stands behind {o.script} and belongs to it; an option of funczero launch stands in front of the"
        " script"
        if there
        else ""
    )
