"""What a launcher says about the world, in torchrun's names: torchrun itself, OpenMPI, MPICH and its kin (PMI),
SLURM. No mpi4py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from funczero.world.plain import plain

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = ("PET_NNODES", "PET_NPROC_PER_NODE")  # what Kubernetes' operators write for a torchrun in the pod
PORT = 29500


class Launcher(NamedTuple):
    """Where a launcher that is not torchrun writes what torchrun would."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    job: tuple[str, ...]  # numbers that all ranks of a job share, and other jobs do not
    option: str  # how to give every rank the address of rank 0's host


LAUNCHERS = (  # mpirun inside a SLURM job leaves SLURM's names standing, so they come last
    Launcher(
        "OpenMPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("OMPI_MCA_ess_base_jobid",),
        "-x MASTER_ADDR=HOST to mpirun",
    ),
    Launcher(
        "MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", (), "-genv MASTER_ADDR HOST to mpirun"
    ),
    Launcher(
        "SLURM",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "",
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
        "--export=ALL,MASTER_ADDR=HOST to srun",
    ),
)


def read(environ: Mapping[str, str]) -> dict[str, str] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process, whoever started it; None for a world
    of one that nobody described.

    Rank 0's address, where none is given, is 127.0.0.1 on one host and the first node of a SLURM step; its port is
    drawn from the job's number. A batch script, or a shell inside an allocation, is no rank: only what `srun` starts
    is.

    Raises:
      RuntimeError: half a world is described, or one for a torchrun that nobody started, or several hosts are without
        rank 0's address; the message has the option to add.

    >>> read({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"})
    {'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29500'}
    """
    if (who := launcher(environ)) not in ("torchrun", None):
        return _translate(next(x for x in LAUNCHERS if x.name == who), environ)
    there = [n for n in NAMES if n in environ]
    if not there:
        asked = next((n for n in TORCHRUN if environ.get(n, "1") not in ("1", "")), None)
        if asked is not None:
            raise RuntimeError(
                f"init_distributed: the environment holds {asked}={plain(environ[asked])}, which torchrun reads, but"
                f" nobody made this process a rank; start the script with torchrun, or unset {asked} for a world of one"
            )
        return None
    if len(there) < len(NAMES):
        missing = [n for n in NAMES if n not in there]
        raise RuntimeError(
            f"init_distributed: the environment names {there} but not {missing}; start with torchrun, or unset"
            f" {there[0]} for a world of one"
        )
    found = {"RANK": environ["RANK"], "WORLD_SIZE": environ["WORLD_SIZE"], "LOCAL_RANK": environ.get("LOCAL_RANK", "0")}
    _check(found, "RANK", "WORLD_SIZE", "torchrun")
    return found | {name: environ[name] for name in NAMES[2:]}


def launcher(environ: Mapping[str, str]) -> str | None:
    """Whose variables these are; None where nobody wrote any.

    >>> mpich = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
    >>> launcher({"RANK": "0", "WORLD_SIZE": "2"}), launcher(mpich), launcher({})
    ('torchrun', 'MPICH', None)
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return "torchrun"
    return next((x.name for x in LAUNCHERS if all(name in environ for name in x[1:4])), None)


def adopt(environ: MutableMapping[str, str] = os.environ) -> dict[str, str] | None:
    """`read`, and write what it found under torchrun's names, for libraries and scripts that look there."""
    found = read(environ)
    environ.update(found or {})
    return found


def _translate(launcher: Launcher, environ: Mapping[str, str]) -> dict[str, str] | None:
    found = {
        "RANK": environ[launcher.rank],
        "WORLD_SIZE": environ[launcher.size],
        "LOCAL_RANK": environ[launcher.local_rank],
    }
    _check(found, launcher.rank, launcher.size, launcher.name)
    if found["WORLD_SIZE"] == "1":
        return None
    numbers = [int(environ[name]) for name in launcher.job if environ.get(name, "").isdigit()]
    port = environ.get("MASTER_PORT") or str(20000 + sum(numbers) % 10000 if numbers else PORT)
    return found | {"MASTER_ADDR": environ.get("MASTER_ADDR") or _address(launcher, environ), "MASTER_PORT": port}


def _address(launcher: Launcher, environ: Mapping[str, str]) -> str:
    size, nodes = environ[launcher.size], environ.get("SLURM_STEP_NODELIST", "")
    if launcher.name == "SLURM" and environ.get("SLURM_STEP_NUM_NODES") != "1" and nodes:
        return first_node(nodes)
    if environ.get(launcher.local_size) == size or (launcher.name == "SLURM" and nodes):
        return "127.0.0.1"
    said = (
        f"init_distributed: {launcher.name} started {size} processes on more than one host and says no address of"
        " rank 0's"
    )
    raise RuntimeError(f"{said}; add {launcher.option}, HOST being the host of rank 0 as the others reach it")


def first_node(nodes: str) -> str:
    """The first host of SLURM's compressed list.

    >>> first_node("worker-[1-2,5]"), first_node("rack[01-02]n[007,9],login"), first_node("gpu1,gpu7")
    ('worker-1', 'rack01n007', 'gpu1')
    """
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def _check(found: Mapping[str, str], rank: str, size: str, launcher: str) -> None:
    r, n = found["RANK"], found["WORLD_SIZE"]
    if not all(x.isascii() and x.isdigit() and len(x) < 10 for x in (r, n)) or int(r) >= int(n):
        raise RuntimeError(
            f"init_distributed: {rank}={plain(r, 100)!r} and {size}={plain(n, 100)!r} are not a rank below a world"
            f" size; start with {launcher}"
        )
