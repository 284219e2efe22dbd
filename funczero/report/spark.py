"""Curves in a terminal: a plot of braille dots, and a line of blocks."""

from __future__ import annotations

import math

import numpy as np

from funczero.report.axis import Axis, axis_of
from funczero.report.series import Array

BLOCKS = "▁▂▃▄▅▆▇█"
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character: rows, columns


def place(x: float, span: tuple[float, float], width: int) -> int:
    """The column of so many at which a number of a range lies."""
    low, high = span
    return min(width - 1, max(0, int((x - low) / max(high - low, 1e-300) * width)))


def plot(x: Array, y: Array, span: tuple[float, float], width: int, height: int) -> list[str]:
    """A curve in `height` lines of `width` characters; every number has its dot.

    >>> plot(np.arange(4.0), np.array([0.0, 1.0, 2.0, 3.0]), (0, 3), 2, 1)
    ['⡠⠊']
    """
    low, high = float(y.min()), float(y.max())
    axis = axis_of(low, high)
    flat = high == low
    tall = 4 * height
    cells = np.zeros((height, width), np.int64)
    before: tuple[int, int] | None = None
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        column = place(a, span, 2 * width)
        part = 0.5 if flat else (axis.at(b) - axis.at(low)) / (axis.at(high) - axis.at(low))
        row = tall - 1 - min(tall - 1, int(part * tall))
        for c, r in _between(before, (column, row)):
            cells[r // 4, c // 2] |= DOTS[r % 4][c % 2]
        before = column, row
    return ["".join(chr(0x2800 + int(cell)) for cell in line) for line in cells]


def _between(a: tuple[int, int] | None, b: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a line from one to another, without the first."""
    if a is None:
        return [b]
    n = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    return [(round(a[0] + (b[0] - a[0]) * i / n), round(a[1] + (b[1] - a[1]) * i / n)) for i in range(1, n + 1)]


def blocks(x: Array, y: Array, span: tuple[float, float], width: int) -> str:
    """A curve in one line: in every column the largest number that lies there; a column without one is empty.

    >>> blocks(np.arange(4.0), np.array([0.0, 1.0, 2.0, 7.0]), (0, 3), 4)
    '▁▂▃█'
    """
    if not len(y):
        return " " * width
    most: dict[int, float] = {}
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        column = place(a, span, width)
        most[column] = max(most.get(column, -math.inf), b)
    low, high = min(most.values()), max(most.values())
    part = lambda b: Axis(low, high).at(b) if high > low else 0.5
    return "".join(BLOCKS[min(7, int(part(most[c]) * 7.999))] if c in most else " " for c in range(width))
