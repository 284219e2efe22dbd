"""Which machine a process is on, as a number that others can compare."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import torch
import torch.distributed as dist


def boot() -> str:
    """Linux's own name for this boot of this machine.

    Raises:
      OSError: the system has none.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def host() -> int:
    """A number of 62 bits that processes share whose messages stay within one machine: the same boot and the same
    network namespace. Where the system does not tell, nobody shares it.

    >>> host() == host() or not os.path.exists("/proc/self/ns/net")
    True
    """
    try:
        return int(hashlib.sha256(f"{boot()} {os.readlink('/proc/self/ns/net')}".encode()).hexdigest(), 16) >> 194
    except OSError:
        return secrets.randbits(62)


def hosts_of_the_world() -> tuple[int, ...]:
    """The numbers of all ranks' machines, by rank. A collective of the default group."""
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor([host()]))
    return tuple(int(x) for x in found)
