"""Numbers over updates in bounded memory: of many, those stay that a curve cannot do without."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

BUCKETS = 400  # stretches of a curve; of each its first, last, smallest and largest stay
HELD = 1 << 14  # numbers after which a series is thinned
ODD = 1 << 10  # numbers that are not finite, with their places
LATE = 64  # of the last ones

Array = np.ndarray[Any, np.dtype[np.float64]]


class Series:
    """One name's numbers, update by update.

    Law: the smallest and largest of any stretch of the curve are those of all numbers in it; what is not finite keeps
    its place, and is in no extreme and no mean.

    >>> series = Series()
    >>> series.add([1, 2, 3], [0.5, float("nan"), 0.25])
    >>> series.points()[1].tolist(), series.odd, series.count, series.last
    ([0.5, 0.25], [(2, nan)], 2, (3, 0.25))
    """

    def __init__(self) -> None:
        """No numbers yet."""
        self.count = self.odds = 0  # finite, and others
        self.low, self.high = math.inf, -math.inf
        self.lowest: tuple[int, float] | None = None  # of the finite ones, with its update
        self.highest: tuple[int, float] | None = None
        self.last: tuple[int, float] | None = None  # of all
        self.odd: list[tuple[int, float]] = []
        self.late: deque[float] = deque(maxlen=LATE)  # finite
        self.inverse = 0.0  # the sum of 1 / y over those above 0: of rates, the time
        self._x, self._y = np.empty(0), np.empty(0)

    def add(self, xs: Sequence[int] | Array, ys: Sequence[float] | Array) -> None:
        """More numbers, of later updates."""
        if not len(xs):
            return
        x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
        finite = np.isfinite(y)
        self.last = int(xs[-1]), float(ys[-1])
        self.odds += int((~finite).sum())
        places = np.flatnonzero(~finite)[: max(0, ODD - len(self.odd))]
        self.odd += [(int(xs[i]), float(ys[i])) for i in places]
        x, y = x[finite], y[finite]
        if not len(y):
            return
        self.count += len(y)
        self.late.extend(y[-LATE:].tolist())
        self.inverse += float((1 / y[y > 1e-300]).sum())
        low, high = int(y.argmin()), int(y.argmax())
        if y[low] < self.low:
            self.low, self.lowest = float(y[low]), (int(x[low]), float(y[low]))
        if y[high] > self.high:
            self.high, self.highest = float(y[high]), (int(x[high]), float(y[high]))
        self._x, self._y = np.concatenate([self._x, x]), np.concatenate([self._y, y])
        if len(self._x) > HELD:
            self._x, self._y = thinned(self._x, self._y, 2 * BUCKETS)

    def points(self, buckets: int = BUCKETS) -> tuple[Array, Array]:
        """Updates and numbers of a curve, of at most 4 a bucket."""
        return thinned(self._x, self._y, buckets)


def thinned(x: Array, y: Array, buckets: int) -> tuple[Array, Array]:
    """The first, last, smallest and largest number of every bucket of the range of x.

    Args:
      x: ascending.

    >>> x = np.arange(1000.0)
    >>> kept = thinned(x, np.where(x == 500, 9.0, 0.0), 10)
    >>> len(kept[0]) <= 40, float(kept[1].max())
    (True, 9.0)
    """
    if len(x) <= 4 * buckets:
        return x, y
    of = np.minimum((x - x[0]) * (buckets / (x[-1] - x[0])), buckets - 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(of, prepend=-1))
    ends = np.append(starts[1:], len(x)) - 1
    by_size = np.lexsort((y, of))  # within every bucket from the smallest to the largest
    kept = np.unique(np.concatenate([starts, ends, by_size[starts], by_size[ends]]))
    return x[kept], y[kept]
