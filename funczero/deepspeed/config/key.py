"""What a key of a config may be, and the error of one that cannot stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from funczero.world.plain import plain

HONOURED, REFUSED, NO_OP = "honoured", "refused", "no-op"


class ConfigError(ValueError):
    """A config that cannot mean what it says: one sentence with the key's path, its line and what to write instead."""

    def __init__(self, message: str, fixes: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(plain(message))
        self.fixes = tuple(fixes)  # corrections of the batch triad, each of which is valid


class Key(NamedTuple):
    """One key of the table."""

    kind: str  # int, number, flag, text, pair, list, rate, any; off: a feature that must be switched off
    default: Any  # ...: it has none and must be there
    handling: str = HONOURED
    say: str = ""  # refused: what to do instead; no-op: why it changes no value
    low: float = -math.inf  # smallest number
    choices: tuple[Any, ...] = ()  # texts without regard to case
    off: tuple[Any, ...] = ()  # values beside the default that a refused key may have
    below: float = math.inf  # numbers are smaller than it
    high: float = 2.0**63  # largest number


# larger numbers are a slip of the pen
ROWS = 1e9  # of an update
COUNT = 1e12  # updates and calls
RATE = 1e4  # learning rates and what multiplies them
SCALE = 2.0**32  # of a loss


def honour(
    default: Any,
    kind: str = "",
    low: float = -math.inf,
    choices: tuple[Any, ...] = (),
    below: float = math.inf,
    high: float = 2.0**63,
) -> Key:
    """A key that does what it does there."""
    return Key(kind or kind_of(default), default, HONOURED, "", low, choices, below=below, high=high)


def rate(default: Any, kind: str = "rate", high: float = RATE) -> Key:
    """A learning rate, or what multiplies one: not negative, and not absurd."""
    return honour(default, kind, 0, high=high)


def count(default: Any, low: float = 1, high: float = COUNT) -> Key:
    """A number of updates or calls."""
    return honour(default, "int", low, high=high)


def refuse(default: Any, say: str, kind: str = "", off: tuple[Any, ...] = (), low: float = -math.inf) -> Key:
    """A key that would change the training and may only stand at its neutral value."""
    return Key(kind or kind_of(default), default, REFUSED, say, low, (), off)


def ignore(
    default: Any, say: str, kind: str = "", low: float = -math.inf, choices: tuple[Any, ...] = (), high: float = 2.0**63
) -> Key:
    """A key that cannot change a value here; nonsense is refused all the same."""
    return Key(kind or kind_of(default), default, NO_OP, say, low, choices, high=high)


def kind_of(default: Any) -> str:
    """What a value must be to stand where the default stands."""
    kinds = {bool: "flag", int: "int", float: "number", str: "text", list: "list", tuple: "pair"}
    return kinds.get(type(default), "any")


def switched_off(value: Any) -> bool:
    """Is a feature at its neutral value: absent, false, empty, or with nothing enabled at any depth?"""
    if isinstance(value, dict):
        for switch, neutral in (("enabled", (False,)), ("deepcompile", (False,)), ("autotp_size", (0, 1))):
            if switch in value:
                return any(
                    value[switch] is x or (value[switch] == x and type(value[switch]) is type(x)) for x in neutral
                )
        return all(isinstance(x, dict) and switched_off(x) for x in value.values())
    return value is None or value is False
