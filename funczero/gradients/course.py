"""In which order a forward opens its blocks: what the forward before it did is known to this one, and nothing is
guessed that costs memory.
"""

from __future__ import annotations

from typing import Any

import torch

from funczero.core import tree
from funczero.gradients.arrivals import Group

WAS = ("course", "was")  # in Where.memo


class Course:
    """The blocks that one tape's forward has opened, and which one comes before and after each."""

    def __init__(self, memo: dict[Any, Any]) -> None:
        """memo: where the course of the last forward over these parameters is kept."""
        self.memo, self.was, self.now = memo, memo.get(WAS, ()), list[Group]()
        self.before: Group = ()  # the last block whose output wants a gradient: the backward reads it before the next

    def first(self) -> Group:
        """The block that the last forward opened first."""
        return self.was[0] if self.was else ()

    def enter(self, group: Group, guess: Group = ()) -> Group:
        """This block is opened now; the one that is opened after it, as far as it is known.

        Args:
          guess: the next one of its list, if any. Where the last forward was at the same block in the same place, it
            knows better: of two lists the blocks may run in turns.
        """
        if again():  # not a part of the forward, and the block that is read next is known already
            return ()
        place = len(self.now)
        self.now.append(group)
        if guess and self.was[place : place + 1] == (group,):
            return self.was[place + 1] if place + 1 < len(self.was) else ()
        return guess

    def ran(self, group: Group, out: Any) -> None:
        """The block has returned."""
        if not again() and any(x.requires_grad for x in tree.tensors(out)):
            self.before = group

    def close(self) -> None:
        """The forward is over."""
        if self.now:
            self.memo[WAS], self.now = tuple(self.now), []


def again() -> bool:
    """Is a backward running? Then a block that runs has run before: it is checkpointed."""
    return torch._C._current_graph_task_id() != -1
