"""Hostfiles, filters and environment files that nobody wrote by hand."""

from __future__ import annotations

import os
from pathlib import Path

from hostile import Case

from funczero.launch.error import LaunchError
from funczero.launch.flags import parse
from funczero.launch.job import make_plan
from funczero.launch.transports import describe

N = 20_000
TEXTS = {
    "a command": "$(touch pwned) slots=1",
    "backquotes": "`touch pwned` slots=1",
    "a second command": "a;touch${IFS}pwned slots=1",
    "an option of ssh": "-oProxyCommand=touch${IFS}pwned slots=1",
    "an option behind a user": "root@-oProxyCommand=x slots=1",
    "a pipe": "a|sh slots=1",
    "a line end in a name": "a\rb slots=1",
    "an escape sequence": "\x1b]0;x\x07 slots=1",
    "a name of another direction": "a\u202egpj slots=1",
    "a NUL": "a\0b slots=1",
    "a path": "../../etc/passwd slots=1",
    "a name without an end": "a" * 10**6 + " slots=1",
    "spaces without an end": "a" + " " * 10**6 + "x",
    "slots without an end": "a slots=" + "9" * 10**6,
    "slots that no machine has": "a slots=999999999",
    "slots that fill memory": "\n".join(f"h{i} slots=4096" for i in range(N)),
    "slots below zero": "a slots=-1",
    "other digits": "a slots=４",
    "max_slots without an end": "a slots=1 max_slots=" + "9" * 10**5 + "x",
    "a comment without an end": "#" * (1 << 21),
    "the same host": "a slots=1\n" * N,
    "nobody": "\n" * N,
    "brackets": "[" * N + " slots=1",
    "colons": ":" * N + "x! slots=1",
    "at signs": "a@" * N + " slots=1",
}


def plan(words: list[str], folder: Path) -> None:
    """What `funczero launch --dry_run` does."""
    describe(make_plan(parse([*words, "x.py"]), {}, str(folder)))


def hostfile(text: str | bytes):
    def attempt(folder: Path) -> None:
        (folder / "hosts").write_bytes(text if isinstance(text, bytes) else text.encode())
        plan([f"--hostfile={folder / 'hosts'}"], folder)

    return attempt


def words(*given: str, text: str = "a slots=2\nb slots=2\n"):
    def attempt(folder: Path) -> None:
        (folder / "hosts").write_text(text)
        plan([f"--hostfile={folder / 'hosts'}", *given], folder)

    return attempt


def linked(folder: Path) -> None:
    os.symlink("/etc/passwd", folder / "hosts")
    plan([f"--hostfile={folder / 'hosts'}"], folder)


def environment(text: str):
    def attempt(folder: Path) -> None:
        (folder / ".deepspeed_env").write_text(text)
        plan([], folder)

    return attempt


OURS = (LaunchError,)
CASES = [
    *(Case(name, hostfile(text), OURS) for name, text in TEXTS.items()),
    Case("no text", hostfile(b"\xff\xfe\x00" * 100), OURS),
    Case("/dev/zero", lambda folder: plan(["--hostfile=/dev/zero"], folder), OURS),
    Case("a folder", lambda folder: plan([f"--hostfile={folder}"], folder), OURS),
    Case("a link to another file", linked, OURS),
    Case("slots of a filter without an end", words("--include=a:" + "9" * 10**5), OURS),
    Case("a filter of at signs", words("--include=" + "@" * 10**5), OURS),
    Case(
        "a slot of this machine that fills memory",
        lambda folder: plan(["--include=localhost:99999999999"], folder),
        OURS,
    ),
    Case("processes that fill memory", lambda folder: plan(["--num_gpus=99999999999"], folder), OURS),
    Case("an interpreter that is a command", words("--python=a;touch pwned"), OURS),
    Case("options that are a command", words("--launcher_args='"), OURS),
    Case("an environment file of commands", environment("A=1\n$(touch pwned)=2\n"), OURS),
    Case("an environment file without an end", environment("A=" + "x" * (1 << 21)), OURS),
]
