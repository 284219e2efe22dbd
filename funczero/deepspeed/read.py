"""Reading a config as DeepSpeed does: a dict, a file with comments and trailing commas, or base64 of one; with the line of every key."""
from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hjson

from funczero.deepspeed.keys import ConfigError

_SKIP = re.compile(r"\"(?:\\.|[^\"\\\n])*\"|'''.*?'''|'(?:\\.|[^'\\\n])*'|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)


class Document(NamedTuple):
    """A config as it was written."""

    name: str  # what messages call it: the file's name, or "config"
    raw: dict[str, Any]
    lines: dict[str, int]  # dotted path -> line; empty for a dict

    def where(self, path: str) -> str:
        """The beginning of a message about a key."""
        line = self.lines.get(path)
        return f"{self.name}{'' if line is None else f':{line}'}: {path}: "


def read(config: str | Path | Mapping[str, Any]) -> Document:
    """A config from a dict, a path or base64.

    Raises:
      ConfigError: there is no such file, it does not parse, or a key stands twice.
    """
    if isinstance(config, Mapping):
        return Document("config", dict(config), {})
    path = Path(config)
    if not str(config) or not path.is_file():
        text = _decoded(str(config))
        if text is None:
            raise ConfigError(f"{config}: there is no such file; write the path of a ds_config.json, or a dict")
        return _parsed("config", text)
    try:
        return _parsed(path.name, path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name}: it is not text in UTF-8; write the path of a ds_config.json") from None


def _decoded(text: str) -> str | None:
    try:
        out = base64.urlsafe_b64decode(text.encode()).decode()
    except (binascii.Error, UnicodeError, ValueError):
        return None
    return out if out.lstrip().startswith("{") else None


def _parsed(name: str, text: str) -> Document:
    try:
        pairs = hjson.loads(text, object_pairs_hook=_Pairs) if text.strip() else _Pairs()
    except hjson.HjsonDecodeError as e:
        raise ConfigError(f"{name}:{e.lineno}: it does not parse: {e.msg.rstrip('.')}; write JSON (comments and trailing commas may stay)") from None
    if not isinstance(pairs, _Pairs):
        raise ConfigError(f"{name}: it holds a {type(pairs).__name__}, not keys and values; write {{...}}")
    lines: dict[str, int] = {}
    blank = _SKIP.sub(lambda m: m[0] if m[0][0] in "\"'" else re.sub(r"[^\n]", " ", m[0]), text)
    raw, _ = _plain(pairs, "", name, blank, 0, lines)
    return Document(name, raw, lines)


class _Pairs(list):
    """The pairs of one block, in order, a key that stands twice included."""


def _plain(pairs: _Pairs, prefix: str, name: str, text: str, at: int, lines: dict[str, int]) -> tuple[dict[str, Any], int]:
    """Pairs as a dict, with the line of every key found by reading on from the last one; returns where it stopped."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        path = prefix + key
        found = re.compile(rf"(?<![\w.])[\"']?{re.escape(key)}[\"']?\s*:").search(text, at)
        at = found.end() if found else at
        line = text.count("\n", 0, found.start()) + 1 if found else None
        if key in out:
            first = f" and on line {lines[path]}" if path in lines else ""
            raise ConfigError(f"{name}{f':{line}' if line else ''}: {path}: it stands twice, here{first}; delete one of the two")
        if line:
            lines[path] = line
        if isinstance(value, _Pairs):
            out[key], at = _plain(value, path + ".", name, text, at, lines)
        else:
            out[key] = _unpaired(value)
    return out, at


def _unpaired(value: Any) -> Any:
    return [_unpaired(x) for x in value] if isinstance(value, list) and not isinstance(value, _Pairs) else dict(value) if isinstance(value, _Pairs) else value
