"""`funczero report` and `funczero watch`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """The subcommands."""
    text = "one page of HTML about runs: curves, skips, bytes, memory, chain, and where their bits part"
    p = commands.add_parser("report", help=text, description=text)
    p.add_argument("runs", nargs="+", metavar="RUN", help="the --out of a run: a folder with metrics.jsonl")
    p.add_argument("--out", default="report.html", help="the page; it is replaced")
    p.set_defaults(run=_report)
    text = "a run in the terminal while it grows; ends when the run is finished, or by ctrl-c"
    p = commands.add_parser("watch", help=text, description=text)
    p.add_argument("folder", metavar="RUN", help="the --out of a run: a folder with metrics.jsonl")
    p.add_argument("--once", action="store_true", help="one frame as plain lines")
    p.add_argument("--every", type=float, help="seconds between two looks; 1 on a terminal, 10 elsewhere")
    p.set_defaults(run=_watch)


def _report(args: argparse.Namespace) -> int:
    """Writes the page; what was wrong in the folders is told here, too."""
    from funczero.report.page import write

    out = Path(args.out)
    for run in write([Path(run) for run in args.runs], out):
        for line in run.troubles():
            print(f"{run.name}: {line}")
    print(f"{out} ({out.stat().st_size:,} bytes)")
    return 0


def _watch(args: argparse.Namespace) -> int:
    """Shows the run."""
    from funczero.report.watch import watch

    if args.every is not None and not 0.05 <= args.every <= 86400:
        raise ValueError(f"watch: --every={args.every} is no number of seconds from 0.05 to 86400; write --every=1")
    return watch(Path(args.folder), args.once, args.every)
