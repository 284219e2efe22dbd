"""What somebody else wrote, made fit to be used: texts for a message, packed JSON from a store that strangers may
reach.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

MOST = 2000  # characters of a message
CUT = " ... "


def plain(text: str, most: int = MOST) -> str:
    r"""A text as one line: what a terminal would obey is escaped, and the middle of what is too long is left out.

    Law: len(plain(t, n)) <= n, plain(t).isprintable(), and a printable text that is short enough is itself.

    Args:
      text: whatever was read; it may hold line ends, escape sequences, lone surrogates, marks that turn the direction
        of writing.
      most: characters at most, at least 16.

    >>> plain("a\x1b[31mb\n"), plain("x" * 30, 16)
    ('a\\x1b[31mb\\n', 'xxxxxxx ... xxxx')
    """
    head, tail = (most - len(CUT) + 3) // 2, (most - len(CUT) - 3) // 2
    if len(text) > most:  # before it is escaped as well, so that the work is bounded
        text = text[:head] + CUT + text[len(text) - tail :]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else text[:head] + CUT + text[len(text) - tail :]


def unpack(data: bytes, most: int) -> Any:
    """JSON of zlib's bytes, no larger than it may be: 8 MB may claim to be 8 GB.

    Args:
      data: as `zlib.compress(json.dumps(x).encode())` makes it.
      most: bytes of the JSON at most; as objects they may take sixty times as much.

    Raises:
      ValueError: it is none, or larger, or nested beyond Python's stack; one sentence.

    >>> unpack(zlib.compress(b'{"a": [1]}'), 100)
    {'a': [1]}
    """
    packed = zlib.decompressobj()
    try:
        text = packed.decompress(data, most)
        if packed.unconsumed_tail or not packed.eof:
            raise ValueError(f"it is cut off, or larger than {most} bytes")
        return json.loads(text)
    except (zlib.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is no packed JSON ({plain(str(error), 200)})") from None
