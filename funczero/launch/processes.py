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


def childless() -> bool:
    """Has this process no child, alive or still to be reaped? One that adopts orphans then has no descendant either.

    A look through /proc takes a while, in which a parent may end after its child was read and before it is read itself:
    then nothing seems to be left, and something is.
    """
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


class Ending:
    """The end of the tree of a process that adopts orphans and reaps: SIGTERM once, SIGKILL to what is left after
    GRACE, again and again until nothing is.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, look: Callable[[], list[int]] = descendants
    ) -> None:
        self.clock, self.look, self.kill_at = clock, look, clock() + GRACE
        send(look(), signal.SIGTERM)

    def over(self) -> bool:
        """One look: whether nothing is left; kills when the grace has passed."""
        if self.clock() >= self.kill_at:
            send(self.look(), signal.SIGKILL)
        return childless()


def exit_status(code: int) -> int:
    """An exit code as a shell writes it: 128 + the signal's number for a process that a signal ended."""
    return code if code >= 0 else 128 - code
