"""This process's two connections to the world's store, made once, and the pulse by which the others hear that it lives.

Facts: a client of torch's store answers one question at a time; it waits without end for a server that is stopped or
whose machine is lost, and `clone` of one whose server has gone tries again for minutes. After a question that was given
up, the late answer would be taken for that of the next one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from functools import lru_cache
from typing import Any

import torch.distributed as dist

from funczero.checkpoint.error import CheckpointError
from funczero.world import presence
from funczero.world.ending import Guest

SILENCE = 8.0  # seconds: without a beat for so long, a rank is taken for dead; eight beats lie in it
# seconds for which the process that holds the store stays for ranks that have not acknowledged their last call
LEAVE = 10.0
SPACE = "funczero/checkpoint"


class Line:
    """A connection: a question that is not answered within `silence` seconds is the last one."""

    def __init__(self, base: Any, rank: int, silence: float) -> None:
        """base: the world's store."""
        self._rank, self._broken = rank, ""
        with _bounded(base, silence):
            try:
                self._store: Any = presence.connection(base, silence)
            except RuntimeError as e:
                raise CheckpointError(f"checkpoint: {e}") from None

    def ask(self, verb: str, *args: Any) -> Any:
        """A method of the store.

        Raises:
          CheckpointError: the store cannot be reached, now or earlier.
        """
        if not self._broken:
            try:
                return getattr(self._store, verb)(*args)
            except RuntimeError as e:
                self._broken = str(e).splitlines()[0]
        raise CheckpointError(
            f"checkpoint: rank {self._rank} cannot reach the world's store any more, so rank 0, or who holds it, is"
            f" gone ({self._broken})"
        )


class _bounded:
    """The sockets to a store that are opened inside the block give up after some seconds."""

    def __init__(self, base: Any, seconds: float) -> None:
        self._limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        server = getattr(base, "_underlying_non_prefix_store", base)
        self._port, self._before = getattr(server, "port", None), _sockets()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        for inode, fd in _sockets().items():
            if self._port and inode not in self._before and (s := _twin(fd)) is not None:
                with s:
                    if _port_of(s) == self._port:
                        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, self._limit)
                        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, self._limit)


def _twin(fd: int) -> socket.socket | None:
    """The connection under a descriptor once more, because options are of the connection, whoever holds it; None
    where another thread closed it since.
    """
    try:
        other = os.dup(fd)
    except OSError:
        return None
    try:
        return socket.socket(fileno=other)
    except OSError:  # the number now belongs to something else
        os.close(other)
        return None


def _port_of(s: socket.socket) -> int:
    try:
        return s.getpeername()[1] if s.family in (socket.AF_INET, socket.AF_INET6) else 0
    except OSError:  # not connected
        return 0


def _sockets() -> dict[str, int]:
    """This process's open sockets, where the system tells: inode -> descriptor."""
    out: dict[str, int] = {}
    for fd in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # the listing's own
            continue
        if target.startswith("socket:"):
            out[target] = int(fd)
    return out


class Lines:
    """What all checkpointers of a process share in one world."""

    def __init__(self, silence: float = SILENCE, alone: bool = False) -> None:
        """Opens both connections and starts the pulse; a world of one has none."""
        self.silence, self.beat = silence, silence / 8
        self.world = dist.group.WORLD if dist.is_initialized() and not alone else None
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if self.world is not None else (0, 1)
        self.process, self.numbers = os.getpid(), dict[str, int]()  # by namespace: the last call of this rank
        # keeps rank 0's server up
        self.anchor: Any = dist.distributed_c10d._get_default_store() if self.size > 1 else dist.HashStore()
        self.front, self.back = (Line(self.anchor, self.rank, silence) for _ in range(2))
        lent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not hasattr(
            getattr(self.anchor, "_underlying_non_prefix_store", self.anchor), "port"
        )
        self.holds = self.rank == 0 and not lent  # does the store end with this process?
        self.back.ask("delete_key", f"{SPACE}/left/{self.rank}")
        self.pulse = Pulse(self) if self.size > 1 and dist.get_backend() not in ("fake", "threaded") else None
        if self.size > 1:
            presence.announce()


@lru_cache(maxsize=4)
def _shared(world: Any, process: int, silence: float) -> Lines:
    return Lines(silence)


def lines(silence: float = SILENCE) -> Lines:
    """This process's connections in the world that it is in now."""
    return _shared(dist.group.WORLD if dist.is_initialized() else None, os.getpid(), silence)


class Pulse(Guest):
    """Beats until this process ends."""

    def __init__(self, lines: Lines) -> None:
        """Starts to beat."""
        super().__init__(name="funczero-pulse", daemon=True)
        self.lines, self._stop_it = lines, threading.Event()
        self.beat()
        self.start()

    def beat(self) -> None:
        """One beat."""
        self.lines.back.ask("set", f"{SPACE}/beat/{self.lines.rank}", repr(time.monotonic()))

    def run(self) -> None:
        """Beat."""
        with contextlib.suppress(CheckpointError):  # the store is gone: nobody listens
            while not self._stop_it.wait(self.lines.beat):
                self.beat()

    def leave(self) -> None:
        """The process ends: the one who holds the store stays until the others have what they need from it, and are
        told that this one goes.
        """
        own = self.lines
        if own.process != os.getpid() or not self.is_alive():
            return
        with contextlib.suppress(CheckpointError):  # the store is gone: nobody listens
            until = time.monotonic() + LEAVE
            while own.holds and time.monotonic() < until and any(self._needs(r) for r in range(1, own.size)):
                time.sleep(0.02)
            own.back.ask("set", f"{SPACE}/left/{own.rank}", b"1")
        self._stop_it.set()
        self.join()

    def _needs(self, rank: int) -> bool:
        """Has a rank not yet acknowledged the last call of some checkpointer, though it is there?"""
        ask = self.lines.back.ask
        there = lambda key: ask("get", key) if ask("check", [key]) else b""
        late = any(int(there(f"{space}/over/{rank}") or 0) < n for space, n in list(self.lines.numbers.items()))
        return (
            late and not there(f"{SPACE}/left/{rank}") and not presence.ended(there(f"{presence.KEY}/{rank}").decode())
        )
