"""A value in the type of its key: DeepSpeed's own conversions where they lose nothing, one sentence otherwise."""
from __future__ import annotations

import json
from typing import Any

from funczero.deepspeed.keys import ConfigError, Key


def typed(where: str, key: Key, value: Any) -> Any:
    """A value in the type of its key, or one sentence."""
    flag, number = isinstance(value, bool), isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 2**63
    if key.kind == "rate" and isinstance(value, list) and len(value) == 1:
        return typed(where, key, value[0])
    if value is None and (key.default is None or key.kind in ("off", "any")):
        return value
    want = {
        "int": (number and value == int(value), "a whole number", int),
        "number": (number, "a number", float),
        "rate": (number, "one number (a file has one group of parameters)", float),
        "flag": (flag, "true or false", bool),
        "text": (isinstance(value, str), "text", str),
        "list": (isinstance(value, list), "a list", list),
        "pair": (
            isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value),
            "a list of two numbers",
            tuple,
        ),
    }.get(key.kind, (True, "", lambda x: x))
    if not want[0]:
        default = "" if key.default in (None, ...) else f"; the default is {as_json(key.default)}"
        raise ConfigError(f"{where}{as_json(value)} is not {want[1]}; write {want[1]}{default}")
    out: Any = want[2](value)
    if key.choices:
        out = out.lower() if isinstance(out, str) else out
        if out not in key.choices:
            raise ConfigError(f"{where}{as_json(value)} does not exist; write one of {', '.join(map(as_json, key.choices))}")
    for x in out if isinstance(out, tuple) else (out,):
        if isinstance(x, (int, float)) and not key.low <= x < key.below:
            raise ConfigError(f"{where}{as_json(value)} is out of range; write {f'at least {key.low:g}' * (x < key.low) or f'less than {key.below:g}'}")
    return out


def as_json(x: Any) -> str:
    """A value as the file writes it."""
    return json.dumps(x, default=repr)
