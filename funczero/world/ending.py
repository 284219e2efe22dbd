"""What is still to be done when a process ends: saves under way are waited for, what was lost is said, and who holds
the store leaves last.

Facts: the interpreter first calls what was registered with threading, last one first, then waits for threads, then
calls what was registered with atexit. The pools of concurrent.futures, which orbax works with, are closed in the first
of these, so a save has to be waited for before that.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import threading
from functools import cache
from typing import Any


class Guest(threading.Thread):
    """A thread that takes its leave of other processes when this one ends, after all work."""

    def leave(self) -> None:
        """Say so, and stop."""
        raise NotImplementedError


class Work(threading.Thread):
    """Work that the end of the process waits for; an error that nobody was told keeps the thread until then."""

    def __init__(self, name: str, what: str) -> None:
        """what: as a sentence names it."""
        super().__init__(name=name)  # no daemon: a process that ends waits for it
        prepared()
        self.what, self.error = what, None
        self.ended, self.told = threading.Event(), threading.Event()

    error: BaseException | None

    def work(self) -> None:
        """What it does."""
        raise NotImplementedError

    def run(self) -> None:
        """Work; what is raised waits for somebody to be told."""
        try:
            self.work()
        except BaseException as e:
            self.error = e
        finally:
            self.ended.set()
        if self.error is not None and prepared():
            self.told.wait()

    def result(self) -> None:
        """Wait for it, and raise what it raised."""
        self.ended.wait()
        self.told.set()
        if self.error is not None:
            raise self.error


@cache
def prepared() -> bool:
    """Once a process: its end waits for what is under way. False where this Python has no place for that."""
    lost: list[str] = []
    register: Any = getattr(threading, "_register_atexit", None)
    if register is None:
        return False
    try:
        import concurrent.futures.thread  # noqa: F401  # its own farewell, registered now, comes after ours

        register(lambda: _farewell(lost))
    except RuntimeError:  # the interpreter is ending already
        return False
    atexit.register(lambda: _exit_code(lost))
    return True


def finish() -> list[str]:
    """Wait for what is under way; what was lost without anybody being told, each said by one sentence. For whoever
    ends the process at once.
    """
    lost = []
    for work in [t for t in threading.enumerate() if isinstance(t, Work)]:
        try:
            work.ended.wait()
            error = work.error
        except KeyboardInterrupt as e:
            error = e
        if error is not None and not work.told.is_set():
            lost.append(work.what)
            print(
                f"funczero: {work.what} is lost, though this process ends: {type(error).__name__}: {error}",
                file=sys.stderr,
                flush=True,
            )
        work.told.set()
    return lost


def _farewell(lost: list[str]) -> None:
    lost += finish()
    for guest in [t for t in threading.enumerate() if isinstance(t, Guest)]:
        guest.leave()
    if multiprocessing.parent_process() is not None:  # a child of multiprocessing does not come to its atexit
        _exit_code(lost)


def _exit_code(lost: list[str]) -> None:
    """The process ends with an error where something was lost."""
    if lost:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
