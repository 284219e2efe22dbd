"""A value in the type of its key: DeepSpeed's own conversions where they lose nothing, one sentence otherwise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from funczero.deepspeed.config.key import ConfigError, Key
from funczero.world.plain import plain


def typed(where: str, key: Key, value: Any) -> Any:
    """A value in the type of its key and within its range, or one sentence."""
    if key.kind == "rate" and isinstance(value, list) and len(value) == 1:
        return typed(where, key, value[0])
    if value is None and (key.default is None or key.kind in ("off", "any")):
        return value
    if key.kind == "every" and value == math.inf:
        return None
    many = isinstance(value, (list, tuple)) and len(value) > 1 and all(map(_number, value))
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_number, value))
    want = {
        "int": (_whole(value), "a whole number", int),
        "every": (_whole(value), "a whole number, or infinite for never", int),
        "number": (_number(value), "a number", float),
        "rate": (many or _number(value), "a number, or a list with one a group", _floats if many else float),
        "flag": (isinstance(value, bool), "true or false", bool),
        "text": (isinstance(value, str), "text", str),
        "list": (isinstance(value, list), "a list", list),
        "counts": (isinstance(value, list) and all(map(_whole, value)), "a list of whole numbers", list),
        "pair": (pair, "a list of two numbers", tuple),
    }.get(key.kind, (True, "", lambda x: x))
    if not want[0]:
        default = "" if key.default in (None, ...) else f"; the default is {as_json(key.default)}"
        raise ConfigError(f"{where}{as_json(value)} is not {want[1]}; write {want[1]}{default}")
    for x in value if isinstance(value, (list, tuple)) else (value,):
        if _number(x) and not (key.low <= x < key.below and x <= key.high):
            bound = (
                f"at least {key.low:g}"
                if x < key.low
                else f"at most {key.high:g}" if x > key.high else f"less than {key.below:g}"
            )
            raise ConfigError(f"{where}{as_json(value)} is out of range; write {bound}")
    out: Any = want[2](value)
    if key.choices:
        out = out.lower() if isinstance(out, str) else out
        if out not in key.choices:
            raise ConfigError(
                f"{where}{as_json(value)} does not exist; write one of {', '.join(map(as_json, key.choices))}"
            )
    return out


def _floats(x: Any) -> tuple[float, ...]:
    return tuple(map(float, x))


def _number(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) or isinstance(x, float) and math.isfinite(x)


def _whole(x: Any) -> bool:
    return _number(x) and x == int(x)


def as_json(x: Any, write: Callable[[Any], str] = lambda x: json.dumps(x, default=repr)) -> str:
    """A value as the file writes it, shortened to a line of a message."""
    try:
        return plain(write(x), 300)
    except (ValueError, RecursionError):  # an int of more digits than Python prints, a list that holds itself
        return f"a {type(x).__name__} that cannot be shown"
