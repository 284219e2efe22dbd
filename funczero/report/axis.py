"""An axis of a chart: what part of it a number lies at, and where its ticks are."""

from __future__ import annotations

import math
from typing import NamedTuple

FAR = 1e300  # beyond it differences of numbers may not be numbers


class Axis(NamedTuple):
    """A range of numbers, as long as it is drawn."""

    low: float
    high: float
    base: int = 0  # of its logarithm; 0: linear

    def at(self, x: float) -> float:
        """Where a number lies, from 0 to 1 within the range.

        >>> Axis(1, 100, 10).at(10), Axis(-1e308, 1e308).at(0.0)
        (0.5, 0.5)
        """
        if self.base:
            low, high = math.log(self.low), math.log(self.high)
            return (math.log(x) - low) / (high - low) if x > 0 else 0.0
        k = 0.25 if max(abs(self.low), abs(self.high)) > FAR else 1.0
        return (k * x - k * self.low) / (k * self.high - k * self.low)

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers of the range.

        >>> Axis(0, 10).ticks(), Axis(0.5, 2000, 10).ticks()
        ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 10.0, 100.0, 1000.0])
        """
        if self.base:
            return self._powers(most)
        step = self.step(most)
        first = math.ceil(self.low / step)
        return [x for i in range(most + 2) if self.low <= (x := (first + i) * step) <= self.high]

    def step(self, most: int = 5) -> float:
        """Between two ticks of a linear axis."""
        raw = self.high / most - self.low / most
        size = 10.0 ** math.floor(math.log10(raw)) if raw > 1e-300 else 1e-300
        return next((size * k for k in (1, 2, 2.5, 5) if size * k >= raw * 0.85), size * 10)

    def _powers(self, most: int) -> list[float]:
        low, high = (math.log(x, self.base) for x in (self.low, self.high))
        first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
        stride = max(1, math.ceil((last - first + 1) / most))
        found = [float(self.base) ** n for n in range(first, last + 1, stride)]
        if len(found) < 3 and self.base == 10:
            every = (k * 10.0**n for n in range(first - 1, last + 1) for k in (1, 2, 5))
            found = [x for x in every if self.low <= x <= self.high]
        return found

    def label(self, x: float) -> str:
        """A tick in words.

        >>> Axis(0, 1).label(0.25), Axis(0, 40000).label(10000), Axis(1, 2**20, 2).label(1024)
        ('0.25', '10,000', '2^10')
        """
        if self.base == 2 and x != 1:
            return f"2^{round(math.log2(x))}"
        if x == 0:
            return "0"
        if self.base:
            return short(x, 3)
        step = math.floor(math.log10(self.step()) + 1e-9)
        return short(x, min(9, max(1, math.floor(math.log10(abs(x)) + 1e-9) - step + 2)))


def axis_of(low: float, high: float, base: int = 0) -> Axis:
    """The axis for numbers of a range, with a little room above and below.

    Args:
      low, high: finite.
      base: of a logarithm, where both are above 0.
    """
    if base and low > 0:
        room = max(0.05 * math.log(high / low) if high / low < math.inf else 30.0, 0.35)
        down, up = low * math.exp(-room), high * math.exp(room)
        return Axis(max(down, 5e-324), min(up, 1.7e308), base)
    room = 0.06 * (high / 2 - low / 2) * 2
    if room == 0 or low + room == low or high + room == high:
        room = max(abs(high) * 0.05, 1e-12) if high or low else 1.0
    return Axis(max(low - room, -1.7e308), min(high + room, 1.7e308))


def logarithmic(low: float, high: float) -> bool:
    """Are numbers so far apart that a linear axis would show one of them?"""
    return low > 0 and high / low > 100


def short(x: float, digits: int = 4) -> str:
    """A number in some digits.

    >>> short(1234567.0), short(0.00012345), short(12.5), short(65536, 5), short(float("nan"))
    ('1.235e6', '1.234e-4', '12.5', '65,536', 'nan')
    """
    if not math.isfinite(x):
        return str(float(x))
    size = math.floor(math.log10(abs(x)) + 1e-12) if x else 0
    if -4 < size < 6:
        places = max(0, digits - 1 - size)
        text = f"{x:,.{places}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, _, power = f"{x:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(power)}"
