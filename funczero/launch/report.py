"""What a launch shows: every rank's lines under its name, and at the end the one traceback that explains the others."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple, TextIO

from funczero.launch.processes import exit_status

TRACEBACK = "Traceback (most recent call last):"
HOLD = 10.0  # seconds that a traceback is held back: its rank may be about to end


class Failure(NamedTuple):
    """A rank that ended badly, or a host (rank None) that did."""

    began: float
    host: str
    rank: int | None
    code: int
    why: str = ""
    lost: bool = False  # the host itself: it may be left out and the run started again


class Report:
    """Prints lines as they come; holds a rank's traceback until it is known whether the rank ends with it."""

    def __init__(self, hosts: int, world: int, log_dir: str = "", silent: bool = False) -> None:
        """silent: of the launcher's own words those about failures alone."""
        self.silent = silent
        self.hosts, self.world, self.folder = hosts, world, Path(log_dir) if log_dir else None
        self.held: dict[int, tuple[float, str, list[str]]] = {}  # by rank: since when, whose, what
        self.files: dict[int, TextIO] = {}
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def lines(self, host: str, rank: int | None, lines: list[str], err: bool) -> None:
        """Lines of a rank, or of a host itself."""
        if rank is None:
            return self._print(f"[{host}] ", lines, sys.stderr)
        if self.folder:
            self._file(rank).writelines(f"{line}\n" for line in lines)
            self._file(rank).flush()
        if err and rank not in self.held and any(TRACEBACK in line for line in lines):
            at = next(i for i, line in enumerate(lines) if TRACEBACK in line)
            self._show(host, rank, lines[:at], err)
            self.held[rank], lines = (time.monotonic(), host, []), lines[at:]
        if err and rank in self.held:
            since, _, held = self.held[rank]
            self.held[rank] = (since, host, held + lines)
        else:
            self._show(host, rank, lines, err)

    def release(self, now: float, everything: bool = False) -> None:
        """Show tracebacks that nobody died of."""
        for rank, (since, host, lines) in list(self.held.items()):
            if everything or now - since > HOLD:
                del self.held[rank]
                self._show(host, rank, lines, True)

    def failed(self, failures: list[Failure]) -> Failure:
        """The first failure is the cause: its traceback is the last thing printed, the others are a line each.
        Returns it.
        """
        first = min(failures, key=lambda f: (f.rank is not None and any(g.rank is None for g in failures), f.began))
        tracebacks = {rank: lines for rank, (_, _, lines) in self.held.items()}
        self.held.clear()
        for other in sorted(failures, key=lambda f: f.began):
            if other is not first:
                last = next(
                    (
                        line
                        for line in reversed(tracebacks.get(other.rank if other.rank is not None else -1, []))
                        if line.strip()
                    ),
                    other.why,
                )
                self.say(f"after it {self._name(other)} {_how(other)}{f': {last}' if last else ''}")
        self.say(f"{self._name(first)} {_how(first)}{f': {first.why}' if first.why else ''}")
        self._print("", tracebacks.get(first.rank, []) if first.rank is not None else [], sys.stderr)
        if self.folder and first.rank is not None:
            self.say(f"its output is in {self.folder}/rank{first.rank}.log") if not tracebacks.get(first.rank) else None
        return first

    def say(self, text: str) -> None:
        """The launcher's own words."""
        self._print("funczero launch: ", [text], sys.stderr)

    def note(self, text: str) -> None:
        """Words that are about no failure."""
        if not self.silent:
            self.say(text)

    def _name(self, f: Failure) -> str:
        return f"rank {f.rank} on {f.host}" if f.rank is not None else f"host {f.host}"

    def _show(self, host: str, rank: int, lines: list[str], err: bool) -> None:
        prefix = "" if self.world == 1 else f"[rank {rank}] " if self.hosts == 1 else f"[{host}:{rank}] "
        if not self.folder:
            self._print(prefix, lines, sys.stderr if err else sys.stdout)

    def _print(self, prefix: str, lines: list[str], stream: TextIO) -> None:
        stream.write("".join(f"{prefix}{line}\n" for line in lines))
        stream.flush()

    def _file(self, rank: int) -> TextIO:
        if rank not in self.files:
            assert self.folder
            self.files[rank] = (self.folder / f"rank{rank}.log").open("w", errors="replace")
        return self.files[rank]


def _how(f: Failure) -> str:
    code, status = f.code, exit_status(f.code)
    if f.rank is None:
        return "was lost" if f.lost else "could not run its part"
    if code < 0:
        return (
            f"was ended by {signal.Signals(-code).name} (exit code"
            f" {status}{'; the system may have run out of memory' if code == -signal.SIGKILL else ''})"
        )
    return f"failed with exit code {status}"
