"""What a node says to its launcher: one event a line of JSON behind the ASCII record separator, said and read here."""

from __future__ import annotations

import json
import os
import queue
import threading
from typing import Any

MARK = "\x1e"


class Speaker:
    """Standard output in a thread of its own: a launcher that does not read cannot keep this process from ending its
    ranks.
    """

    def __init__(self, node: int) -> None:
        self.node = node
        self.waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()

    def say(self, **event: Any) -> None:
        """One event to the launcher."""
        self.waiting.put(f"{MARK}{json.dumps({'node': self.node} | event)}\n".encode())

    def close(self) -> None:
        """Wait a moment until all is said."""
        self.waiting.put(None)
        self.thread.join(2.0)

    def _write(self) -> None:
        while (data := self.waiting.get()) is not None:
            try:
                while data:
                    data = data[os.write(1, data) :]
            except OSError:
                data = b""  # nobody listens any more; the ranks' output is still taken, so that they do not block


def event_of(text: str) -> dict[str, Any] | None:
    """What a node said; None for a line of somebody else's, such as a login script's, whatever is in it."""
    _, mark, said = text.partition(MARK)
    try:
        found = json.loads(said) if mark else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("node"), int) else None
