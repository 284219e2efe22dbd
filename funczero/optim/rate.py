"""What a rate may be: a number, a schedule of applied updates, rules by path, or a tree; how it is checked when it is
given, and its value at an update.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import dtype_name, kind, number, shown
from funczero.core.planned import planned
from funczero.core.types import Grad
from funczero.optim.count import COUNTED, Count

Rate = float | Callable[[Tensor], Tensor] | Sequence[tuple[str, Any]] | Any
Beta = float | Callable[[Tensor], Tensor]  # one for all leaves
FORMS = (
    "write a number, a schedule of applied updates, rules [(regex, rate), ...] or a tree of rates like the parameters"
)


def is_plain(rate: Any) -> bool:
    """Is it one number or one schedule?"""
    return (
        isinstance(rate, (int, float)) and not isinstance(rate, bool) or callable(rate) and not isinstance(rate, type)
    )


def is_rules(rate: Any) -> bool:
    """Is it a list of rules (regex, rate)?"""
    return (
        isinstance(rate, (list, tuple))
        and bool(rate)
        and all(isinstance(r, tuple) and len(r) == 2 and isinstance(r[0], str) for r in rate)
    )


def checked(who: str, what: str, rate: Any) -> Rate:
    """A rate as it is kept: numbers as floats, a schedule, rules as tuples, or the tree.

    Raises:
      TypeError, ValueError: a value in it is no number of at least 0 and no schedule; a regex is none.
    """
    if isinstance(rate, Grad):
        raise TypeError(f"{who}: it stands in a chain without its arguments; write fz.{who}(lr) there")
    if is_rules(rate):
        for regex, _ in rate:
            try:
                re.compile(regex)
            except re.error as e:
                raise ValueError(
                    f"{who}: the rule {regex!r} of {what} is no regex ({e}); write one that is found in the paths"
                ) from None
        return tuple((regex, _one(f"{who}: the rule {regex!r} of {what}", what, r)) for regex, r in rate)
    named = tree.paths(rate)
    if len(named) == 1 and named[0][1] is rate:
        if is_plain(rate) or isinstance(rate, (str, Tensor, Real, type(None))):
            return _one(who, what, rate)
        hint = f"; {scheduler(rate)}" if scheduler(rate) else ""
        raise TypeError(f"{who}: {what}={shown(rate)} is {kind(rate)} and no rate; {FORMS}{hint}")
    if not named:
        raise TypeError(f"{who}: {what}={shown(rate)} holds no rate; {FORMS}")
    return tree.unflatten([_one(f"{who}: {what} at {path!r}", what, r) for path, r in named], tree.flatten(rate)[1])


def _one(who: str, what: str, rate: Any) -> Any:
    return rate if callable(rate) and not isinstance(rate, type) else number(who, what, rate)


def scheduler(x: Any) -> str | None:
    """What to write instead of a scheduler of torch."""
    if isinstance(x, torch.optim.lr_scheduler.LRScheduler):
        return (
            f"a scheduler of torch moves an optimizer of its own: write fz.schedules.from_torch({type(x).__name__!r},"
            " lr, ...)"
        )
    return None


def one_for_all(who: str, what: str, beta: Any, moves: bool = True) -> Any:
    """A beta as it is kept: one number in [0, 1) for all leaves or, where it moves, one schedule.

    Raises:
      TypeError, ValueError: it is by rule or by tree, or no such number.
    """
    if callable(beta) and moves and not isinstance(beta, type):
        return beta
    if callable(beta) or isinstance(beta, (list, tuple, dict)):
        form = "one number in [0, 1) or one schedule" if moves else "one number in [0, 1)"
        raise TypeError(
            f"{who}: {what}={shown(beta)} is {kind(beta)}, but it is the same for all leaves here: write {form}; only"
            " lr and weight_decay go by rules or trees"
        )
    return number(who, what, beta, high=1.0)


def value_at(who: str, what: str, rate: Any, updates: Tensor, high: float = math.inf) -> Any:
    """A rate's value after `updates` applied updates: a number on the CPU, where reading it costs nothing, else a
    float32 tensor.

    Raises:
      TypeError, ValueError: a schedule gives no number, or one that is negative, not finite or not below `high`.
      OverflowError: the count is at its end.
    """
    if not callable(rate):
        return rate
    if planned():  # no byte hangs on a rate
        return 0.5
    value = rate(updates.long().as_subclass(Count))
    if isinstance(value, Tensor) and (value.numel() != 1 or value.dtype == torch.bool or value.is_complex()):
        raise TypeError(f"{who}: the schedule of {what} gives {shown(value)}; return one number of at least 0")
    if isinstance(value, Tensor) and value.device.type != "cpu":  # told by the device, without waiting for it
        now = value.detach().reshape(()).float()
        torch._assert_async(
            (now >= 0) & (now < high), f"{who}: the schedule of {what} gives no finite number of at least 0"
        )
        return now
    n = int(updates)
    if n >= COUNTED and updates.dtype == torch.float32:
        raise OverflowError(
            f"{who}: {n} applied updates are the end of a float32 count, and the schedule of {what} would stand still;"
            " begin a new state there"
        )
    return number(
        f"{who}: after {n} applied updates the schedule's value",
        what,
        value.item() if isinstance(value, Tensor) else value,
        high=high,
    )


def lasting(who: str, eps: float, params: Any) -> None:
    """Refuses an eps that is nothing in the dtype of the parameters, where 0 / 0 would follow."""
    leaf = next(iter(tree.tensors(params)), torch.zeros(()))
    if eps and not float(torch.tensor(eps, dtype=leaf.dtype)):
        name = dtype_name(leaf.dtype)
        raise ValueError(
            f"{who}: eps={eps:g} is 0 in {name}, the dtype of the masters; write a larger eps, or"
            f" policy='params=float32,compute={name}'"
        )
