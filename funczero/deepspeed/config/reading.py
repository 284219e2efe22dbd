"""Reading a config as DeepSpeed does, with the line of every key.

A config is a dict, a file with comments and trailing commas, or base64 of one.

Law: time and memory are linear in bytes, whatever the bytes are, and whatever is wrong is one ConfigError.
"""

from __future__ import annotations

import base64
import binascii
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hjson.decoder import (
    HjsonDecodeError,
    HjsonDecoder,
    JSONArray,
    getNext,
    make_scanner,
    mlscanstring,
    scanKeyName,
    scantfnns,
)

from funczero.deepspeed.config.key import ConfigError
from funczero.world.plain import plain

BYTES = 1 << 20  # of a file; the largest published configs have some ten thousand
DEPTH = 32  # blocks and lists in one another
NAME = 256  # characters of a key's dotted path
WORD = 4096  # characters of a value without quotes
MARGIN = 256  # characters before a text in three quotes on its line


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
      ConfigError: there is no such file, it is too large or too deep, it does not parse, or a key stands twice.
    """
    if isinstance(config, Mapping):
        _bounded(config)
        return Document("config", dict(config), {})
    if not isinstance(config, (str, Path)):
        raise ConfigError(
            f"config: {type(config).__name__} is no config; write the path of a ds_config.json, or a dict"
        )
    path = Path(config)
    data = _bytes(path) if str(config) else None
    if data is None:
        text = _decoded(str(config))
        if text is None:
            raise ConfigError(
                f"{plain(str(config), 300)}: there is no such file; write the path of a ds_config.json, or a dict"
            )
        return parsed("config", text)
    name = plain(path.name, 300)
    if len(data) > BYTES:
        raise ConfigError(
            f"{name}: it has more than {BYTES} bytes, and no config is so long; write the path of a ds_config.json"
        )
    try:
        return parsed(name, data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ConfigError(f"{name}: it is not text in UTF-8; write the path of a ds_config.json") from None


def _bytes(path: Path) -> bytes | None:
    """The beginning of a file, one byte more than may be; None where there is no such file."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(BYTES + 1)
    except ValueError:  # a NUL in the name
        return None
    except OSError as error:
        if path.name and len(path.name) > 255:  # base64 is no name
            return None
        why = f"it cannot be read ({error.strerror}); write the path of a ds_config.json, or a dict"
        raise ConfigError(f"{plain(path.name, 300)}: {why}") from None


def _decoded(text: str) -> str | None:
    if len(text) > 2 * BYTES:
        raise ConfigError(
            f"config: base64 of {len(text)} characters, and no config is so long; write the path of a ds_config.json"
        )
    try:
        out = base64.urlsafe_b64decode(text.encode()).decode()
    except (binascii.Error, UnicodeError, ValueError):
        return None
    return out if out.lstrip().startswith("{") else None


def _bounded(config: Mapping[Any, Any]) -> None:
    """Refuses a dict that is deeper than a file may be, or holds itself."""
    todo: list[tuple[Any, int]] = [(config, 1)]
    seen = 0
    while todo:
        (value, depth), seen = todo.pop(), seen + 1
        if depth > DEPTH or seen > BYTES:
            why = (
                f"its blocks are nested {DEPTH} deep" if depth > DEPTH else "it has more values than a file could hold"
            )
            raise ConfigError(f"config: {why}, and no config is; delete what does not belong there")
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        todo += [(x, depth + 1) for x in inside if isinstance(x, (Mapping, list, tuple))]


def parsed(name: str, text: str) -> Document:
    """A config's text as a document."""
    decoder = _Decoder()
    try:
        pairs = (
            decoder.decode("\n" + text) if text.strip() else _Pairs()
        )  # hjson looks for the line end before a text in three quotes, and misses it in line 1
    except HjsonDecodeError as e:
        said = str(e.msg).removesuffix(" at").removesuffix(" %r").rstrip(".")
        why = f"it does not parse: {said}; write JSON (comments and trailing commas may stay)"
        raise ConfigError(f"{name}:{max(1, e.lineno - 1)}: {why}") from None
    except IndexError:  # hjson reads on behind the end of a comment, or of a text in three quotes
        raise ConfigError(f"{name}: it does not parse: it ends within a comment or a text; close it") from None
    except RecursionError:
        raise ConfigError(f"{name}: its blocks are nested too deeply; write {{...}} in fewer of them") from None
    if isinstance(pairs, dict):  # a file of comments
        pairs = _Pairs()
    if not isinstance(pairs, _Pairs):
        raise ConfigError(f"{name}: it holds a {type(pairs).__name__}, not keys and values; write {{...}}")
    ends = [i for i, c in enumerate(text) if c == "\n"]
    lines: dict[str, int] = {}
    return Document(name, _plain(pairs, "", name, lambda at: bisect_left(ends, at - 1) + 1, lines), lines)


class _Pairs(list):
    """(key, value, where the key stands) of one block, in order, a key that stands twice included."""


class _Decoder(HjsonDecoder):
    """hjson's own parts, but for blocks, whose keys keep their places, and for what would cost more than its length."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.parse_object, self.parse_array = self._block, self._list
        self.parse_tfnns, self.parse_mlstring = self._word, self._quoted
        self.scan_once, self.scan_object_once = make_scanner(self)

    def _within(self, s: str, at: int) -> None:
        self.depth += 1
        if self.depth > DEPTH:
            raise HjsonDecodeError(f"blocks are nested more than {DEPTH} deep", s, at)

    def _list(self, state: tuple[str, int], scan_once: Any) -> tuple[list[Any], int]:
        self._within(*state)
        out = JSONArray(state, scan_once)
        self.depth -= 1
        return out

    def _block(
        self, state: tuple[str, int], encoding: Any, strict: Any, scan_once: Any, *hooks: Any
    ) -> tuple[_Pairs, int]:
        """hjson's JSONObject, with places; the last of the hooks says that there are no braces."""
        bare, (s, end), pairs = hooks[-1] is True, state, _Pairs()
        self._within(s, end)
        ch, end = getNext(s, end)
        while bare or ch != "}":
            at = end
            key, end = scanKeyName(s, end, encoding, strict)
            if len(key) > NAME:
                raise HjsonDecodeError(f"a key of {len(key)} characters", s, at)
            ch, end = getNext(s, end)
            if ch != ":":
                raise HjsonDecodeError("Expecting ':' delimiter", s, end)
            ch, end = getNext(s, end + 1)
            value, end = scan_once(s, end)
            pairs.append((key, value, at))
            ch, end = getNext(s, end)
            if ch == ",":
                ch, end = getNext(s, end + 1)
            if bare and ch == "":
                break
        self.depth -= 1
        return pairs, end if bare else end + 1

    def _word(self, _: Any, s: str, at: int) -> tuple[Any, int]:
        """A value without quotes. hjson looks back to its beginning at every comma, so it sees no more than a word."""
        shown = s[at : at + WORD]
        try:
            value, end = scantfnns(self, shown, 0)
        except HjsonDecodeError as e:
            raise HjsonDecodeError(e.msg, s, at + e.pos) from None
        except (OverflowError, ValueError):
            raise HjsonDecodeError("a number that is too large", s, at) from None
        if end == WORD and len(s) > at + WORD:
            raise HjsonDecodeError(f"a value without quotes of more than {WORD} characters", s, at)
        return value, at + end

    def _quoted(self, s: str, at: int) -> tuple[str, int]:
        """A text in three quotes. hjson looks back to the beginning of its line."""
        if at - s.rfind("\n", 0, at) > MARGIN:
            raise HjsonDecodeError(f"a text in three quotes behind more than {MARGIN} characters of its line", s, at)
        return mlscanstring(s, at)


def _plain(pairs: _Pairs, prefix: str, name: str, line_of: Any, lines: dict[str, int]) -> dict[str, Any]:
    """Pairs as a dict, and the line of every key."""
    out: dict[str, Any] = {}
    for key, value, at in pairs:
        path, line = prefix + key, line_of(at)
        if key in out:
            first = f" and on line {lines[path]}" if path in lines else ""
            raise ConfigError(f"{name}:{line}: {path}: it stands twice, here{first}; delete one of the two")
        if len(path) <= NAME:  # a longer path is no key's
            lines[path] = line
        out[key] = _plain(value, path + ".", name, line_of, lines) if isinstance(value, _Pairs) else _unpaired(value)
    return out


def _unpaired(value: Any) -> Any:
    """Lists, and the blocks in them, whose keys need no line."""
    if isinstance(value, _Pairs):
        return {key: _unpaired(x) for key, x, _ in value}
    return [_unpaired(x) for x in value] if isinstance(value, list) else value
