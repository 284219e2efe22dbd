"""Process trees: who descends from this process, ending all of them, and dying with one's parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable

GRACE = 3.0  # seconds between SIGTERM and SIGKILL


def adopt_orphans() -> None:
    """From here on, processes whose parent ends become this one's children (Linux's subreaper), so that none is
    lost.
    """
    if ctypes.CDLL(None).prctl(36, 1) != 0:  # PR_SET_CHILD_SUBREAPER
        raise OSError(
            "this kernel has no subreapers, so the end of all processes could not be promised; Linux 3.4 or newer is"
            " needed"
        )


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Be sent a signal when the parent ends, however it ends."""
    ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


def descendants() -> list[int]:
    """Everything that lives and descends from this process, children first."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except OSError:
                continue  # it has just ended
            if state != b"Z":
                children.setdefault(int(parent), []).append(int(name))
    found = list(children.get(os.getpid(), []))
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def reap() -> dict[int, int]:
    """Exit codes of the children that have ended, by process id; below zero: the signal."""
    codes: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return codes
        if pid == 0:
            return codes
        codes[pid] = os.waitstatus_to_exitcode(status)


def send(pids: list[int], number: int) -> None:
    """A signal to each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Ending:
    """The end of a tree: SIGTERM once, SIGKILL to what is left after GRACE, again and again until nothing is."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.kill_at = clock, clock() + GRACE
        send(descendants(), signal.SIGTERM)

    def over(self) -> bool:
        """One look: whether nothing is left; kills when the grace has passed."""
        left = descendants()
        if left and self.clock() >= self.kill_at:
            send(left, signal.SIGKILL)
        return not left


def exit_status(code: int) -> int:
    """An exit code as a shell writes it: 128 + the signal's number for a process that a signal ended."""
    return code if code >= 0 else 128 - code
