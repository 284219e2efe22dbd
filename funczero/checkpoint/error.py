"""The one error of checkpoints."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that is not what it should be, or could not be written."""
