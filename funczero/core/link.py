"""A link between ranks as two numbers, and how many bytes are worth a message of their own."""

from __future__ import annotations

from typing import NamedTuple

from funczero.core.number import number


class Link(NamedTuple):
    """What a message costs: its latency, and its bytes by the speed.

    The numbers are stated and not measured while a step runs, so that all ranks form the same messages. The defaults
    are those of two processes of one machine over gloo: launching, waiting and waking two threads take a quarter of a
    millisecond.

    >>> Link().together, Link(latency=0.0).together
    (1000000, 0)
    """

    latency: float = 250e-6  # seconds that a message takes which carries nothing
    speed: float = 1e9  # bytes a second

    @property
    def together(self) -> int:
        """Bytes up to which neighbours share a message: its latency is then a fifth of its time."""
        return round(min(4 * self.latency * self.speed, 2.0**62))

    def checked(self, who: str) -> Link:
        """This link.

        Raises:
          TypeError, ValueError: its numbers are none of a link.
        """
        return Link(number(who, "latency", self.latency), number(who, "speed", self.speed, above=True))
