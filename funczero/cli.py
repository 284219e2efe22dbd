"""The `funczero` command."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from funczero.checkpoint.cli import add as add_checkpoint_commands
from funczero.core.version import version_of
from funczero.deepspeed.config.explain import add_commands as add_config_commands
from funczero.doctor.report import add_command as add_doctor
from funczero.planning.cli import add as add_plan_command
from funczero.report.cli import add as add_report_commands


def main(argv: Sequence[str] | None = None) -> int:
    """`funczero {doctor, parity, launch, inspect, verify, diff, export, import, config, plan, report, watch}`.

    Exit code 1: a promise is broken, things differ or do not fit, or something is missing; 2: bad input.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["launch"]:
        return _launch(words[1:])
    parser = argparse.ArgumentParser(prog="funczero", description="ZeRO as a chain of pure functions, on torch.")
    parser.add_argument("--version", action=_Version, nargs=0, help="this one, and those of torch and Python")
    parser.add_argument(
        "--print-completion", action=_Completion, choices=("bash", "zsh"), help="words for that shell, by shtab"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "parity", help="run your step builder at every stage and world, and compare", description=_parity.__doc__
    )
    p.add_argument(
        "file",
        nargs="?",
        help="a .py file or a module with make_step(stage=, accumulate=) -> (step, params) and make_batch(t)",
    )
    p.add_argument("--stages", default="0,1,2,3", help="ZeRO stages, comma-separated")
    p.add_argument("--worlds", default="1,2,4", help="numbers of processes, comma-separated")
    p.add_argument(
        "--micro_batches", type=int, default=8, help="micro-batches of one update, on all processes together"
    )
    p.add_argument("--updates", type=int, default=5, help="updates a run")
    p.add_argument("--tolerance", type=float, default=1e-5, help="largest allowed difference to the unsharded run")
    p.set_defaults(run=_parity)
    commands.add_parser(
        "launch", add_help=False, help="one command for one machine or a hostfile of them; funczero launch --help"
    )
    add_doctor(commands)
    add_checkpoint_commands(commands)
    add_config_commands(commands)
    add_plan_command(commands)
    add_report_commands(commands)
    try:
        args = parser.parse_args(words)
        return args.run(args)
    except BrokenPipeError:  # the reader, as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ValueError as e:
        print(f"funczero: {e}", file=sys.stderr)
        return 2


class _Version(argparse.Action):
    """Prints the version of this package and of what it stands on, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        """Nothing is asked of packages before."""
        own, torch = version_of("funczero", "from its folder"), version_of("torch")
        print(f"funczero {own}, torch {torch}, Python {platform.python_version()}")
        parser.exit(0)


class _Completion(argparse.Action):
    """Prints what a shell completes, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        """values: the shell."""
        try:
            import shtab
        except ImportError:
            parser.exit(2, f"funczero: {option} needs shtab, which is not installed; write pip install shtab\n")
        print(shtab.complete(parser, values))
        parser.exit(0)


def _launch(words: Sequence[str]) -> int:
    """Everything behind the script is the script's, so these words are not argparse's."""
    from funczero.launch.run import main

    return main(words)


def _numbers(text: str, what: str) -> list[int]:
    parts = [x.strip() for x in text.split(",") if x.strip()]
    if not parts or not all(x.isdigit() for x in parts):
        raise ValueError(f"parity: --{what}={text!r} is not a list of numbers; write for example --{what}=1,2,4")
    return [int(x) for x in parts]


def _parity(args: argparse.Namespace) -> int:
    """Runs a step builder at every stage and world on this machine and prints hashes, differences, bytes and
    seconds.
    """
    from funczero.testing.parity import load, parity

    where = args.file or "funczero.testing.example"
    for name in ("make_step", "make_batch"):
        load(f"{where}:{name}")
    report = parity(
        f"{where}:make_step", f"{where}:make_batch", _numbers(args.stages, "stages"), _numbers(args.worlds, "worlds"),
        args.micro_batches, args.updates, args.tolerance,
    )  # fmt: skip
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
