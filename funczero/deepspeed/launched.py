"""Who started this process: torchrun, SLURM, OpenMPI or PMI, as one set of variables. No mpi4py is needed."""
from __future__ import annotations

import re
import socket
from collections.abc import MutableMapping
from typing import NamedTuple


class Launcher(NamedTuple):
    """Where a launcher writes its ranks."""

    name: str
    rank: str
    size: str
    local: str


LAUNCHERS = (
    Launcher("OpenMPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    Launcher("SLURM", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    Launcher("PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


def adopt(env: MutableMapping[str, str], port: int = 29500) -> str | None:
    """Writes RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where a launcher says them otherwise; its name, or None.

    Raises:
      RuntimeError: ranks are on several hosts, and nobody says where rank 0 is.

    >>> env = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NNODES": "2"}
    >>> adopt(env), env["RANK"], env["MASTER_ADDR"]
    ('SLURM', '3', 'gpu07')
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        env.setdefault("LOCAL_RANK", "0")
        if int(env["WORLD_SIZE"]) > 1 or "MASTER_ADDR" in env:
            env.setdefault("MASTER_ADDR", "127.0.0.1" if env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]) == env["WORLD_SIZE"] else _missing("RANK and WORLD_SIZE", env))
        else:
            env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(port))
        return "torchrun"
    found = next((x for x in LAUNCHERS if x.rank in env and x.size in env), None)
    if found is None or (found.name == "SLURM" and env.get("SLURM_STEP_ID") is None and env[found.size] == "1"):
        return None
    size = int(env[found.size])
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _address(found, env, size)
    env.setdefault("MASTER_PORT", str(port))
    env.update(RANK=env[found.rank], WORLD_SIZE=str(size), LOCAL_RANK=env.get(found.local, env.get("PMI_LOCAL_RANK", "0")))
    return found.name


def _address(found: Launcher, env: MutableMapping[str, str], size: int) -> str:
    """127.0.0.1 on one host, SLURM's first node, else an error."""
    nodes = env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    one_host = {
        "OpenMPI": env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(size),
        "SLURM": env.get("SLURM_NNODES", "") == "1",
        "PMI": env.get("MPI_LOCALNRANKS") == str(size),
    }[found.name]
    if one_host or size == 1:
        return "127.0.0.1"
    return first_host(nodes) if nodes else _missing(found.name, env)


def first_host(nodes: str) -> str:
    """The first of SLURM's compressed list.

    >>> first_host("node[003-005,9],other"), first_host("a,b"), first_host("login-1")
    ('node003', 'a', 'login-1')
    """
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    assert match is not None
    return match[1] + (match[2] or "")


def _missing(name: str, env: MutableMapping[str, str]) -> str:
    raise RuntimeError(
        f"init_distributed: {name} names ranks on several hosts but not where rank 0 is; add -x MASTER_ADDR=<host of rank 0> to mpirun, "
        f"or export MASTER_ADDR (this host is {socket.gethostname()})"
    )
