"""One process of a pool: it joins its world, answers calls, and ends with the process that holds the pool."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from funczero.world import rendezvous

GROUP_TIMEOUT = timedelta(minutes=30)  # of collectives; a run's own timeout is meant to come first


class Reply(NamedTuple):
    """What a rank answered: a value, or what it raised, when (on this machine's monotonic clock) and the traceback's
    text.
    """

    error: BaseException | None
    value: Any
    when: float
    text: str


def serve(pipe: Connection) -> None:
    """A worker's life: answer calls until the pool or the process that holds it is gone."""
    gc.freeze()  # or collections would go through all that the server has imported, and copy it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c is the caller's
    threading.Thread(target=_end_with_parent, name="funczero-parent", daemon=True).start()
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_answer(message))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the main thread may be inside a collective that never ends


def _answer(message: bytes) -> bytes:
    """Make the call; the reply as bytes."""
    try:
        path, call = pickle.loads(message)
        sys.path.extend(p for p in path if p not in sys.path)
        fn, args = pickle.loads(call)
        return pickle.dumps(Reply(None, fn(*args), time.monotonic(), "")[:])
    except BaseException as error:
        return pickle.dumps(Reply(_portable(error), None, time.monotonic(), traceback.format_exc())[:])


def _portable(error: BaseException) -> BaseException:
    """The same exception where it survives pickling, else a RuntimeError that says as much."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def join_world(rank: int, size: int, folder: str, port: int) -> None:
    """Become rank `rank`: environment, one thread, stack dumps on SIGUSR1, and the gloo world over the loopback device,
    whose store is the pool's, at a port of this machine.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size), OMP_NUM_THREADS="1",
        TORCHELASTIC_USE_AGENT_STORE="True",  # as torchrun says it: no rank takes the store along
    )  # fmt: skip
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, file=os.open(Path(folder, f"stack{rank}"), os.O_CREAT | os.O_WRONLY))
    store = rendezvous.visit("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=GROUP_TIMEOUT)
