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


def _report(args: argparse.Namespace) -> int:
    """Writes the page; what was wrong in the folders is told here, too."""
    from funczero.report.page import write

    out = Path(args.out)
    for run in write([Path(run) for run in args.runs], out):
        for line in run.troubles():
            print(f"{run.name}: {line}")
    print(f"{out} ({out.stat().st_size:,} bytes)")
    return 0
