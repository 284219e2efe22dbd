"""Ranks that need not open the same units: before every message they agree on which unit it carries.

A rank says which unit it wants next, or that it wants none. One of those that are wanted is gathered by all; who did
not want it lets it go. Gradients leave in their one order as soon as every rank has what is next in it. So all ranks
launch the same, whatever the rows of each make of its loss: routed experts, dropped layers, early exits, other numbers
of passes. It costs a message of some bytes a unit, and nothing is gathered ahead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funczero.comm.integers import sum_integers
from funczero.gradients.arrivals import Arrivals
from funczero.layout.mesh import Mesh


class Agreement:
    """What one tape's ranks agree on, all the ranks of the mesh."""

    def __init__(self, mesh: Mesh, arrivals: Arrivals, gather: Callable[[int], Tensor], forget: Callable[[], None]):
        """gather: a unit, by all ranks; forget: called where this rank did not want it."""
        self.mesh, self.arrivals, self.gather, self.forget = mesh, arrivals, gather, forget
        self.place, self.ranks = mesh.rank(tuple(mesh.axes))

    def take(self, unit: int) -> Tensor:
        """A unit's whole buffer, once its turn has come."""
        while (chosen := self._chosen(unit)) != unit:
            self._lend(chosen)
        return self.gather(unit)

    def end(self) -> None:
        """This rank wants no more units; it returns when no rank does."""
        while (chosen := self._chosen(None)) is not None:
            self._lend(chosen)

    def _lend(self, unit: int | None) -> None:
        assert unit is not None  # some rank wants one: at least this one
        self.gather(unit)
        self.forget()

    def _chosen(self, unit: int | None) -> int | None:
        """The unit that all ranks gather now; None where none is wanted. What is due of the gradients leaves first.

        Of several the first in a forward, before the last in a backward: those come one after another there.
        """
        backward = self.arrivals.booking
        table = torch.zeros(self.ranks, 2, dtype=torch.int64, device=self.mesh.device)
        wanted = 0 if unit is None else -1 - unit if backward else 1 + unit
        table[self.place] = torch.tensor([wanted, self.arrivals.due()])
        rows = sum_integers(table.view(-1), tuple(self.mesh.axes), self.mesh).view(-1, 2).tolist()
        self.arrivals.leave(min(due for _, due in rows))
        asked = [w for w, _ in rows if w]
        forwards = [w for w in asked if w > 0]
        return min(forwards) - 1 if forwards else -1 - min(asked) if asked else None
