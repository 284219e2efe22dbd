"""In which order a forward opens its blocks, and which of them travel together: what the forward before it did is known
to this one, and nothing is guessed that costs memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from funczero.core import tree
from funczero.gradients.arrivals import Group
from funczero.layout.structure import Unit


class Known(NamedTuple):
    """A forward that has ended: its blocks in order, by block where the stretch ends that it travels in, and the units
    of lists that ran whole.
    """

    blocks: tuple[Group, ...] = ()
    ends: tuple[int, ...] = ()
    whole: frozenset[int] = frozenset()

    def stretch(self, place: int) -> Group:
        """The units from this place to the end of its stretch."""
        blocks = self.blocks[place : self.ends[place]] if place < len(self.blocks) else ()
        return tuple(u for group in blocks for u in group)


class Visit:
    """A block that a forward has opened."""

    def __init__(self, group: Group, before: Visit | None, stretch: Group, after: Group, end: int = -1) -> None:
        """The units of one block.

        Args:
          before: the last block whose output wants a gradient: the backward reads it after this one.
          stretch: the units that are gathered with it in a forward, its own among them.
          after: those of the next stretch; none after the last one of a list.
          end: the place at which its stretch ends; -1 where it travels alone.
        """
        self.group, self.before, self.stretch, self.after, self.end = group, before, stretch, after, end
        self.reads = False  # has the backward to read its units again?

    def backwards(self) -> tuple[Group, Visit | None]:
        """The units that its backward gathers with this block's, and the block that is read after all of them."""
        units, visit = list(self.group), self.before
        while visit is not None and self.end == visit.end != -1:
            units += visit.group if visit.reads else ()
            visit = visit.before
        return tuple(units), visit


class Course:
    """The blocks that one tape's forward has opened, and which one comes before and after each."""

    def __init__(self, memo: dict[Any, Any], units: Sequence[Unit], lengths: Sequence[int], limit: int) -> None:
        """Nothing is opened.

        Args:
          memo: where the course of the last forward over these parameters is kept.
          units: all of them; the names of one list's differ in what stands last.
          lengths: elements of each, whole.
          limit: elements up to which neighbours travel together.
        """
        self.memo, self.units, self.lengths, self.limit = memo, units, lengths, limit
        self.key = "course", limit
        self.was: Known = memo.get(self.key, Known())
        self.now: list[Group] = []
        self.followed: list[bool] = []  # by block: does its list go on after it?
        self.before: Visit | None = None  # the last block whose output wants a gradient

    def first(self) -> Group:
        """The stretch with which the last forward began."""
        return self.was.stretch(0)

    def joins(self, units: Group) -> bool:
        """May the first stretch travel with these units, which every forward opens before it?"""
        first = self.first()
        return self.was.whole.issuperset(first) and self.size((*units, *first)) <= self.limit

    def enter(self, group: Group, guess: Group = ()) -> Visit:
        """This block is opened now.

        Args:
          guess: the next one of its list, if any. Where the last forward was at the same block in the same place, it
            knows better: of two lists the blocks may run in turns.
        """
        if again():  # not a part of the forward
            return Visit(group, None, group, ())
        place, was = len(self.now), self.was
        self.now.append(group)
        self.followed.append(bool(guess))
        if was.blocks[place : place + 1] != (group,):
            return Visit(group, self.before, group, guess)
        end = was.ends[place]
        return Visit(group, self.before, was.stretch(place), was.stretch(end) if guess or end > place + 1 else (), end)

    def size(self, units: Group) -> int:
        """Elements of units."""
        return sum(self.lengths[u] for u in units)

    def ran(self, visit: Visit, out: Any) -> None:
        """The block has returned."""
        if not again() and any(x.requires_grad for x in tree.tensors(out)):
            self.before = visit

    def close(self) -> None:
        """The forward is over."""
        if self.now:
            if self.was.blocks != tuple(self.now):
                whole = self._ran_whole()
                self.memo[self.key] = Known(tuple(self.now), self._ends(whole), whole)
            self.now, self.followed, self.before = [], [], None

    def _ends(self, whole: frozenset[int]) -> tuple[int, ...]:
        """Where the stretches end: neighbours in a list that ran whole, together no more than the limit."""
        starts, size = [0], 0
        for place, group in enumerate(self.now):
            more = self.size(group)
            goes_on = place and self.followed[place - 1] and set(group) <= whole and size + more <= self.limit
            if place and not goes_on:
                starts.append(place)
            size = size + more if goes_on else more
        stops = [*starts[1:], len(self.now)]
        return tuple(b for a, b in zip(starts, stops, strict=True) for _ in range(a, b))

    def _ran_whole(self) -> frozenset[int]:
        """The units of lists all of whose blocks ran, once each and in the list's order.

        A forward that leaves blocks out, or takes them in another order, may choose otherwise the next time, and
        perhaps on one rank alone. Where each block travels by itself, ranks that chose others still launch as many
        messages, and the next sum tells.
        """
        names = [unit.name for unit in self.units]
        ran = [names[group[0]] for group in self.now if group]
        lists: dict[str, dict[str, None]] = {}
        for name in names:
            lists.setdefault(home(name), {})[name] = None
        whole = {here for here, blocks in lists.items() if [n for n in ran if home(n) == here] == list(blocks)}
        return frozenset(u for u, name in enumerate(names) if home(name) in whole)


def home(name: str) -> str:
    """What a unit's name says of its list.

    >>> home("decoder/blocks/11"), home("decoder.blocks.11")
    ('decoder/blocks', 'decoder.blocks')
    """
    return name[: max(name.rfind("/"), name.rfind("."), 0)]


def again() -> bool:
    """Is a backward running? Then a block that runs has run before: it is checkpointed."""
    return torch._C._current_graph_task_id() != -1
