"""What a backend's threads still hold of what was sent, so that a process can end.

gloo's own thread lets go of a collective's tensors some microseconds after the collective is complete. A tensor that
Python has dropped meanwhile is freed by that thread, which needs the interpreter for it; where the interpreter is
ending, the thread is ended inside a destructor, and C++ aborts the process ("terminate called without an active
exception": 1 of 200 processes of four updates).
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections import deque

from torch import Tensor

RECENT = 64  # tensors remembered: more than there are threads of gloo's
PATIENCE = 1.0  # seconds that an ending process waits for them; a broken world never lets go
POLL = 0.001  # seconds


class InFlight:
    """The tensors that were sent last, by weak reference."""

    def __init__(self) -> None:
        self.recent: deque[weakref.ref[Tensor]] = deque(maxlen=RECENT)

    def note(self, sent: Tensor, got: Tensor) -> Tensor:
        """Remembers both tensors of a launched collective; returns what it will give."""
        if not self.recent:
            atexit.register(self.settle)
        self.recent.append(weakref.ref(sent))
        self.recent.append(weakref.ref(got))
        return got

    def settle(self) -> None:
        """At exit: wait until nobody but Python holds them."""
        held = [x for ref in self.recent if (x := ref()) is not None]
        until = time.monotonic() + PATIENCE
        while any(x._use_count() > 1 for x in held) and time.monotonic() < until:  # type: ignore[attr-defined]
            time.sleep(POLL)
