"""The processes of an experiment that nobody else has started: they begin together and end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread

from rich.console import Console

from funczero.launch.processes import die_with_parent, exit_status

PARENT = "FUNCZERO_SCRIPT_PARENT"  # the process that started this one and will end it


def launch(
    script: str, world: int, threads: int, folder: Path, saves: bool, meanwhile: Callable[[], None] = lambda: None
) -> int:
    """Run this command line in `world` processes, as torchrun would; when one ends badly all end, and its log is shown.
    Returns the exit status.

    Args:
      script: how messages name it.
      threads: of each process.
      folder: for what they write to stderr, rank0.log and so on.
      saves: SIGTERM and SIGUSR1 are passed on, and each process saves and ends; otherwise SIGTERM ends all.
      meanwhile: called in a thread while the processes begin; it may take until they end.
    """
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    # the processes inherit it: ctrl-c reaches this one alone, and this one ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ranks = _started(world, threads, logs)

    def passed_on(number: int, _: object) -> None:  # each saves at its next step boundary, and ends
        for p in ranks:
            if p.poll() is None:
                p.send_signal(number)

    signal.signal(signal.SIGTERM, passed_on if saves else lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGUSR1, passed_on if saves else signal.SIG_DFL)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(128 + signal.SIGINT))
    beside = Thread(target=meanwhile, daemon=True)  # a run that fails ends without it
    beside.start()
    try:
        while any(p.poll() is None for p in ranks) and not any(p.poll() for p in ranks):
            time.sleep(0.05)
        bad = [rank for rank, p in enumerate(ranks) if p.poll()]
    finally:
        for p in ranks:
            p.kill()
            p.wait()
        Console().show_cursor()  # a bar that was killed leaves it hidden
    if not bad:
        beside.join()
        return 0
    first = min(bad, key=lambda rank: logs[rank].stat().st_mtime)  # the others fail because the first one did
    status = ranks[first].returncode
    log = logs[first].read_text(errors="replace")
    print(f"{log}{script}: process {first} of {world} ended with status {status}", file=sys.stderr)
    return exit_status(status)


def _started(world: int, threads: int, logs: Sequence[Path]) -> list[subprocess.Popen[bytes]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": threads,
        PARENT: os.getpid(),
    }
    ranks = []
    for rank, log in enumerate(logs):
        env = os.environ | {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        with log.open("wb") as stderr:
            ranks.append(subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=env, stderr=stderr))
    return ranks


def follow_parent() -> bool:
    """A process that `launch` has started ends when that one does, however it ends; others stay as they are. Has it?"""
    parent = os.environ.pop(PARENT, "")
    if parent and sys.platform == "linux":
        die_with_parent()
        if os.getppid() != int(parent):  # it has ended already
            os._exit(1)
    return bool(parent)
