"""The count of what a process sends: bytes by mesh axis, verb and wire, and how many values that was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

Key = tuple[str, str, str]  # (axis, verb, dtype or wire)
INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}  # dtypes, not the wires int8(2048)


class Sent(Counter[Key]):
    """Bytes that this process sent, payload only, by (axis, verb, dtype or wire); printed, it is a table.

    >>> sent = Sent()
    >>> sent.note(("node", "all_gather", "int8(2048)"), 1032, 1024)
    >>> sent.note(("node", "all_reduce", "int64"), 240, 30)
    >>> print(sent)
    axis  what        as                bytes  16 bits would be
    node  all_gather  int8(2048)        1,032             2,048
    node  all_reduce  int64               240                 -
    node                                1,272
    """

    def __init__(self, *args: Iterable[Key] | Mapping[Key, int]) -> None:
        """As a Counter."""
        super().__init__(*args)
        self.numbers: Counter[Key] = Counter()  # values that floats stand for, by the same keys

    def note(self, key: Key, nbytes: int, values: int) -> None:
        """So many bytes were sent, which stand for so many values."""
        self[key] += nbytes
        self.numbers[key] += values

    def at_16_bits(self, key: Key) -> int | None:
        """What the same values would take in 16 bits each; None for integers, which are no values."""
        return None if key[2] in INTEGERS else 2 * self.numbers[key]

    def since(self, before: Sent) -> Sent:
        """What was sent after a copy was taken."""
        out = Sent({k: n - before[k] for k, n in self.items() if n != before[k]})
        out.numbers = Counter({k: self.numbers[k] - before.numbers[k] for k in out})
        return out

    def copy(self) -> Sent:
        """The count as it is now."""
        out = Sent(self)
        out.numbers = Counter(self.numbers)
        return out

    def __str__(self) -> str:
        rows = [("axis", "what", "as", "bytes", "16 bits would be")]
        for axis in dict.fromkeys(a for a, _, _ in self):
            keys = sorted(k for k in self if k[0] == axis)
            for k in keys:
                half = self.at_16_bits(k)
                rows.append((*k, f"{self[k]:,}", "-" if half is None else f"{half:,}"))
            rows.append((axis, "", "", f"{sum(self[k] for k in keys):,}", ""))
        wide = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = []
        for row in rows:
            left = "  ".join(f"{x:<{w}}" for x, w in zip(row[:3], wide[:3], strict=True))
            lines.append(f"{left}  {row[3]:>{wide[3] + 4}}  {row[4]:>{wide[4]}}".rstrip())
        return "\n".join(lines)
