"""Two processes watch over a host's ranks, so that either may be killed: the guard does the work, its parent cleans up
behind it.

Law: whichever single process of a launch is killed, nothing that was started stays, and no folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable

from funczero.launch.processes import Ending, adopt_orphans, die_with_parent, exit_status, reap

PASSED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def keep(guard: Callable[[Callable[[str], None]], int]) -> int:
    """Run the guard in a fork of this process, then end whatever descends from it and remove its folder; the exit code
    is the guard's.

    The guard is sent SIGTERM when this process is killed. When the guard is, its children become this one's (Linux's
    subreaper).

    Args:
      guard: returns an exit code; it hands the folder that it is about to make to its argument.
    """
    adopt_orphans()
    told, tell = os.pipe()
    parent, child = os.getpid(), os.fork()
    if not child:
        code = 1
        try:
            os.close(told)
            die_with_parent(signal.SIGTERM)
            if os.getppid() == parent:
                code = guard(lambda folder: _write(tell, folder))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(tell)
    for number in PASSED:
        signal.signal(number, lambda n, _: _send(child, n))
    while (ended := os.wait())[0] != child:
        pass
    ending = Ending()
    while not ending.over():
        reap()
        time.sleep(0.02)
    with os.fdopen(told, "rb") as file:
        os.set_blocking(told, False)
        folder = (file.read() or b"").decode(errors="surrogateescape")
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    return exit_status(os.waitstatus_to_exitcode(ended[1]))


def _write(fd: int, folder: str) -> None:
    os.write(fd, os.fsencode(folder))


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
