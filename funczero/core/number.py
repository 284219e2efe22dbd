"""Numbers that somebody wrote: what is none, or lies outside its range, is refused by name, argument and value where
it is written; and what values are called in messages.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def number(who: str, what: str, x: Any, low: float = 0.0, high: float = math.inf, above: bool = False) -> float:
    """x as a float, exactly.

    Args:
      who, what: whose argument, and its name: the error's subject.
      low: the least value; with above=True it must be passed.
      high: never reached.

    Raises:
      TypeError: x is a string, a bool, a tensor or anything else that is no int or float.
      ValueError: x is not finite or not in the range.

    >>> number("adamw", "lr", 1)
    1.0
    >>> number("adamw", "lr", "1e-3")
    Traceback (most recent call last):
      ...
    TypeError: adamw: lr='1e-3' is a string and no number; write a finite number of at least 0
    """
    want = (
        f"a number in {'(' if above else '['}{low:g}, {high:g})"
        if high < math.inf
        else f"a finite number {'above' if above else 'of at least'} {low:g}"
    )
    want = want if low > -math.inf else "a finite number"
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{who}: {what}={shown(x)} is {kind(x)} and no number; write {want}")
    try:
        value = float(x)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{who}: {what}={shown(x)} is not finite; write {want}")
    if value < low or above and value == low or value >= high:
        out = f"not below {high:g}" if value >= high else f"below {low:g}" if value < low else f"not above {low:g}"
        raise ValueError(f"{who}: {what}={x} is {out}; write {want}")
    return value


def whole(who: str, what: str, x: Any, low: int = 1) -> int:
    """x as an int of at least `low`.

    Raises:
      TypeError, ValueError: as number's; a float is no int.
    """
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{who}: {what}={shown(x)} is {kind(x)} and no whole number; write an int of at least {low}")
    if x < low:
        raise ValueError(f"{who}: {what}={x} is below {low}; write an int of at least {low}")
    return x


def flag(who: str, what: str, x: Any) -> bool:
    """x, which is True or False: any other value would count as one of them in silence.

    Raises:
      TypeError: x is no bool.
    """
    if not isinstance(x, bool):
        raise TypeError(f"{who}: {what}={shown(x)} is {kind(x)} and neither True nor False; write one of them")
    return x


def kind(x: Any) -> str:
    """What x is, with its article."""
    name = {str: "string", Tensor: "tensor", type(None): "missing value"}.get(type(x), type(x).__name__)
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def shown(x: Any) -> str:
    """x in a message: short, and a tensor on one line."""
    text = " ".join(repr(x).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as torch, numpy and zarr call it: float32, bfloat16, float8_e4m3fn.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
