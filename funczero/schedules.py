"""Learning rates as functions of applied updates: `lr == schedule(state.updates)`, whatever was accumulated or skipped."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]  # 0-d count of applied updates -> 0-d float64


def constant(value: float) -> Schedule:
    """The same value always.

    >>> constant(0.1)(torch.tensor(7)).item()
    0.1
    """
    return lambda updates: torch.full((), value, dtype=torch.float64, device=updates.device)


def warmup_cosine(peak: float, warmup: int, total: int, end: float = 0.0) -> Schedule:
    """Linear from 0 to `peak` in `warmup` updates, then half a cosine to `end` at `total`, then `end`.

    >>> f = warmup_cosine(1.0, 10, 110)
    >>> [round(f(torch.tensor(u)).item(), 6) for u in (0, 5, 10, 60, 110, 1000)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]

    Raises:
      ValueError: not 0 <= warmup <= total.
    """
    if not 0 <= warmup <= total:
        raise ValueError(f"warmup_cosine: warmup={warmup} is not within 0 and total={total} updates; write 0 <= warmup <= total")

    def schedule(updates: Tensor) -> Tensor:
        u = updates.double()
        done = ((u - warmup) / max(total - warmup, 1)).clamp(0, 1)
        cosine = end + (peak - end) * 0.5 * (1 + torch.cos(math.pi * done))
        return torch.where(u < warmup, peak * u / max(warmup, 1), cosine)

    return schedule
