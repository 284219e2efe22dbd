"""torchrun's agent in a child of the node: it starts the ranks, restarts them, and says who ended how."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from funczero.launch.processes import die_with_parent


def fork_agent(arguments: list[str], output: int, told: int, meet: Callable[[Callable[[str], None]], None]) -> int:
    """Run torchrun with these arguments in a fork of this process, which has already imported torch; returns its
    process id.

    Args:
      arguments: torchrun's command line.
      output: the file descriptor for whatever the agent itself prints.
      told: a pipe for lines of JSON: {"pid", "code", "at"} for every rank that ends, at which moment of
        the monotonic clock; {"error"} when the agent cannot go on, {"note"} for the user.
      meet: called in the fork, before torchrun is: makes known how agents meet; it is handed what tells a note.
    """
    parent, child = os.getpid(), os.fork()
    if child:
        return child
    code = 1
    try:
        die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for at, fd in enumerate((nothing, output, output)):
            os.dup2(fd, at)
        meet(lambda note: tell(told, note=note))
        code = _run(arguments, told)
    finally:
        os._exit(code)


def _run(arguments: list[str], told: int) -> int:
    logging.disable(logging.CRITICAL)  # the launcher says it, once
    threading.Thread(target=_watch, args=(told,), name="funczero-agent", daemon=True).start()
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as failed:
        for failure in failed.failures.values():
            tell(told, pid=failure.pid, code=failure.exitcode, at=time.monotonic())
        return 1
    except SignalException:
        return 1
    except Exception as error:  # such as a rendezvous that never came together: the node ends with it
        tell(told, error=f"{type(error).__name__}: {error}"[:2000])
        return 1
    return 0


def _watch(told: int) -> None:
    """Tell how each rank ends the moment it does; WNOWAIT leaves it to the agent, who looks a tenth of a second
    later.
    """
    seen: dict[int, float] = {}
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            ended = None
        # none yet, or the agent has not collected it
        if ended is None or time.monotonic() - seen.get(ended.si_pid, -1e9) < 5:
            time.sleep(0.02)
            continue
        seen[ended.si_pid] = at = time.monotonic()
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        tell(told, pid=ended.si_pid, code=code, at=at)


def tell(pipe: int, **what: Any) -> None:
    """One line of JSON, short enough for a pipe to take it whole."""
    os.write(pipe, json.dumps(what).encode() + b"\n")
