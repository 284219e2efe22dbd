"""`funczero launch`: starts the nodes, shows what they say, ends all of them when one fails, and starts again on the
hosts that are left.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from funczero.launch.error import LaunchError
from funczero.launch.flags import hint, parse, parser, silent
from funczero.launch.generation import NOTICES, Launch, start
from funczero.launch.job import Plan, make_plan, without
from funczero.launch.processes import exit_status
from funczero.launch.report import Report
from funczero.launch.transports import RANK_LAUNCHERS, Command, describe, rank_launcher


def main(argv: Sequence[str]) -> int:
    """The whole command; 2 for bad input, otherwise the exit code of the rank that failed first, 128 + N for signal N,
    255 for a lost host.

    Source: the `deepspeed` command; torchrun starts, watches and restarts the ranks of every host.
    """
    if any(word in ("-h", "--help") for word in argv[:1]):
        parser().print_help()
        return 0
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        if sys.platform != "linux":
            raise LaunchError(
                f"the end of every process is promised by Linux alone, and this is {sys.platform}; start the script"
                " with torchrun"
            )
        options = parse(argv)
        plan = make_plan(options, os.environ, os.getcwd())
        if hint(options) and not silent(options):
            print(f"funczero launch: {hint(options)}", file=sys.stderr)
        if options.dry_run:
            print(describe(plan))
            return 0
        if options.preflight:
            from funczero.launch.preflight import preflight

            return preflight(plan)
        with saved_pid() if options.save_pid else contextlib.nullcontext():
            if options.launcher in RANK_LAUNCHERS:
                return run_ranks(rank_launcher(plan), options.launcher)
            return run_nodes(plan)
    except ValueError as error:
        print(f"funczero launch: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def saved_pid() -> Iterator[None]:
    """This process's id in a file of the temporary folder, while the run lasts.

    Raises:
      LaunchError: the file is there already, or cannot be written.
    """
    path = Path(tempfile.gettempdir(), f"{os.getpid()}.deepspeed")
    try:
        with path.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        raise LaunchError(f"--save_pid: {path} is there already, of an older run; delete it") from None
    except OSError as error:
        raise LaunchError(f"--save_pid: {path} cannot be written ({error.strerror}); leave the option out") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def run_ranks(command: Command, launcher: str) -> int:
    """Let an MPI launcher or SLURM start the ranks; its exit code is theirs, signals are passed on."""
    process = start(command, stdin=subprocess.DEVNULL)
    passed = {signal.SIGINT: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1}
    # mpirun ends a job on SIGTERM, and hands SIGUSR1 on
    passed[signal.SIGTERM] = signal.SIGTERM if launcher == "slurm" else signal.SIGUSR1
    came: list[int] = []

    def hand_on(number: int, _: Any) -> None:
        process.send_signal(passed[signal.Signals(number)] if not came else signal.SIGTERM)
        came.append(number)

    for number in passed:
        signal.signal(number, hand_on)
    code = exit_status(process.wait())
    return code or next((128 + n for n in came if n in (signal.SIGINT, signal.SIGHUP)), 0)


def run_nodes(plan: Plan) -> int:
    """Every generation of a run: a new one begins on the hosts that are left when some are lost and restarts are."""
    o, used = plan.options, 0
    report = Report(len(plan.nodes), plan.world, o.log_dir, silent(o))
    inbox: queue.SimpleQueue[tuple[int | None, str, Any]] = queue.SimpleQueue()
    for number in (signal.SIGINT, signal.SIGHUP, *NOTICES):
        signal.signal(number, lambda n, _: inbox.put((None, "signal", n)))
    while True:
        launch = Launch(plan, report, inbox, restarts=o.max_restarts - used)
        try:
            launch.run()
        except BrokenPipeError:  # nobody reads our output any more
            launch.end()
            launch.cut()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 128 + signal.SIGPIPE
        lost = {f.host for f in launch.failures if f.lost}
        left = [node for node in plan.nodes if node.host not in lost]
        used += max(launch.restarted, 0)
        if not (lost and left and used < o.max_restarts and not launch.came):
            return launch.code()
        used += 1
        report.say(
            f"{', '.join(lost)} lost; start {used} of at most {o.max_restarts} again, on"
            f" {', '.join(node.host for node in left)}"
        )
        report.release(0.0, everything=True)
        plan = without(plan, lost)
