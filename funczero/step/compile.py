"""`fz.compile`: a step whose loss and gradient are recorded once, and run as compiled code."""

from __future__ import annotations

from funczero.core.types import ChainError
from funczero.gradients.captured import Capture
from funczero.gradients.compiler import MODES
from funczero.step.step import Step


def compile(step: Step, *, mode: str = "inductor") -> Step:  # noqa: A001
    """The same step, in which the loss and its gradient run as code that is compiled once."""
    if mode not in MODES:
        raise ValueError(f"compile: mode={mode!r} is none of {list(MODES)}; write one of them")
    return step.rebuild(capture=Capture(mode))
