"""What reaches the hosts: command lines for ssh and pdsh, which start nodes, and for OpenMPI, MPICH and its kin, and
SLURM, which start the ranks themselves.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

from funczero.launch.cores import dealt, numactl, parse_cores
from funczero.launch.error import LaunchError
from funczero.launch.flags import Options
from funczero.launch.job import Node, Plan, bare, job, port_of, rank_command, torchrun_arguments

NODE = "-m funczero.launch.node"
RANK_LAUNCHERS = ("openmpi", "mpich", "impi", "mvapich", "slurm")


class Command(NamedTuple):
    """A process to start here, and what it is told."""

    argv: tuple[str, ...]
    stdin: bytes | None  # None: it is told nothing and reads nothing
    env: dict[str, str]  # on top of this process's environment
    cwd: str | None = None


def node_command(plan: Plan, node: Node, **more: object) -> Command:
    """Start one node, here or through ssh: always the same words, the orders on standard input.

    >>> from funczero.launch.flags import parse
    >>> from funczero.launch.job import make_plan
    >>> plan = make_plan(parse(["--python=python3", "--force_multi", "train.py"]), {}, "/work")
    >>> " ".join(node_command(plan, plan.nodes[0]).argv)
    'ssh -T -o BatchMode=yes -o ConnectTimeout=10 -- localhost python3 -m funczero.launch.node'
    """
    stdin = (json.dumps(job(plan, node) | more) + "\n").encode()
    o = plan.options
    if node.local or o.no_ssh:
        here = str(Path(__file__).parents[2])
        if o.venv_script:
            return Command(("bash", "-c", _words_on_host(o)), stdin, {"PYTHONPATH": _before(here)})
        return Command((sys.executable, *NODE.split()), stdin, {}, here)
    port = port_of(node.host) or (str(o.ssh_port) if o.ssh_port else "")
    user = node.host.rpartition("@")[0]
    options = [
        "-T",
        "-o",
        "BatchMode=yes",
        "-o",
        "ConnectTimeout=10",
        *(["-p", port] if port else []),
        *_words(o.launcher_args),
    ]
    return Command(
        (
            "ssh",
            *options,
            "--",
            f"{user}@{bare(node.host)}" if user else bare(node.host),
            _words_on_host(o),
        ),
        stdin,
        {},
    )


def _words_on_host(o: Options) -> str:
    """What a shell on a host is told: the interpreter, after --venv_script the one that it finds then, unless --python
    names another.
    """
    if not o.venv_script:
        return f"{_path('--python', o.python)} {NODE}"
    python = "python" if o.python == sys.executable else _path("--python", o.python)
    return f". {_path('--venv_script', o.venv_script)} && exec {python} {NODE}"


def _path(option: str, path: str) -> str:
    """A path; the remote login shell reads it, so it may hold nothing else."""
    if not re.fullmatch(r"[A-Za-z0-9_./+][A-Za-z0-9_./+-]*", path):
        what = "an interpreter" if option == "--python" else "a file"
        raise LaunchError(
            f"{option}={path}: a shell on the hosts would read this path as more than one; name {what} whose"
            " path has letters, digits and ./_+- alone"
        )
    return path


def _before(folder: str) -> str:
    """PYTHONPATH with a folder in front."""
    return os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise LaunchError(f"--launcher_args={text}: {error}; close every quotation") from None


def pdsh_command(plan: Plan) -> Command:
    """Start all nodes through pdsh, which hands on no input: the orders are letters and digits behind the constant
    command, seen in lists of processes.
    """
    o = plan.options
    hosts = [re.sub(r":[0-9]+$", "", node.host) for node in plan.nodes]
    odd = [host for host in hosts if re.search(r"[\[\]:%]", host)]
    if odd:
        raise LaunchError(
            f"--launcher=pdsh: it reads {odd[0]!r} as a pattern; give the host a plain name, or use --launcher=ssh"
        )
    orders = [job(plan, node) | {"lost_after": None} for node in plan.nodes]
    told = base64.urlsafe_b64encode(zlib.compress(json.dumps(orders).encode())).decode()
    if len(told) > 100_000:
        raise LaunchError(
            f"--launcher=pdsh: arguments and environment take {len(told)} bytes of its command line, more than fits;"
            " use --launcher=ssh"
        )
    ports = {port_of(node.host) or str(o.ssh_port or "") for node in plan.nodes}
    if len(ports) > 1:
        raise LaunchError("--launcher=pdsh: it knows one port for all hosts; use --launcher=ssh, or --ssh_port")
    given = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    ssh = " ".join(
        [
            *([given] if given else []),
            "-T -o BatchMode=yes -o ConnectTimeout=10",
            *(f"-p {port}" for port in ports if port),
        ]
    )
    argv = (
        "pdsh",
        "-S",
        "-R",
        "ssh",
        "-f",
        "1024",
        "-w",
        ",".join(hosts),
        *_words(o.launcher_args),
        f"{_words_on_host(o)} %n {told}",
    )
    return Command(argv, None, {"PDSH_SSH_ARGS_APPEND": ssh})


def rank_launcher(plan: Plan) -> Command:
    """An MPI's launcher or SLURM starts the ranks; `init_distributed` reads what each says. Environment goes by name,
    never by value.

    Raises:
      LaunchError: the launcher could not do what the filters or the arguments ask for.
    """
    o, build = plan.options, {"openmpi": _openmpi, "slurm": _slurm}.get(plan.options.launcher, _hydra)
    for node in plan.nodes:
        if node.slots != tuple(range(len(node.slots))):
            raise LaunchError(
                f"--launcher={o.launcher}: it starts slots 0 to n-1 of a host, not"
                f" {node.host}:{','.join(map(str, node.slots))}; use --launcher=ssh for these"
            )
        if o.launcher != "slurm" and ("@" in node.host or port_of(node.host)):
            raise LaunchError(
                f"--launcher={o.launcher}: it takes no user or port with a host; put those of {node.host!r} into"
                " ~/.ssh/config, or use --launcher=ssh"
            )
    if ":" in o.args:
        raise LaunchError(
            f"--launcher={o.launcher}: it reads an argument that is ':' alone as the start of another program; use"
            " --launcher=ssh"
        )
    if o.pass_local_rank or o.max_restarts:
        raise LaunchError(
            f"--launcher={o.launcher}: it has neither --pass_local_rank nor --max_restarts; use --launcher=ssh"
        )
    env = plan.env | {"MASTER_ADDR": plan.master_addr, "MASTER_PORT": str(plan.master_port)}
    ranks = rank_command(job(plan, plan.nodes[0]), o.python)
    if o.launcher == "impi" and o.bind_cores_to_rank:
        return Command((*build(plan, env), *_each(plan, ranks)), None, env)
    return Command((*build(plan, env), *ranks), None, env)


def _tool(*names: str) -> str:
    return next((name for name in names if shutil.which(name)), names[-1])


def _openmpi(plan: Plan, env: dict[str, str]) -> list[str]:
    o, hosts = plan.options, ",".join(f"{bare(n.host)}:{len(n.slots)}" for n in plan.nodes)
    output = ["--output-filename", os.path.abspath(o.log_dir)] if o.log_dir else ["--tag-output"]
    names = [word for name in env for word in ("-x", name)]
    return [
        _tool("mpirun.openmpi", "mpirun"),
        "-n",
        str(plan.world),
        "--host",
        hosts,
        "-wdir",
        plan.cwd,
        *output,
        *names,
        *_words(o.launcher_args),
    ]


HYDRA: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {  # names of the command, and what its ranks must be told
    "mpich": (("mpiexec.hydra", "mpirun.mpich", "mpirun"), {}),
    "impi": (("mpiexec.hydra", "mpirun"), {"I_MPI_PIN": "0"}),  # binding is the script's, or --bind_cores_to_rank
    "mvapich": (("mpiexec.hydra", "mpirun"), {"MV2_ENABLE_AFFINITY": "0", "MV2_SUPPORT_DL": "1"}),
}


def _hydra(plan: Plan, env: dict[str, str]) -> list[str]:
    """MPICH's command and those that are made of it: Intel MPI's and MVAPICH's."""
    o, counts = plan.options, {len(n.slots) for n in plan.nodes}
    if len(counts) > 1:
        raise LaunchError(
            f"--launcher={o.launcher}: it starts as many processes on every host, but the slots are {sorted(counts)};"
            f" use --num_gpus={min(counts)}, or --launcher=ssh"
        )
    names, own = HYDRA[o.launcher]
    env.update({name: value for name, value in own.items() if name not in env})
    hosts = ",".join(bare(n.host) for n in plan.nodes)
    output = ["-outfile-pattern", f"{os.path.abspath(o.log_dir)}/rank%r.log"] if o.log_dir else ["-prepend-rank"]
    count = [] if o.bind_cores_to_rank else ["-n", str(plan.world)]
    return [
        _tool(*names),
        *count,
        "-ppn",
        str(counts.pop()),
        "-hosts",
        hosts,
        "-wdir",
        plan.cwd,
        *output,
        "-genvlist",
        ",".join(env),
        *_words(o.launcher_args),
    ]


def _each(plan: Plan, ranks: list[str]) -> list[str]:
    """Every rank's command by itself, on the cores that are dealt to it."""
    out: list[str] = []
    for node in plan.nodes:
        for own in dealt(parse_cores(plan.options.bind_core_list), len(node.slots), node.host):
            threads = ["-env", "OMP_NUM_THREADS", str(len(own))]
            out += [*([":"] if out else []), "-n", "1", *threads, *numactl(own), *ranks]
    return out


def _slurm(plan: Plan, env: dict[str, str]) -> list[str]:
    o = plan.options
    output = [f"--output={os.path.abspath(o.log_dir)}/rank%t.log"] if o.log_dir else ["--label"]
    front = ["srun", "--kill-on-bad-exit=1", "--export=ALL", f"--chdir={plan.cwd}", *output]
    if not o.hostfile:  # the allocation decides what is not asked for here
        env.pop("MASTER_ADDR"), env.pop("MASTER_PORT")  # SLURM's own node list says it
        asked = {"--nodes": o.num_nodes, "--ntasks-per-node": o.num_gpus}
        return [*front, *(f"{name}={n}" for name, n in asked.items() if n > 0), *_words(o.launcher_args)]
    hosts = ",".join(bare(n.host) for n in plan.nodes)
    counts = {len(n.slots) for n in plan.nodes}
    if len(counts) > 1:
        raise LaunchError(
            f"--launcher=slurm: it starts as many tasks on every host, but the slots are {sorted(counts)}; use"
            f" --num_gpus={min(counts)}, or --launcher=ssh"
        )
    return [
        *front,
        f"--ntasks={plan.world}",
        f"--nodes={len(plan.nodes)}",
        f"--ntasks-per-node={counts.pop()}",
        f"--nodelist={hosts}",
        *_words(o.launcher_args),
    ]


def own(plan: Plan) -> tuple[Node, ...]:
    """The nodes that this command starts."""
    return plan.nodes[plan.options.node_rank : plan.options.node_rank + 1] if plan.options.no_ssh else plan.nodes


def commands_of(plan: Plan) -> dict[int, Command]:
    """What to start on this machine, by node; -1: one command for all of them."""
    if plan.options.launcher == "pdsh" and not plan.options.no_ssh and not all(node.local for node in plan.nodes):
        return {-1: pdsh_command(plan)}
    return {node.rank: node_command(plan, node) for node in own(plan)}


def describe(plan: Plan) -> str:
    """Exactly what would run: on this machine, on every host, and as every rank."""
    o = plan.options
    if o.launcher in RANK_LAUNCHERS:
        return _command("", rank_launcher(plan))
    commands = commands_of(plan)
    lines = [_command("on this machine: ", commands[-1])] if -1 in commands else []
    for node in own(plan):
        orders = job(plan, node)
        lines.append(
            f"{node.host}: ranks {node.first} to {node.first + len(node.slots) - 1} of {plan.world} on slots"
            f" {','.join(map(str, node.slots))}"
        )
        if node.rank in commands:
            lines.append(_command("  start  ", commands[node.rank]))
        lines.append(f"  agent  torchrun {shlex.join(torchrun_arguments(orders, o.python, 'entry.py', 'FOLDER'))}")
        front = "numactl -C ITS_CORES " if o.bind_cores_to_rank else ""
        last = " (and --local_rank=N)" if o.pass_local_rank else ""
        lines.append(f"  rank   {front}{shlex.join(rank_command(orders, o.python))}{last}")
    return "\n".join(lines)


def _command(front: str, command: Command) -> str:
    env = "".join(f"{name}={shlex.quote(value)} " for name, value in command.env.items())
    return f"{front}{env}{shlex.join(command.argv)}" + (
        f"\n  stdin  {command.stdin.decode().rstrip()}" if command.stdin else ""
    )
