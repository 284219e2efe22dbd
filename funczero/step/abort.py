"""Gloo aborts, from a thread of its own, when a message is longer than expected: it waits here until ranks are
compared.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any


class SlowAbort:
    """C++'s last handler before an abort, which first gives others time to end this process with a sentence."""

    def __init__(self, wait: float, told: Callable[[], bool]) -> None:
        """The handler is set.

        Args:
          wait: seconds that an abort waits.
          told: is this process about to end by itself? Then it waits for that.
        """
        self.before: Any = None
        try:
            library, kind = ctypes.CDLL("libstdc++.so.6"), ctypes.CFUNCTYPE(None)
            self.set = library._ZSt13set_terminatePFvvE
        except (AttributeError, OSError):  # another C++ library: gloo's message stands alone
            return
        self.set.restype, self.set.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

        def handler() -> None:
            until = time.monotonic() + wait
            while time.monotonic() < until or told():
                time.sleep(0.05)
            kind(self.before)()

        self.callback = kind(handler)  # to be kept
        self.before = self.set(ctypes.cast(self.callback, ctypes.c_void_p))

    def undo(self) -> None:
        """Before the interpreter goes: no C++ thread may call into it any more."""
        if self.before is not None:
            self.set(self.before)
