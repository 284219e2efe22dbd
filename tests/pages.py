"""The code blocks of docs/ and how they are tried.

What a fence says decides: `python` runs, all blocks of a page as one script; `text` right after it is what it prints,
to the letter ("..." stands for anything in a line); `sh` is commands, whose names and flags must exist; `yaml` and
`json` are parsed; `text` elsewhere is only shown. A comment `<!-- not run: why -->` before a fence lets a python block
be compiled and no more, and a command be checked as a shell's alone.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parent.parent / "docs"
FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<kind>[^\n`]*)\n(?P<code>.*?)^(?P=ticks)[ ]*$", re.S | re.M)
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*$")
MARK = "=" * 9


class Block(NamedTuple):
    """A fence of a page."""

    page: str
    line: int
    kind: str
    code: str
    why_not: str  # "" where it runs
    prints: str | None  # of python: what the text block after it says

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Every page that a person wrote, by its path in docs/."""
    return sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if "_build" not in p.parts)


def blocks(page: str) -> list[Block]:
    """Its fences in order, but for Sphinx's own, which stand in braces."""
    text = (DOCS / page).read_text()
    found, last = list[Block](), 0
    for m in FENCE.finditer(text):
        kind, before = m["kind"].strip(), text[last : m.start()]
        last = m.end()
        if kind.startswith("{"):
            continue
        if kind == "text" and found and found[-1].kind == "python" and not before.strip(": \n"):
            found[-1] = found[-1]._replace(prints=m["code"])
        why = NOT_RUN.search(before.rstrip())
        found.append(Block(page, text.count("\n", 0, m.start()) + 2, kind, m["code"], why[1] if why else "", None))
    return found


def script(page: str) -> tuple[str, list[Block]]:
    """A page's python as one script, which prints a mark before each block; and those blocks."""
    run = [b for b in blocks(page) if b.kind == "python" and not b.why_not]
    return "\n".join(f"print({f'{MARK} {i}'!r}, flush=True)\n{b.code}" for i, b in enumerate(run)), run


def printed(out: str) -> list[str]:
    """What each block of a script printed."""
    return [part.partition("\n")[2] for part in re.split(rf"^{MARK} (?=\d+$)", out, flags=re.M)[1:]]


def agrees(got: str, want: str) -> bool:
    """Is this what the page says, lines compared without the spaces at their ends?"""
    lines = lambda text: [line.rstrip() for line in text.strip("\n").splitlines()]
    like = [".*".join(map(re.escape, line.split("..."))) for line in lines(want)]
    have = lines(got)
    return len(have) == len(like) and all(re.fullmatch(b, a) for a, b in zip(have, like))


def counted() -> str:
    """How many blocks there are, and what is done with each kind, in one line."""
    every = [b for page in pages() for b in blocks(page)]
    done = {"python": "run as python", "text": "compared or shown", "sh": "checked as commands", "yaml": "parsed"}
    number = lambda kind, off: sum(b.kind == kind and bool(b.why_not) == off for b in every)
    parts = [f"{number(kind, False)} {what}" for kind, what in done.items()]
    off = sum(bool(b.why_not) for b in every)
    outputs = sum(b.prints is not None for b in every)
    return (
        f"{len(every)} blocks on {len(pages())} pages: {', '.join(parts)}, {off} not run ({outputs} outputs compared)"
    )


def fill(page: str, folder: Path) -> None:
    """Write what blocks print into their page, where it says otherwise; read the difference before keeping it."""
    from ends import Ends

    ends = Ends()
    code, run = script(page)
    told = ends.run(folder / "life", f"import os; os.chdir({str(folder)!r})\n{code}", 2, 120.0, short=True)
    ends.close()
    assert not any(rank["code"] for rank in told), told[0]["err"]
    text = (DOCS / page).read_text()
    for block, got in zip(run, printed(told[0]["out"])):
        if block.prints is not None and not agrees(got, block.prints):
            old, new = (f"```\n\n```text\n{said}```" for said in (block.prints, got))
            assert text.count(block.code + old) == 1, block.name
            text = text.replace(block.code + old, block.code + new)
    (DOCS / page).write_text(text)


if __name__ == "__main__":  # python tests/pages.py [PAGE...]: fills these pages, and counts all blocks
    for page in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            fill(page, Path(folder))
    print(counted())
