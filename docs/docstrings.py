"""Docstrings of this house as reStructuredText: they are plain text with `code`, an Args section and doctests."""

from __future__ import annotations

import inspect
import io
import re
import tokenize
from typing import Any

BACKTICKS = re.compile(r"(`+)(.+?)\1(?!`)", re.S)
ARGUMENT = re.compile(r"\s*\*{1,2}\w+:")
SPECIAL = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")


def markup(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escapes what reStructuredText would read as markup, and makes `x` code; doctests stay as they are."""
    blocks, out = "\n".join(lines).split("\n\n"), []
    for block in blocks:
        out.append(block if block.lstrip().startswith(">>>") else _escaped(block))
    text = "\n\n".join(out)
    lines[:] = text.split("\n")
    if what in ("attribute", "property", "data"):
        lines.insert(0, "")  # or napoleon would read the words before a colon as a type


def _escaped(block: str) -> str:
    found, at = [], 0
    for m in BACKTICKS.finditer(block):
        found += [_plain(block[at : m.start()]), f"``{' '.join(m[2].split())}``"]
        at = m.end()
    return "".join([*found, _plain(block[at:])])


def _plain(text: str) -> str:
    each = [line if ARGUMENT.match(line) else SPECIAL.sub(r"\\\1", line) for line in text.split("\n")]
    return "\n".join(each)


def fields(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Of a NamedTuple or dataclass without an Args section: its fields, with the comments beside them."""
    said = getattr(obj, "__annotations__", None) if inspect.isclass(obj) else None
    is_record = said and (hasattr(obj, "_fields") or hasattr(obj, "__dataclass_fields__"))
    if not is_record or any(line.strip() == "Args:" for line in lines):
        return
    beside = comments(obj)
    lines += ["", "Fields:", *(f"    {n}: {beside.get(n, '')}".rstrip() for n in said if not n.startswith("_")), ""]


def comments(cls: type) -> dict[str, str]:
    """The comment at the end of each field's line, by field."""
    try:
        source = inspect.cleandoc("\n" + inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    found, name, first = {}, None, True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if first and token.type == tokenize.NAME and token.line[token.end[1] :].lstrip().startswith(":"):
            name = token.string
        if token.type == tokenize.COMMENT and name:
            found[name] = token.string.lstrip("# ")
            name = None
        first = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.NL, tokenize.DEDENT, tokenize.COMMENT)
    return found
