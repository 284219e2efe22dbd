"""What the launcher raises."""

from __future__ import annotations

from funczero.world.plain import plain


class LaunchError(ValueError):
    """A launch that cannot be: one sentence with what is wrong, where, and what to write instead."""

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))
