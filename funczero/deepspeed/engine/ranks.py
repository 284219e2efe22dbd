"""`deepspeed.comm`: the world, its ranks and its collectives, as torch.distributed has them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from absl import logging
from torch import nn
from torch.distributed import ReduceOp as ReduceOp

from funczero.comm.integers import sum_and_compare
from funczero.comm.launch import broadcast
from funczero.layout import mesh, processes
from funczero.step.calls import watch_of_world
from funczero.step.watch import in_words
from funczero.world import environment
from funczero.world.entries import Context


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: datetime.timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Joins the world that torchrun, SLURM, OpenMPI or PMI describe, and says which.

    Without any of them it is a world of one. A second call changes nothing.

    Args:
      dist_backend: by name; nccl for CUDA and ROCm and gloo for the CPU by default.
      auto_mpi_discovery: read SLURM's, OpenMPI's and PMI's variables, too.
      distributed_port: of rank 0, where no launcher names one.
      init_method, timeout: as torch.distributed.init_process_group's.
      rank, world_size: instead of the environment's.

    Raises:
      RuntimeError: rank 0's address is not known; with the option to add.
    """
    if dist.is_initialized() or dist_init_required is False:
        os.environ.setdefault("LOCAL_RANK", "0")
        return
    if rank >= 0 and world_size > 0:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    who = environment.launcher(os.environ)
    if init_method is None and (auto_mpi_discovery or who == "torchrun"):
        given = who not in ("torchrun", None) and distributed_port != environment.PORT
        port = {"MASTER_PORT": str(distributed_port)} if given else {}
        os.environ.update(environment.read(port | os.environ) or {})
    if init_method is not None or timeout is not None:
        device = processes.default_device().type
        backend = dist_backend or dist.get_default_backend_for_device(device)
        dist.init_process_group(
            backend,
            init_method=init_method,
            timeout=timeout,
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
        )
    world = processes.init_distributed(dist_backend)
    alone()
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if verbose and world.rank == 0:
        said = f"the variables of {who}" if who else "no launcher's variables: one process"
        logging.info("init_distributed: %d processes, from %s", world.size, said)


def alone() -> None:
    """A group of one, for programs that ask torch.distributed about the world of a single process.

    Its backend is the device's, with gloo for what lies on the CPU.
    """
    if not dist.is_initialized() and processes.world_size() == 1:
        device = processes.default_device().type
        own = dist.get_default_backend_for_device(device)
        backend = "gloo" if device == "cpu" else f"cpu:gloo,{device}:{own}"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def is_initialized() -> bool:
    """Has the world been joined, by init_distributed or initialize? One of a single process, too."""
    return dist.is_initialized()


def get_rank(group: Any = None) -> int:
    """This process."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def get_world_size(group: Any = None) -> int:
    """All processes."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def get_local_rank() -> int:
    """This process on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def barrier(*args: Any, **kwargs: Any) -> Any:
    """Until all ranks are here."""
    return dist.barrier(*args, **kwargs) if dist.is_initialized() else None


@lru_cache(maxsize=1)
def _mesh_of(world: Any) -> mesh.Mesh:
    found = mesh.connect(mesh.plan_mesh({"data": -1}))
    found.ledger.watch = watch_of_world()
    return found


@contextmanager
def called(call: str) -> Iterator[mesh.Mesh]:
    """world_mesh(call) while it is made: a rank that makes it alone is told, and does not wait for ever."""
    found = world_mesh(call)
    watch = found.ledger.watch
    within = watch is not None and watch.inside
    if watch is not None:
        watch.enter()
    try:
        yield found
    except BaseException as error:
        if watch is not None:
            watch.failed(error, f"{in_words(error)} in {call}")
        raise
    finally:
        if watch is not None:
            watch.inside = within


def world_mesh(call: str) -> mesh.Mesh:
    """All processes on one axis, where no engine has a mesh yet; what is launched there belongs to `call`."""
    processes.init_distributed()
    found = _mesh_of(dist.group.WORLD if dist.is_initialized() else None)  # None: a world of one, which has no groups
    found.ledger.enter(Context(call))
    return found


def compared(call: str) -> None:
    """Ranks compare what they launched since the last time; a collective of a few bytes.

    Raises:
      DivergenceError: one launched something else; on all ranks alike.
    """
    with called(call) as found:
        sum_and_compare([torch.zeros(0, dtype=torch.int64, device=found.device)], (), found)


def broadcast_module(module: nn.Module) -> None:
    """Rank 0's parameters and buffers on every rank."""
    if get_world_size() > 1:
        with called("initialize") as found:
            for x in [*module.parameters(), *module.buffers()]:
                if not hasattr(x, "home"):
                    x.data.copy_(broadcast(x.data, 0, found))


def gather_texts(text: str) -> list[str]:
    """Every rank's text."""
    held: list[Any] = [text] * get_world_size()
    if get_world_size() > 1:
        dist.all_gather_object(held, text)
    return held


def __getattr__(name: str) -> Any:
    """torch.distributed's of that name; in a world of one without a group it is made first."""
    if name.startswith("__") or not hasattr(dist, name):
        raise AttributeError(f"deepspeed.comm.{name}: torch.distributed has nothing of that name")
    alone()
    return getattr(dist, name)
