"""The states that a step has made, by the tensors that they are: who hands one back is answered without a comparison.

Nothing is kept alive: a line of the book ends with its state.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from funczero.core.types import TrainState
from funczero.layout.where import Where
from funczero.transforms.skips import Skipped


@dataclass
class Line:
    """What a step remembers of a state that it returned, while that lives."""

    step: weakref.ref[Tensor]
    buffers: tuple[weakref.ref[Tensor], ...]  # of the masters, then of the views
    versions: tuple[int, ...]
    skipped: Skipped


class Book:
    """The states that a step and its donating twin have returned."""

    def __init__(self) -> None:
        self.lines: dict[int, Line] = {}
        self.said: set[str] = set()  # notices
        self.masters: Where | None = None  # where the parameters lie that it was given last

    def add(self, state: TrainState, skipped: Skipped | None = None) -> None:
        """A state of this step's making."""
        buffers, self.masters = buffers_of(state), state.params.where
        if len(self.lines) > 64:
            self.lines = {i: line for i, line in self.lines.items() if line.step() is not None}
        refs, versions = tuple(map(weakref.ref, buffers)), tuple(0 if x.is_inference() else x._version for x in buffers)
        self.lines[id(state.step)] = Line(weakref.ref(state.step), refs, versions, skipped or Skipped())

    def line(self, state: TrainState) -> Line | None:
        """The line of the state that this one is, or was before something in it was replaced."""
        line = self.lines.get(id(state.step))
        return line if line is not None and line.step() is state.step else None

    def made(self, state: TrainState) -> bool:
        """Are these masters and views the very tensors of a state of this step's making, as it left them?"""
        line, buffers = self.lines.get(id(state.step)), buffers_of(state)
        if line is None or line.step() is not state.step or len(buffers) != len(line.buffers):
            return False
        rows = zip(line.buffers, line.versions, buffers, strict=True)
        # a list: this runs at every step
        return all([ref() is x and (x.is_inference() or x._version == v) for ref, v, x in rows])

    def replaced(self, state: TrainState) -> bool:
        """Are these the views of a state of this step's making, but over other masters, or ones written since?"""
        line, n = self.line(state), len(state.params.buffers)
        if line is None:
            return False
        rows = zip(line.buffers, line.versions, buffers_of(state), strict=False)
        same = [ref() is x and (x.is_inference() or x._version == v) for ref, v, x in rows]
        return all(same[n:]) and not all(same[:n])


def buffers_of(state: TrainState) -> tuple[Tensor, ...]:
    """Those of the masters, then those of the views."""
    return state.params.buffers if state.views is None else (*state.params.buffers, *state.views.buffers)
