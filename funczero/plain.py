"""Text that somebody else wrote, made fit for a message: one line, no control characters, bounded."""
from __future__ import annotations

MOST = 2000  # characters of a message
CUT = " ... "


def plain(text: str, most: int = MOST) -> str:
    r"""A text as one line: what a terminal would obey is escaped, and the middle of what is too long is left out.

    Law: len(plain(t, n)) <= n, plain(t).isprintable(), and a printable text that is short enough is itself.

    Args:
      text: whatever was read; it may hold line ends, escape sequences, lone surrogates, marks that turn the direction of writing.
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
