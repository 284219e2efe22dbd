"""How one mesh axis is crossed: which leaves it cuts, what travels when it gathers and scatters, how it adds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from funczero.comm.wire import Wire, as_born, prove
from funczero.layout.cut import Rules


class Edge(NamedTuple):
    """All that collectives and tapes know of an axis; `Env.edges` holds one for every axis of the mesh.

    `Edge(axis)` is exact.
    """

    axis: str
    rules: Rules | None = None  # how its bracket cuts leaves; None without a bracket
    gather: Wire = as_born  # of views, and of what a closing bracket joins
    scatter: Wire = as_born  # of gradients on their way to a sum
    frozen: Wire | None = None  # of views of leaves that do not learn; None: as the others
    sums: str = "tree"  # how ranks' parts are added: in the one tree, as integers ("exact"), or by the "backend"
    adds: torch.dtype = torch.float32  # in which they are added: policy.accumulate

    @property
    def exact(self) -> bool:
        """Does everything travel as it was born?"""
        return all(w is as_born for w in (self.gather, self.scatter, self.views_of(True)))

    def views_of(self, frozen: bool) -> Wire:
        """How views travel, of leaves that learn or of those that do not."""
        return self.frozen if frozen and self.frozen is not None else self.gather

    def with_wires(self, other: Edge) -> Edge:
        """This edge with another's wires.

        Raises:
          ValueError: both name one for the same direction.
        """
        for way in ("gather", "scatter"):
            ours, theirs = getattr(self, way), getattr(other, way)
            if ours is not as_born and theirs is not as_born:
                what = f"the {way} over {self.axis!r} has a wire already ({ours}), and is given another ({theirs})"
                raise ValueError(f"{what}; write one of them")
        return self._replace(
            gather=self.gather if other.gather is as_born else other.gather,
            scatter=self.scatter if other.scatter is as_born else other.scatter,
            frozen=self.frozen if other.frozen is None else other.frozen,
        )

    def proven(self, born: torch.dtype, device: torch.device) -> Edge:
        """This edge, its wires tried: views and first sums are born in `born`, later sums in `adds`.

        Raises:
          TypeError, ValueError: a wire breaks a law, or the backend should add what is packed.
        """
        if getattr(self.gather, "memory", None) is not None:
            why = "keeps the error of a sum, and views are no sum"
            raise ValueError(f"gather={self.gather} over {self.axis!r}: it {why}; write fz.difference(wire) for views")
        if getattr(self.scatter, "difference", False):
            why = "sends what is new against the values that its readers hold, and nobody holds an earlier gradient"
            raise ValueError(f"scatter={self.scatter} over {self.axis!r}: it {why}; write fz.feedback(wire) for sums")
        if self.frozen is not None and (getattr(self.frozen, "difference", False) or self.gather.difference):
            why = (
                "views that do not learn are sent once, at the start, and exactly where the others follow by"
                " differences"
            )
            raise ValueError(f"frozen={self.frozen} over {self.axis!r}: {why}; leave frozen out")
        sums = (self.adds, self.adds)
        frozen = self.views_of(True)
        ways = ((self.gather, (born, born)), (frozen, (born, born)), (self.scatter, (born, self.adds)))
        for wire, first in dict.fromkeys(ways):
            # on meta there are no values to try it on: that is a plan of a step whose wires were tried
            for pair in dict.fromkeys((first, sums)) if wire is not as_born and device.type != "meta" else ():
                prove(wire, *pair, device)
        if self.scatter is not as_born and self.sums == "backend":
            why = f"the backend adds what is on the wire, and {self.scatter} packs it"
            raise ValueError(f"sums='backend' over {self.axis!r}: {why}; leave one of them out")
        if self.scatter is not as_born and self.sums == "exact":
            why = f"{self.scatter} rounds once for every sum, and how many there are depends on ranks and stage"
            raise ValueError(f"sums='exact' over {self.axis!r}: {why}; leave one of them out")
        return self

    def __str__(self) -> str:
        ways = [("gather", self.gather), ("scatter", self.scatter)]
        ways += [("frozen", self.frozen)] if self.frozen is not None else []
        return ", ".join(f"{way}={wire}" for way, wire in ways if wire is not as_born)


def joined(edges: Iterable[Edge]) -> dict[str, Edge]:
    """By axis, in order; an axis that is named twice has the rules of the first and the wires of both.

    Raises:
      ValueError: two name a wire for the same direction of one axis.
    """
    out: dict[str, Edge] = {}
    for e in edges:
        out[e.axis] = out[e.axis].with_wires(e) if e.axis in out else e
    return out
