"""Commands that a page tells its reader to type: do these programs, subcommands, scripts and flags exist?"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

from funczero.script.flags import TABLE

ROOT = Path(__file__).parent.parent
READERS = {"rings.py", "train.py", "job.sh"}  # files that a page has its reader write, or that are the reader's own
OTHERS = {"pip", "python3", ".", "export", "sbatch"}  # programs that are not ours, whose words are not looked at


def wrong(line: str) -> str:
    """What is wrong with a command; "" where nothing is.

    >>> wrong("funczero export runs/rings/checkpoints rings.safetensors --dtype=bfloat16"), wrong("torchrun x.py")
    ('', 'there is no script x.py')
    >>> wrong("funczero export --such=1"), wrong("sudo reboot")
    ('funczero export has no --such', 'sudo is no program that a page may name')
    """
    words = shlex.split(line, comments=True)
    if not words:
        return ""
    program, *words = words
    if program in OTHERS:
        return ""
    if program == "srun":
        return wrong(shlex.join(words))
    if program == "funczero":
        return _funczero(words)
    if program == "python":
        return _script(words) if words[0] != "-m" else ""
    if program == "torchrun":
        at = _first_script(words)
        return _lacks("torchrun", _torchrun(), words[:at]) or _script(words[at:])
    return f"{program} is no program that a page may name"


def _funczero(words: list[str]) -> str:
    command = words[:2] if words[0] == "config" else words[:1]
    said = _help(*command)
    if said is None:
        return f"there is no funczero {' '.join(command)}"
    at = _first_script(words) if command == ["launch"] else len(words)
    odd = _lacks(f"funczero {' '.join(command)}", said, words[len(command) : at])
    return odd or (_script(words[at:]) if command == ["launch"] and at < len(words) else "")


def _first_script(words: list[str]) -> int:
    return next((i for i, w in enumerate(words) if w.endswith(".py")), len(words))


def _lacks(program: str, known: frozenset[str], words: list[str]) -> str:
    named = [w.partition("=")[0] for w in words if w.startswith("--")]
    odd = next((name for name in named if name not in known), None)
    return "" if odd is None else f"{program} has no {odd}"


def _script(words: list[str]) -> str:
    if not words:
        return "no script is named"
    file, own = ROOT / words[0], words[1:]
    if not file.is_file() and words[0] not in READERS:
        return f"there is no script {words[0]}"
    if words[0] == "train.py":  # somebody's, with flags of its own
        return ""
    source = file.read_text() if file.is_file() else ""
    known = {f"--{name}" for name in re.findall(r'"(?:--)?([a-z_]+)"', source)} | {f"--{name}" for name in TABLE}
    return _lacks(words[0], frozenset(known), own)


@cache
def _help(*command: str) -> frozenset[str] | None:
    """The flags that a command's help names; None where there is no such command."""
    from funczero.cli import main

    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            main([*command, "--help"])
    except SystemExit as end:
        if end.code:
            return None
    return frozenset(re.findall(r"--[\w-]+", out.getvalue()))


@cache
def _torchrun() -> frozenset[str]:
    from torch.distributed.run import get_args_parser

    return frozenset(name for action in get_args_parser()._actions for name in action.option_strings)
