"""Worlds for tests: pools of processes that stay, so that torch is imported once and not in every test."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from funczero.testing.worker import Reply, join_world, serve
from funczero.world import rendezvous

# imported once, by the server that workers are forked from
PRELOAD = ("torch.distributed.device_mesh", "funczero.testing.pool")
GRACE = 5.0  # seconds that the other ranks have once one has raised
START = 120.0  # seconds for all ranks to join their world, the first import of torch included


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


class WorkerPool:
    """Processes 0 .. size - 1 of one gloo world on this machine, started at the first run and kept.

    `run(fn, *args)` calls a module-level function in all of them and returns the results by rank. In a worker torch has
    one thread, `dist` is initialised and RANK, WORLD_SIZE, LOCAL_RANK are set. Workers import what the caller can
    import. Tensors are sent by value.

    A run that fails ends its workers, for their collectives may be out of step, and so does every `runs`-th, because
    process groups that were made in a run stay in the process; the next run starts new ones, in tenths of a second.

    >>> with WorkerPool(2) as pool:
    ...     pool.run(os.getenv, "RANK")
    ['0', '1']
    """

    def __init__(self, size: int, preload: Iterable[str] = (), runs: int = 50, grace: float = GRACE) -> None:
        """A pool of `size` ranks; `preload` names modules to import before the fork, where this is the first pool to
        start; `grace` is how many seconds the other ranks have once one has raised.
        """
        if size < 1:
            raise ValueError(f"WorkerPool: a world has at least one process, but size is {size}; write a positive size")
        self.size, self.runs, self.grace, self._preload = size, runs, grace, tuple(preload)
        self._workers: list[_Worker] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._store: Any = None
        self._left = 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """`fn(*args)` in every rank; the results by rank.

        Args:
          fn: a function at the top level of a module, or a `functools.partial` of one.
          timeout: seconds for all ranks together, starting the workers not included.

        Raises:
          the exception of the rank that raised first, with a note that names the rank and shows its traceback; the
          others are given `grace` seconds to answer.
          RuntimeError: a worker ended by itself.
          TimeoutError: names the ranks that did not answer, and shows where they were.
        """
        __tracebackhide__ = True  # pytest shows the caller and the rank's own traceback
        message = _dump(fn, args)
        if self._left <= 0:
            self.close()
        if not self._workers:
            self._start()
        self._left -= 1
        return self._exchange([message] * self.size, timeout, getattr(fn, "__name__", repr(fn)))

    def close(self) -> None:
        """End the workers, these processes only; a later run starts new ones."""
        for process, pipe in self._workers:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
            pipe.close()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._store = None

    def _start(self) -> None:
        """Fork the workers from a server that has imported torch and has no threads. The world's store is this
        process's: torch's store in a file stands still for everybody, whatever the timeout, once a rank was killed amid
        a record.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, *self._preload])
        self._folder = tempfile.TemporaryDirectory(prefix="funczero-world-")
        listener = rendezvous.listen("127.0.0.1", 0, alone=True)
        port = listener.port
        self._store = rendezvous.serve(listener, "127.0.0.1", port)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), name=f"rank{rank}of{self.size}", daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
        self._left = self.runs
        self._exchange(
            [_dump(join_world, (rank, self.size, self._folder.name, port)) for rank in range(self.size)],
            START,
            "starting the workers",
        )

    def _exchange(self, messages: list[bytes], timeout: float, what: str) -> list[Any]:
        """One message to each rank and one reply from each, or the error that explains why not."""
        __tracebackhide__ = True
        replies: dict[int, Reply] = {}
        try:
            deadline = time.monotonic() + timeout
            for worker, message in zip(self._workers, messages, strict=True):
                _send(worker.pipe, message)
            waiting: dict[Any, int] = {worker.pipe: rank for rank, worker in enumerate(self._workers)}
            while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
                for pipe in ready:
                    rank = waiting.pop(pipe)
                    replies[rank] = _receive(self._workers[rank])
                    if replies[rank].error is not None:
                        deadline = min(deadline, time.monotonic() + self.grace)
            if len(replies) < self.size or any(r.error is not None for r in replies.values()):
                raise self._explain(replies, timeout, what)
        except BaseException:
            self.close()
            raise
        return [replies[rank].value for rank in range(self.size)]

    def _explain(self, replies: dict[int, Reply], timeout: float, what: str) -> BaseException:
        """The first rank's own exception with its rank and traceback as a note, or a TimeoutError that names the
        silent ranks.
        """
        silent = [rank for rank in range(self.size) if rank not in replies]
        where = self._stacks(silent)
        raised = sorted((reply.when, rank) for rank, reply in replies.items() if reply.error is not None)
        if not raised:
            return TimeoutError(
                f"{what}: ranks {silent} of {self.size} did not answer within {timeout:g} s and were ended; this is"
                f" where they were\n{where}"
            )
        first = raised[0][1]
        error, others = replies[first].error, sorted(rank for _, rank in raised[1:])
        assert error is not None
        note = f"{what}: rank {first} of {self.size} raised first"
        note += f"; so did ranks {others}" if others else ""
        note += f"; ranks {silent} had not answered {self.grace:g} s later and were ended" if silent else ""
        error.add_note(f"{note}\n{replies[first].text}{where}")
        return error

    def _stacks(self, ranks: list[int]) -> str:
        """Where these ranks are right now, as their own fault handlers write it."""
        if not ranks or self._folder is None:
            return ""
        files = {rank: Path(self._folder.name, f"stack{rank}") for rank in ranks}
        for rank, file in files.items():
            process = self._workers[rank].process
            # the file is there once the handler is
            if file.exists() and process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return "".join(
            f"rank {rank}:\n{file.read_text() if file.exists() else '  not started'}" for rank, file in files.items()
        )


def _dump(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """A call as bytes, with where to import from. Plain pickle: tensors go by value, not as handles to shared
    memory.
    """
    try:
        return pickle.dumps((sys.path, pickle.dumps((fn, args))))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        name = getattr(fn, "__qualname__", repr(fn))
        raise TypeError(
            f"WorkerPool.run: cannot send {name} and its arguments to the workers; give a function at a module's top"
            f" level ({error})"
        ) from error


def _send(pipe: Connection, message: bytes) -> None:
    """Send to a worker; one that has died is found when its reply is read."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        pipe.send_bytes(message)


def _receive(worker: _Worker) -> Reply:
    """A worker's reply; a worker that ended instead comes before all others, whose errors are likely to follow from
    it.
    """
    try:
        return Reply(*pickle.loads(worker.pipe.recv_bytes()))
    except (EOFError, ConnectionResetError):
        worker.process.join(GRACE)
        return Reply(
            RuntimeError(f"the process ended by itself, with exit code {worker.process.exitcode}"), None, 0.0, ""
        )
