"""Learning rates as functions of applied updates: `lr == schedule(state.updates)`, whatever was accumulated or skipped.

The five of DeepSpeed give its values at every number of `step()` calls, past their ends included, in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funczero.core.number import flag, number
from funczero.optim.curves import Schedule, check_numbers, check_updates, cycle_of, rise_of

TORCH = (  # the schedules of torch.optim.lr_scheduler that numbers alone describe
    "StepLR",
    "MultiStepLR",
    "ConstantLR",
    "LinearLR",
    "ExponentialLR",
    "PolynomialLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "OneCycleLR",
)


def constant(value: float) -> Schedule:
    """The same value always.

    >>> constant(0.1)(torch.tensor(7)).item()
    0.1
    """
    check_numbers("constant", value=value)
    return lambda updates: torch.full((), value, dtype=torch.float64, device=updates.device)


def warmup_cosine(peak: float, warmup: int, total: int, end: float = 0.0) -> Schedule:
    """Linear from 0 to `peak` in `warmup` updates, then half a cosine to `end` at `total`, then `end`.

    >>> f = warmup_cosine(1.0, 10, 110)
    >>> [round(f(torch.tensor(u)).item(), 6) for u in (0, 5, 10, 60, 110, 1000)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]

    Raises:
      ValueError: not 0 <= warmup <= total.
    """
    check_numbers("warmup_cosine", peak=peak, warmup=warmup, total=total, end=end)
    if not 0 <= warmup <= total:
        raise ValueError(
            f"warmup_cosine: warmup={warmup} is not within 0 and total={total} updates; write 0 <= warmup <= total"
        )

    def schedule(updates: Tensor) -> Tensor:
        u = updates.double()
        done = ((u - warmup) / max(total - warmup, 1)).clamp(0, 1)
        cosine = end + (peak - end) * 0.5 * (1 + torch.cos(math.pi * done))
        return torch.where(u < warmup, peak * u / max(warmup, 1), cosine)

    return schedule


def warmup_lr(peak: float, warmup: int = 1000, start: float = 0.0, kind: str = "log") -> Schedule:
    """From `start` to `peak` in `warmup` updates, then `peak`. Updates 0 and 1 both run at `start`.

    After u updates, with N = max(2, warmup): start + (peak - start) g, g = ln(u) / ln(N) ("log") or (u - 1) / N
    ("linear"), at most 1.

    Args:
      peak: the rate after the warmup; start: the rate before it.
      warmup: updates of the rise, at least 1.
      kind: "log" or "linear".

    Source: DeepSpeed, WarmupLR (warmup_max_lr, warmup_num_steps, warmup_min_lr, warmup_type).

    >>> [round(warmup_lr(1.0, 4, kind="linear")(torch.tensor(u)).item(), 6) for u in (0, 1, 2, 5, 99)]
    [0.0, 0.0, 0.25, 1.0, 1.0]
    """
    check_numbers("warmup_lr", peak=peak, start=start)
    rise = rise_of("warmup_lr", warmup, kind)

    def schedule(updates: Tensor) -> Tensor:
        return start + (peak - start) * rise(updates.double())

    return schedule


def warmup_decay_lr(peak: float, total: int, warmup: int = 1000, start: float = 0.0, kind: str = "log") -> Schedule:
    """As `warmup_lr`, then a line from `peak` down to `start` at update `total` + 1, then `start`.

    Source: DeepSpeed, WarmupDecayLR (warmup_max_lr, total_num_steps, warmup_num_steps, warmup_min_lr, warmup_type).

    >>> [round(warmup_decay_lr(1.0, 12, 4, kind="linear")(torch.tensor(u)).item(), 6) for u in (0, 1, 5, 9, 13, 99)]
    [0.0, 0.0, 1.0, 0.5, 0.0, 0.0]
    """
    check_numbers("warmup_decay_lr", peak=peak, start=start)
    check_updates("warmup_decay_lr", total=total)
    rise, n = rise_of("warmup_decay_lr", warmup, kind), max(2, warmup)

    def schedule(updates: Tensor) -> Tensor:
        i = updates.double() - 1
        fall = ((total - i) / max(1.0, total - n)).clamp(min=0)
        return start + (peak - start) * torch.where(i < n, rise(i + 1), fall)

    return schedule


def warmup_cosine_lr(
    peak: float, total: int, warmup: int = 1000, start_ratio: float = 0.0, end_ratio: float = 1e-4, kind: str = "log"
) -> Schedule:
    """As `warmup_lr` from start_ratio * peak, then half a cosine to end_ratio * peak at update `total`. Update 0 runs
    at 0.

    Source: DeepSpeed, WarmupCosineLR (total_num_steps, warmup_num_steps, warmup_min_ratio, cos_min_ratio, warmup_type);
    peak is the optimizer's lr.

    >>> [round(warmup_cosine_lr(1.0, 12, 4)(torch.tensor(u)).item(), 6) for u in (0, 1, 4, 8, 12, 99)]
    [0.0, 0.0, 1.0, 0.50005, 0.0001, 0.0001]
    """
    check_numbers("warmup_cosine_lr", peak=peak, start_ratio=start_ratio, end_ratio=end_ratio)
    check_updates("warmup_cosine_lr", total=total)
    rise, n = rise_of("warmup_cosine_lr", warmup, kind), max(2, warmup)

    def schedule(updates: Tensor) -> Tensor:
        i = updates.double() - 1
        done = ((i - n + 1) / max(1.0, total - n)).clamp(max=1)
        cosine = end_ratio + (1 - end_ratio) * 0.5 * (1 + torch.cos(math.pi * done))
        ratio = torch.where(i < n, start_ratio + (1 - start_ratio) * rise(i + 1), cosine)
        return peak * torch.where(i < 0, 0.0, ratio)

    return schedule


def one_cycle(
    low: float,
    high: float,
    first: float = 2000,
    second: float | None = None,
    first_stairs: int = 0,
    second_stairs: int | None = None,
    decay_steps: float = 0,
    decay_rate: float = 0.0,
) -> Schedule:
    """From `low` to `high` in `first` updates and back in `second`, then low / (1 + decay_rate d / decay_steps) after d
    more.

    Args:
      low, high: rates at the ends and at the top.
      first, second: updates of the two halves; second is first unless given.
      first_stairs, second_stairs: stairs of a half, 0 for a line; second_stairs is first_stairs unless given.
      decay_steps, decay_rate: of the tail; 0 leaves it at `low`.

    Source: Smith, arXiv 1803.09820; DeepSpeed, OneCycle (cycle_min_lr, cycle_max_lr, cycle_first_step_size, ...,
    decay_lr_rate).

    >>> [round(one_cycle(1.0, 5.0, 4)(torch.tensor(u)).item(), 6) for u in (0, 1, 4, 6, 8, 99)]
    [1.0, 2.0, 5.0, 3.0, 1.0, 1.0]
    """
    check_numbers("one_cycle", low=low, high=high, decay_rate=decay_rate)
    c = cycle_of("one_cycle", first, second, first_stairs, second_stairs, decay_steps, decay_rate)

    def schedule(updates: Tensor) -> Tensor:
        n = updates.double()
        return torch.where(n - 1 < c.end, low + (high - low) * c.height(n), low / c.decay(n))

    return schedule


def one_cycle_momentum(
    low: float = 0.8,
    high: float = 0.9,
    first: float = 2000,
    second: float | None = None,
    first_stairs: int = 0,
    second_stairs: int | None = None,
    decay_steps: float = 0,
    decay_rate: float = 0.0,
) -> Schedule:
    """The momentum (beta 1) of `one_cycle`: from `high` down to `low` and back, then high (1 + decay_rate d /
    decay_steps). Update 0 runs at `low`.

    Source: DeepSpeed, OneCycle (cycle_min_mom, cycle_max_mom, decay_mom_rate), which forces beta 2 to 0.99.

    >>> [round(one_cycle_momentum(0.8, 0.9, 4)(torch.tensor(u)).item(), 6) for u in (0, 1, 4, 6, 8, 99)]
    [0.8, 0.875, 0.8, 0.85, 0.9, 0.9]
    """
    check_numbers("one_cycle_momentum", low=low, high=high, decay_rate=decay_rate)
    c = cycle_of("one_cycle_momentum", first, second, first_stairs, second_stairs, decay_steps, decay_rate)

    def schedule(updates: Tensor) -> Tensor:
        n = updates.double()
        moving = torch.where(n - 1 < c.end, high - (high - low) * c.height(n), high * c.decay(n))
        return torch.where(n == 0, low, moving)

    return schedule


def lr_range_test(start: float = 1e-3, steps: int = 2000, rate: float = 1.0, staircase: bool = False) -> Schedule:
    """start (1 + rate u / steps), for ever; with staircase in steps of `steps` updates.

    Source: Smith, arXiv 1506.01186; DeepSpeed, LRRangeTest (lr_range_test_min_lr, _step_size, _step_rate, _staircase).

    >>> [round(lr_range_test(0.5, 4)(torch.tensor(u)).item(), 6) for u in (0, 1, 4, 40)]
    [0.5, 0.625, 1.0, 5.5]
    """
    check_numbers("lr_range_test", start=start, rate=rate)
    check_updates("lr_range_test", steps=steps)
    flag("lr_range_test", "staircase", staircase)

    def schedule(updates: Tensor) -> Tensor:
        k = updates.double() / steps
        return start * (1 + rate * (k.floor() if staircase else k))

    return schedule


def from_torch(name: str, lr: float, **options: Any) -> Schedule:
    """A schedule of torch.optim.lr_scheduler: its rate after so many `step()` calls.

    They are loops, not formulas: values are computed in order once and kept, 8 bytes an update.

    Args:
      name: one of TORCH.
      lr: the rate that it starts from or multiplies.
      options: its arguments; cycle_momentum must be False, because a schedule moves one number.

    >>> [from_torch("StepLR", 1.0, step_size=2, gamma=0.5)(torch.tensor(u)).item() for u in (0, 1, 2, 5)]
    [1.0, 1.0, 0.5, 0.25]
    """
    if name not in TORCH:
        raise ValueError(
            f"from_torch: {name!r} is not a schedule that numbers alone describe; write one of {', '.join(TORCH)}"
        )
    number("from_torch", "lr", lr)
    if name in ("CyclicLR", "OneCycleLR") and options.get("cycle_momentum", True):
        raise ValueError(
            f"from_torch: {name} would move the momentum too; write cycle_momentum=False, or one_cycle and"
            " one_cycle_momentum"
        )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **options)
    seen = [float(optimizer.param_groups[0]["lr"])]

    def schedule(updates: Tensor) -> Tensor:
        while len(seen) <= int(updates):
            optimizer.step()  # a parameter without a gradient: it only tells torch that an update came first
            scheduler.step()
            seen.append(float(optimizer.param_groups[0]["lr"]))
        return torch.full((), seen[int(updates)], dtype=torch.float64, device=updates.device)

    return schedule
