"""Ranks that need not open the same units: before every message they agree on which unit it carries.

A rank says which unit it wants next, or that it wants none. One of those that are wanted is gathered by all; who did
not want it lets it go. Gradients leave in their one order as soon as every rank has what is next in it. So all ranks
launch the same, whatever the rows of each make of its loss: routed experts, dropped layers, early exits, other numbers
of passes. It costs a message of some bytes a unit, and nothing is gathered ahead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from funczero.comm.integers import sum_integers
from funczero.gradients.arrivals import Arrivals
from funczero.layout.mesh import Mesh


class Agreement:
    """What one tape's ranks agree on, all the ranks of the mesh."""

    def __init__(self, mesh: Mesh, arrivals: Arrivals) -> None:
        """mesh: whose ranks they are, all of them; arrivals: the gradients that leave in between."""
        self.mesh, self.arrivals = mesh, arrivals
        self.place, self.ranks = mesh.rank(tuple(mesh.axes))

    def until(self, unit: int | None, lend: Callable[[int], None]) -> None:
        """Returns when all ranks gather this unit next; with None, when no rank wants one any more.

        Args:
          lend: gathers a unit that another rank wants, and lets it go.
        """
        while (chosen := self._chosen(unit)) != unit:
            assert chosen is not None  # at least this rank wants one
            lend(chosen)

    def _chosen(self, unit: int | None) -> int | None:
        """The unit that all ranks gather now; None where none is wanted. What is due of the gradients leaves first.

        Of several the first in a forward, and after all forwards the last in a backward: so they follow one another.
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
