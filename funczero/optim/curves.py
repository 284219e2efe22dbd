"""What schedules are made of: a rise, a cycle with its tail, and the checks of their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core.number import number, whole

Schedule = Callable[[Tensor], Tensor]  # 0-d int64 count of applied updates -> 0-d float64


def rise_of(who: str, warmup: int, kind: str) -> Schedule:
    """The rise of a warmup from 0 to 1 within so many updates, "log" or "linear"."""
    check_updates(who, warmup=warmup)
    if kind not in ("log", "linear"):
        raise ValueError(f"{who}: kind={kind!r} is neither 'log' nor 'linear'; write one of them")
    n = max(2, warmup)

    def rise(u: Tensor) -> Tensor:
        """0 to 1 after u updates; updates 0 and 1 are both at 0."""
        g = torch.log(u.clamp(min=1)) / math.log(n) if kind == "log" else (u - 1).clamp(min=0) / n
        return torch.where(u - 1 < n, g, 1.0)

    return rise


class Cycle(NamedTuple):
    """One cycle and its tail, as functions of applied updates."""

    height: Schedule  # 0 at the ends of the cycle and 1 at its top
    decay: Schedule  # 1 at the cycle's end, and then 1 + decay_rate a decay_steps
    end: float


def cycle_of(
    who: str,
    first: float,
    second: float | None,
    first_stairs: int,
    second_stairs: int | None,
    decay_steps: float,
    decay_rate: float,
) -> Cycle:
    """The cycle of these halves, stairs and tail."""
    number(who, "decay_steps", decay_steps)
    a = float(check_numbers(who, first=first))
    b = a if second is None else float(check_numbers(who, second=second))
    if not a > 0 or b < 0:
        raise ValueError(f"{who}: first={a:g} must be positive and second={b:g} not negative, in updates")
    m1, end, r = whole(who, "first_stairs", first_stairs, low=0), a + b, a / (a + b)
    m2 = m1 if second_stairs is None else whole(who, "second_stairs", second_stairs, low=0)

    def height(n: Tensor) -> Tensor:
        x, q = 1 + n / end - torch.floor(1 + n / end), torch.remainder(n, end)
        up = x / r if not m1 else torch.floor(q * m1 / a) / m1
        if not b:
            return up
        down = (x - 1) / (r - 1) if not m2 else torch.floor((end - q) * m2 / b) / m2
        return torch.where(x <= r, up, down)

    decay = lambda n: 1 + decay_rate * ((n - end) / decay_steps) if decay_steps else torch.ones_like(n)
    return Cycle(height, decay, end)


def check_numbers(who: str, **given: Any) -> Any:
    """Numbers of one schedule, or a sentence; the last of them."""
    for name, x in given.items():
        if isinstance(x, (list, tuple)):
            raise TypeError(f"{who}: {name}={x!r} is not a number; make one schedule for every group of parameters")
        number(who, name, x, low=-math.inf)
    return x


def check_updates(who: str, **given: Any) -> None:
    """Positive whole numbers of updates, or a sentence."""
    for name, x in given.items():
        if isinstance(x, bool) or not isinstance(x, int) or x < 1:
            raise ValueError(
                f"{who}: {name}={x!r} is not a positive whole number of updates; write an int of at least 1"
            )
