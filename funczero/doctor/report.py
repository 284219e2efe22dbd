"""The report of `funczero doctor`, and its exit code."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

from funczero.doctor.findings import WRONG, Finding


def add_command(commands: argparse._SubParsersAction) -> None:
    """`funczero doctor` among the command's words."""
    p = commands.add_parser("doctor", help="what this machine has, what of it is used, and whether two processes train")
    p.add_argument("--no_trial", action="store_true", help="without the self-test, which starts processes")
    p.set_defaults(run=doctor)


def doctor(args: argparse.Namespace) -> int:
    """Prints what is found as it is found; exit code 1 where something that every run needs is missing or fails."""
    from funczero.doctor.findings import findings

    found = list[Finding]()
    for line in lines(_noted(findings(), found)):
        print(line, flush=True)
    if not args.no_trial:
        from funczero.doctor.trial import trial

        for line in lines(_noted(iter([trial()]), found)):
            print(line, flush=True)
    wrong = [f for f in found if f.mark == WRONG]
    print(f"\n{'all is well' if not wrong else ', '.join(f'{f.name}: {f.what}' for f in wrong)}")
    return 1 if wrong else 0


def _noted(found: Iterable[Finding], kept: list[Finding]) -> Iterator[Finding]:
    for f in found:
        kept.append(f)
        yield f


def lines(found: Iterable[Finding]) -> Iterator[str]:
    """A heading a room and a line a finding.

    >>> found = [Finding("packages", "numpy", "2", "required"), Finding("memory", "/tmp", "1", "files")]
    >>> for line in lines(found):
    ...     print(line)
    packages
      ok numpy             2                                         required
    memory
      ok /tmp              1                                         files
    """
    room = ""
    for f in found:
        if f.room != room:
            room = f.room
            yield room
        yield f"  {f.mark:<2} {f.name:<17} {f.what:<41} {f.use}"
