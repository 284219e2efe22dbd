"""This process among all processes: the world that a launcher describes, its device, and how it is joined, once."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.distributed as dist

from funczero.world import environment, rendezvous


class World(NamedTuple):
    """This process among all processes."""

    rank: int
    size: int
    local_rank: int


def default_device() -> torch.device:
    """The device of this process: the accelerator of its local rank, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    world = _environment()
    return torch.device(accelerator.type, world.local_rank if world else 0)


def _environment() -> World | None:
    """What a launcher wrote into the environment, whole or not at all."""
    found = environment.read(os.environ)
    return None if found is None else World(int(found["RANK"]), int(found["WORLD_SIZE"]), int(found["LOCAL_RANK"]))


def init_distributed(backend: str | None = None) -> World:
    """Join the world that torchrun, OpenMPI, MPICH or SLURM describes, or a world of one without them; a second call
    changes nothing.

    What another launcher than torchrun says is written under torchrun's names as well, so that libraries and scripts
    find it there.

    Args:
      backend: a torch backend by name; by default gloo for CPU, the accelerator's own (nccl, rccl) otherwise.

    Raises:
      RuntimeError: the environment describes half a world, or several hosts without rank 0's address.
    """
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    world = _environment()
    if world is None:
        return World(0, 1, 0)
    found = environment.adopt()
    device = default_device()
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group(backend or dist.get_default_backend_for_device(device.type), **rendezvous.join(found or {}))
    return world


def world_size() -> int:
    """Processes in this world, without joining it."""
    if dist.is_initialized():
        return dist.get_world_size()
    world = _environment()
    return 1 if world is None else world.size


def world_rank() -> int:
    """This process among all, without joining them."""
    if dist.is_initialized():
        return dist.get_rank()
    world = _environment()
    return 0 if world is None else world.rank
