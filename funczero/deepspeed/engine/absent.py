"""A name that programs import and that nothing here stands behind: it says so when it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def absent(name: str, instead: str) -> Callable[..., NoReturn]:
    """A function that refuses.

    Args:
      name: as programs call it.
      instead: what to write.
    """

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: it does not exist here; {instead}")

    return refuse


def absent_class(name: str, instead: str) -> type:
    """A class that refuses to be made; nothing is an instance of it."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name}: it does not exist here; {instead}")

    return type(name.rsplit(".", 1)[-1], (), {"__init__": refuse, "__doc__": f"Absent: {instead}."})
