"""What memory a process has, in a line of its log; values moved to a device."""

from __future__ import annotations

import resource
from typing import Any

import torch
from torch import Tensor

from funczero.core import tree
from funczero.deepspeed.engine.device import get_accelerator
from funczero.deepspeed.engine.log import logger
from funczero.deepspeed.engine.ranks import get_rank

GIB = 2**30


def see_memory_usage(message: str, force: bool = False, ranks: list[int] | None = None) -> None:
    """With force, a line of the given ranks (by default rank 0): GiB on the device and in this process.

    Source: DeepSpeed 0.19.8, see_memory_usage, which is silent without force, too.
    """
    if force and get_rank() in ([0] if ranks is None else ranks):
        logger.info("%s | %s", message, _words())


def memory_status(msg: str, print_rank: int = -1, reset_max: bool = False) -> None:
    """A line of one rank, or of every rank with -1: GiB on the device and in this process."""
    if print_rank in (-1, get_rank()):
        logger.info("[rank %d] %s | %s", get_rank(), msg, _words())
    if reset_max and get_accelerator().device_name() != "cpu":
        get_accelerator().reset_peak_memory_stats()


def _words() -> str:
    device, most = get_accelerator(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    here = f"on the device {device.memory_allocated() / GIB:.2f} GiB, at most {device.max_memory_allocated() / GIB:.2f}"
    return f"{here}; this process at most {most:.2f} GiB"


def move_to_device(item: Any, device: Any, criterion_func: Any = lambda x: True) -> Any:
    """A tree with its tensors on a device.

    Args:
      criterion_func: of a tensor: is it moved?
    """
    return tree.map(lambda x: x.to(torch.device(device)) if isinstance(x, Tensor) and criterion_func(x) else x, item)


def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2.0, mpu: Any = None) -> Tensor:
    """torch's, for parameters that no engine holds; those of an engine are clipped by the config.

    Args:
      mpu: None, because there is no model parallelism here.
    """
    if mpu is not None:
        raise ValueError("clip_grad_norm_: mpu= asks for model parallelism, and there is none here; leave it out")
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
