"""Which process is which rank, told in the world's store when the world is joined, so that the others can prove that
it has ended. Silence proves nothing.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

from funczero.world.host import boot

KEY = "funczero/process"


def identity() -> str:
    """This process among all processes of all machines: machine, number space, number and start; empty where the
    system does not tell.
    """
    return _identity(os.getpid())


@lru_cache(maxsize=1)
def _identity(process: int) -> str:
    try:
        return f"{boot()} {os.readlink('/proc/self/ns/pid')} {process} {_state(process)[1]}"
    except OSError:
        return ""


def ended(other: str) -> bool:
    """Is it certain that the process of this identity has ended? Only its own machine can tell.

    >>> ended(identity()), ended(""), ended("another pid:[1] 1 1")
    (False, False, False)
    """
    mine, theirs = identity().split(), other.split()
    if len(mine) != 4 or len(theirs) != 4 or mine[:2] != theirs[:2] or not theirs[2].isdigit():
        return False
    try:
        os.kill(int(theirs[2]), 0)
        state, start = _state(int(theirs[2]))
    except (ProcessLookupError, FileNotFoundError):
        return True
    except (OSError, OverflowError):
        return False
    return start != theirs[3] or state in "ZX"


def number(other: str) -> str:
    """The process's number, as a message names it."""
    return other.split()[2] if len(other.split()) == 4 else "?"


def announce() -> None:
    """Tell the other ranks which process this one is; a world of one has none."""
    if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != "fake":
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{KEY}/{dist.get_rank()}", identity())


def ranks_that_ended() -> list[int]:
    """Ranks of this world that have provably ended; none where its store does not answer."""
    try:
        store = dist.distributed_c10d._get_default_store()
        keys = {r: f"{KEY}/{r}" for r in range(dist.get_world_size())}
        return [r for r, key in keys.items() if store.check([key]) and ended(store.get(key).decode())]
    except RuntimeError:
        return []


def connection(base: Any, seconds: float = 8.0) -> Any:
    """A connection of its own to the world's store, `base.clone()`; but never for the minutes for which that tries a
    server that has gone.

    Raises:
      RuntimeError: it cannot be reached.
    """
    made: list[Any] = []

    def connect() -> None:
        before = base.timeout
        try:
            base.check([KEY])  # a server that has gone is found out here
            base.set_timeout(timedelta(seconds=seconds))  # of the attempts: it is lost between two questions
            made.append(base.clone())
            made[0].set_timeout(before)
        except RuntimeError as e:
            made[:] = [e]
        finally:
            base.set_timeout(before)

    thread = threading.Thread(target=connect, name="funczero-connect", daemon=True)
    thread.start()
    thread.join(seconds + 1)
    if not made or isinstance(made[0], RuntimeError):
        why = str(made[0]).splitlines()[0] if made else f"no answer within {seconds:g} s"
        raise RuntimeError(
            f"rank {dist.get_rank() if dist.is_initialized() else 0} cannot reach the world's store, so rank 0, or who"
            f" holds it, is gone ({why})"
        )
    return made[0]


def _state(process: int) -> tuple[str, str]:
    """(state, start) of a process, as Linux has them in /proc."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
