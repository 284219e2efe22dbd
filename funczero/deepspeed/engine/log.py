"""The face's own log: lines that a config or a program asks for are shown, whatever the script's logging says."""

from __future__ import annotations

import logging
import sys
from typing import Any


class _Shown(logging.StreamHandler[Any]):
    """To what is standard error when a line is written."""

    @property
    def stream(self) -> Any:
        """Now."""
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """Nothing: it is looked up."""


def _made() -> logging.Logger:
    made = logging.getLogger("funczero.deepspeed")
    if not made.handlers:
        handler = _Shown()
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s"))
        made.addHandler(handler)
        made.setLevel(logging.INFO)
        made.propagate = False
    return made


logger = _made()
