"""What every host is told to run: one dict a node, plain enough for a line of JSON."""

from __future__ import annotations

import os
import re
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from funczero.launch.cores import parse_cores
from funczero.launch.error import LaunchError
from funczero.launch.flags import Options
from funczero.launch.hostfile import BYTES, SLOTS, choose, read_hostfile

# beginnings of names
EXPORTED = ("NCCL_", "GLOO_", "PYTHON", "MLFLOW", "UCX", "MV2", "OMP_NUM_THREADS", "TORCH_", "FUNCZERO_")
HERE = frozenset({"localhost", "127.0.0.1", "::1", "[::1]"})
PORT = 29500
SHIM = str(Path(__file__).parent / "shim")  # a folder in which `deepspeed` is funczero.deepspeed


class Node(NamedTuple):
    """One host's part of the world."""

    host: str  # as in the hostfile
    slots: tuple[int, ...]
    rank: int  # among the nodes
    first: int  # the first of its processes' ranks
    local: bool  # this machine: no transport


class Plan(NamedTuple):
    """A launch, decided before anything is started."""

    options: Options
    nodes: tuple[Node, ...]
    world: int
    master_addr: str
    master_port: int  # 0: the only host takes a free one
    env: dict[str, str]  # what the hosts' own environment is overlaid with
    cwd: str
    run: str  # a name for this launch


def make_plan(o: Options, environ: Mapping[str, str], cwd: str) -> Plan:
    """Hosts, slots, ranks, address and environment of a launch; ranks are dealt host by host, slot by slot.

    Raises:
      LaunchError: nothing is left to run on, or rank 0's address is not one that other hosts can reach.
    """
    # there the allocation has the nodes
    asked = o._replace(num_nodes=-1) if o.launcher == "slurm" and not o.hostfile else o
    chosen = choose(_pool(asked, environ), o.include, o.exclude, asked.num_nodes, o.num_gpus)
    empty = [host for host, slots in chosen.items() if not slots]
    if empty or not chosen:
        raise LaunchError(
            f"{f'{empty[0]} has slots=0' if empty else '--exclude leaves no slot'}, so there is nothing to run there;"
            " write slots=1 or more, or exclude less"
        )
    nodes, first = [], 0
    for rank, (host, slots) in enumerate(chosen.items()):
        nodes.append(Node(host, slots, rank, first, is_here(host) and not o.force_multi))
        first += len(slots)
    if o.no_ssh and o.node_rank >= len(nodes):
        raise LaunchError(
            f"--node_rank={o.node_rank}: there are {len(nodes)} hosts, counted from 0; write at most {len(nodes) - 1}"
        )
    several = len(nodes) > 1
    port = o.master_port or (PORT if several or o.no_ssh or o.launcher != "ssh" else 0)
    env = export_environment(environ, cwd) if several or not nodes[0].local else env_file(environ, cwd)
    if o.as_deepspeed:
        env["PYTHONPATH"] = with_shim(env.get("PYTHONPATH", environ.get("PYTHONPATH", "")))
    # there every host makes its own plan, and the agents meet under one name
    run = "by_hand" if o.no_ssh else uuid.uuid4().hex[:12]
    return Plan(o, tuple(nodes), first, _address(o, nodes), port, env, cwd, run)


def with_shim(path: str) -> str:
    """A PYTHONPATH under which `deepspeed` is funczero.deepspeed, before any other that is installed."""
    return os.pathsep.join([SHIM, *(x for x in path.split(os.pathsep) if x != SHIM)] if path else [SHIM])


def _pool(o: Options, environ: Mapping[str, str]) -> dict[str, int]:
    """Slots by host: the hostfile's, or this machine's devices; on a CPU as many processes as are asked for."""
    if o.hostfile:
        return read_hostfile(o.hostfile)
    if o.num_nodes > 1:
        raise LaunchError(
            f"--num_nodes={o.num_nodes}: without a hostfile there is this machine alone; list the hosts in a file and"
            " name it with --hostfile"
        )
    import torch

    devices = environ.get("CUDA_VISIBLE_DEVICES")
    count = (
        torch.accelerator.device_count()
        if torch.accelerator.is_available()
        else len(devices.split(",")) if devices else 0
    )
    asked = [int(n[:9]) for n in re.findall(r"[:,]\s*([0-9]+)", f"{o.include}@{o.exclude}")]
    slots = count or max(1, o.num_gpus, *(n + 1 for n in asked))
    if slots > SLOTS:
        raise LaunchError(
            f"--num_gpus, --include or --exclude: {slots} slots are more than any host has; write at most {SLOTS}"
        )
    return {"localhost": slots}


def is_here(host: str) -> bool:
    """Whether a host's name is this machine's own."""
    return host in HERE or host in (socket.gethostname(), socket.gethostname().partition(".")[0])


def bare(host: str) -> str:
    """A host without user@, :port and brackets, as an address."""
    host = host.rpartition("@")[2]
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0]


def port_of(host: str) -> str:
    """The :port of a host, '' without one."""
    host = host.rpartition("@")[2]
    return host.rpartition("]:")[2] if "]:" in host else host.partition(":")[2] if host.count(":") == 1 else ""


def _address(o: Options, nodes: list[Node]) -> str:
    if o.master_addr or len(nodes) == 1:
        return o.master_addr or "127.0.0.1"
    first = bare(nodes[0].host)
    if first in HERE or first.startswith("127."):
        raise LaunchError(
            f"rank 0 is on {nodes[0].host}, a name that means another machine on every host; add --master_addr=ADDRESS,"
            " as the other hosts reach this one"
        )
    return first


def export_environment(environ: Mapping[str, str], cwd: str) -> dict[str, str]:
    """What other hosts get of this environment: names that begin as EXPORTED, the working folder first in
    PYTHONPATH, and `env_file`.
    """
    env = {name: value for name, value in environ.items() if name.startswith(EXPORTED)}
    env["PYTHONPATH"] = os.pathsep.join([cwd, *filter(None, [environ.get("PYTHONPATH")])])
    return env | env_file(environ, cwd)


def env_file(environ: Mapping[str, str], cwd: str) -> dict[str, str]:
    """The lines KEY=VALUE of `.deepspeed_env`, first the home folder's, then this one's; $DS_ENV_FILE is another name
    for it.

    Raises:
      LaunchError: a line is no KEY=VALUE; empty lines and comments are skipped.
    """
    name, env = environ.get("DS_ENV_FILE", ".deepspeed_env"), {}
    folders = dict.fromkeys(folder for folder in (environ.get("HOME"), cwd) if folder)
    for path in dict.fromkeys(Path(folder, name) for folder in folders):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            data = file.read(BYTES + 1)
        if len(data) > BYTES:
            raise LaunchError(
                f"{path}: it has more than {BYTES} bytes, and no environment is so long; write lines NAME=VALUE"
            )
        for number, line in enumerate(data.decode(errors="surrogateescape").split("\n"), 1):
            line = line.removesuffix("\r")
            key, equals, value = line.partition("=")
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) or "\0" in value:
                raise LaunchError(
                    f"{path}, line {number}: {line!r} is no setting; write NAME=VALUE, without export and without"
                    " quotes"
                )
            env[key] = value
    return env


def job(plan: Plan, node: Node) -> dict[str, Any]:
    """One node's orders; `funczero.launch.node` reads them as a line of JSON."""
    o = plan.options
    return {
        "run": plan.run,
        "host": node.host,
        "node_rank": node.rank,
        "nodes": len(plan.nodes),
        "slots": node.slots,
        "first": node.first,
        "world": plan.world,
        "master_addr": plan.master_addr,
        "master_port": plan.master_port,
        "cwd": plan.cwd,
        "env": plan.env,
        "script": o.script,
        "args": o.args,
        "module": o.module,
        "no_python": o.no_python,
        "as_deepspeed": o.as_deepspeed,
        "pass_local_rank": o.pass_local_rank,
        "max_restarts": o.max_restarts,
        "lost_after": o.lost_after,
        "cores": (parse_cores(o.bind_core_list) if o.bind_core_list else ()) if o.bind_cores_to_rank else None,
    }


def rank_command(orders: Mapping[str, Any], python: str) -> list[str]:
    """The command line of every rank, before --local_rank is put behind the script where that was asked for."""
    front = [] if orders["no_python"] else [python, "-u", "-m"] if orders["module"] else [python, "-u"]
    return [*front, orders["script"], *orders["args"]]


def torchrun_arguments(orders: Mapping[str, Any], python: str, entry: str, folder: str) -> list[str]:
    """torchrun's arguments on one node: it starts `entry`, which becomes the rank; agents meet as `meeting` says.

    Without restarts ranks lie in the hostfile's order; with them torchrun's elastic rendezvous orders the hosts by
    name.
    """
    addr, port = orders["master_addr"], orders["master_port"]
    endpoint = f"[{addr}]:{port}" if ":" in addr else f"{addr}:{port}"
    where = [
        "--rdzv-backend=funczero",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={orders['run']}",
        f"--rdzv-conf=rank={orders['node_rank']}",
    ]
    if orders["max_restarts"]:
        local = addr if orders["node_rank"] == 0 else bare(orders["host"])
        where += [f"--local-addr={local}", f"--max-restarts={orders['max_restarts']}"]
    return [
        f"--nnodes={orders['nodes']}",
        f"--nproc-per-node={len(orders['slots'])}",
        *where,
        f"--log-dir={folder}",
        "--no-python",
        python,
        "-I",
        entry,
        folder,
    ]


def without(plan: Plan, lost: set[str]) -> Plan:
    """The same launch on the hosts that are left; ranks are dealt anew, and rank 0's address is that of the first of
    them.
    """
    nodes: list[Node] = []
    first = 0
    for node in plan.nodes:
        if node.host not in lost:
            nodes.append(node._replace(rank=len(nodes), first=first))
            first += len(node.slots)
    moved = nodes[0].host != plan.nodes[0].host
    o = plan.options._replace(master_addr="" if moved else plan.options.master_addr)
    return plan._replace(
        options=o, nodes=tuple(nodes), world=first, master_addr=_address(o, nodes), run=uuid.uuid4().hex[:12]
    )
