"""Amounts and tables in words."""

from __future__ import annotations

import re
from collections.abc import Sequence

STEPS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
SIZES = {
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "b": 1,
    "": 1,
}


def amount(n: float) -> str:
    """Bytes in three digits.

    >>> amount(1234567), amount(12)
    ('1.23 MB', '12 B')
    """
    return next((f"{n / k:.3g} {name}" for name, k in STEPS if n >= k), f"{n:.0f} B")


def duration(seconds: float) -> str:
    """Seconds in three digits.

    >>> duration(0.00123), duration(2.5e-6), duration(65)
    ('1.23 ms', '2.5 us', '65 s')
    """
    for name, k in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= k:
            return f"{seconds / k:.3g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


def size(text: str, what: str = "plan: --memory") -> int:
    """Bytes from "24GiB", "80GB" or a number.

    Raises:
      ValueError: it is none.

    >>> size("24GiB"), size("1.5MB")
    (25769803776, 1500000)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    try:
        out = int(float(found[1]) * SIZES[found[2].lower()]) if found else 0
    except (KeyError, ValueError):
        out = 0
    if out < 1:
        raise ValueError(f"{what}={text!r} is no size; write 24GiB, 80GB or a number of bytes")
    return out


def columns(rows: Sequence[Sequence[str]], indent: int = 0, left: int = 1) -> list[str]:
    """Lines of a table; the first `left` columns stand left, the others right.

    >>> columns([("a", "12"), ("bcd", "3")])
    ['a    12', 'bcd   3']
    """
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{x:<{w}}" if i < left else f"{x:>{w}}" for i, (x, w) in enumerate(zip(row, wide, strict=True))]
        lines.append("  " * indent + "  ".join(cells).rstrip())
    return lines
