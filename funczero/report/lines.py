"""A file of JSON lines as it grows, or begins anew: whole lines, and by number those that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from funczero.world.plain import plain

BLOCK = 1 << 20  # bytes read at once, and the longest line
DECODER = json.JSONDecoder()
TOLD = 20  # broken lines that are told one by one


class Lines:
    """Reads what is new in a file, in bounded memory.

    Law: reading a file in any pieces, as it grows, gives the lines of reading it once.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "metrics.jsonl")
    ...     _ = path.write_text('{"step": 1}\\nno\\n{"step"')
    ...     lines = Lines(path)
    ...     first, half = list(lines.new()), lines.half
    ...     _ = path.open("a").write(': 2}\\n')
    ...     print(first, half, list(lines.new()), lines.told())
    [(1, {'step': 1})] True [(3, {'step': 2})] ['metrics.jsonl:2: no JSON']
    """

    def __init__(self, path: Path) -> None:
        """The file need not be there yet."""
        self.path = path
        self._file: BinaryIO | None = None
        self._forget()

    def _forget(self) -> None:
        self.count, self.broken, self._told = 0, 0, list[str]()
        self._rest, self._skips = b"", False

    @property
    def half(self) -> bool:
        """Does the file end within a line?"""
        return bool(self._rest) or self._skips

    def began_anew(self) -> bool:
        """Is it another file than the one that was read, or a shorter one? Then all is read again."""
        if self._file is None:
            return False
        try:
            found, ours = os.stat(self.path), os.fstat(self._file.fileno())
        except FileNotFoundError:
            return False
        if os.path.samestat(found, ours) and found.st_size >= self._file.tell():
            return False
        self._file.close()
        self._file = None
        self._forget()
        return True

    def new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, object) of every whole line that was not read yet; a file that is not there has none."""
        if self._file is None:
            try:
                self._file = self.path.open("rb")  # kept open: what is read on is the file that was begun
            except FileNotFoundError:
                return
        while block := self._file.read(BLOCK):
            *whole, self._rest = (self._rest + block).split(b"\n")
            for line in whole:
                self.count += 1
                if self._skips:  # the end of one that is too long
                    self._skips = False
                    continue
                record = self._parsed(line)
                if record is not None:
                    yield self.count, record
            if len(self._rest) > BLOCK:
                if not self._skips:
                    self.wrong(self.count + 1, f"longer than {BLOCK:,} bytes")
                self._rest, self._skips = b"", True

    def _parsed(self, line: bytes) -> dict[str, Any] | None:
        try:
            record = DECODER.decode(line.decode())
        except (ValueError, RecursionError):
            self.wrong(self.count, "no JSON" if line.strip() else "empty")
            return None
        if not isinstance(record, dict):
            self.wrong(self.count, "no JSON object")
            return None
        return record

    def wrong(self, number: int, why: str) -> None:
        """A line is not what it should be."""
        self.broken += 1
        if len(self._told) < TOLD:
            self._told.append(f"{self.path.name}:{number}: {plain(why)}")

    def told(self) -> list[str]:
        """The lines that are wrong, and that there are more."""
        more = self.broken - len(self._told)
        return self._told + [f"{self.path.name}: and {more:,} lines more like these"] * (more > 0)
