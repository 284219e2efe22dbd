"""A notice to stop, such as a scheduler's before it takes the machine: signals only set a flag, and all ranks learn
of it at the same step boundary.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType

from funczero.checkpoint.peers import Peers


class Notice:
    """`if notice.given(): save and end`, once a step, on all ranks.

    Law: at every boundary all ranks get the same answer, though the signal may reach one of them alone. Costs one
    question to the world's store a step.

    >>> import os
    >>> with Notice() as notice:
    ...     before = notice.given()
    ...     os.kill(os.getpid(), signal.SIGUSR1)
    ...     before, notice.given(), notice.name
    (False, True, 'SIGUSR1')
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1)) -> None:
        """Takes the signals over, from the main thread."""
        self.name = ""  # the signal that this rank got
        self._peers: Peers | None = None
        self._count, self._asked, self._at = 0, False, 0
        self._before = {s: signal.signal(s, self._take) for s in signals}

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def given(self) -> bool:
        """At a step boundary: was any rank told to stop?"""
        self._count += 1
        if self._peers is None or not self._peers.current:  # a world may be joined after the signals were taken over
            self._peers = Peers()
        peers = self._peers
        if peers.size == 1:
            return bool(self.name)
        if self.name and not self._asked:
            self._asked = True
            peers.put("notice/asked", True)
        if not self._at and peers.rank == 0 and peers.there("notice/asked"):
            # the next boundary: nobody gets there before rank 0 has left this one
            peers.put("notice/at", self._count + 1)
        if not self._at and peers.there("notice/at"):
            self._at = peers.get("notice/at")
            peers.begin()
        given = 0 < self._at <= self._count
        if given:
            peers.over(peers.number)
        return given

    def close(self) -> None:
        """The signals do again what they did."""
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def __enter__(self) -> Notice:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
