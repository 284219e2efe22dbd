"""The whole buffers of one tape's units: what is under way, what is here, and when it is let go.

Units come in messages of neighbours (course.py). A message is open from its launch until the last of its units is let
go, and never are more than two open: the one that is used, and the one that travels.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from funczero.comm.units import Travelling, gather_units
from funczero.comm.wire import Key
from funczero.core.exhausted import asking
from funczero.core.types import Env
from funczero.gradients.agree import Agreement
from funczero.gradients.arrivals import Group
from funczero.gradients.course import Visit
from funczero.layout.slots import Slots


class Message:
    """Units that travel together."""

    def __init__(self, units: Group, sent: Travelling) -> None:
        """It was launched."""
        self.units, self.left = units, len(units)
        self.sent: Travelling | None = sent  # None once it has landed: its memory is the units' own then


class Gathers:
    """See the module's docstring."""

    def __init__(self, views: Slots, env: Env, at: Key, agreement: Agreement | None = None) -> None:
        """Nothing is here.

        Args:
          views: parameters that rest in parts.
          at: what wires of views draw from.
          agreement: of ranks that need not open the same units.
        """
        self.views, self.env, self.at, self.agreement = views, env, at, agreement
        self.rest = views.where.axes
        self.flying: dict[int, Message] = {}  # by unit: under way
        self.here: dict[int, Tensor] = {}  # it has come, and nobody has it in use
        self.kept: set[int] = set()  # of these, what the end of a forward has used, and its backward reads first
        self.open: dict[int, Tensor] = {}  # the backward reads it
        self.holds: dict[int, list[Message]] = {}  # of units that are somewhere, in use included
        self.live, self.peak = 0, 0  # open messages

    # --- what travels
    def launch(self, units: Iterable[int]) -> None:
        """Start to gather units that are not here or under way; what is packed alike goes in one message."""
        frozen, edge = self.views.where.structure.units, self.env.edges[self.rest[-1]]
        by_wire: dict[int, list[int]] = {}
        for u in self.away(units):
            by_wire.setdefault(id(edge.views_of(frozen[u].frozen)), []).append(u)
        for same in by_wire.values():
            self.start(tuple(same))

    def away(self, units: Iterable[int]) -> Group:
        """Of units those that are neither here nor under way."""
        return tuple(u for u in units if u not in self.flying and u not in self.here and u not in self.open)

    def start(self, units: Group) -> None:
        """One message is under way."""
        with asking(lambda: self._gathered(units)):
            message = Message(units, self.sent(units))
        for u in units:
            self.flying[u] = message
            self.holds.setdefault(u, []).append(message)
        self.live += 1
        self.peak = max(self.peak, self.live)

    def sent(self, units: Group) -> Travelling:
        """The first step of a gather: over the innermost axis."""
        where, edge = self.views.where.outer, self.env.edges[self.rest[-1]]
        return gather_units(where, units, edge, self.env.mesh, [self.views.buffers[u] for u in units], self.at)

    def outwards(self, units: Group, buffers: list[Tensor]) -> list[Tensor]:
        """The steps after it, over the other axes."""
        where = self.views.where.outer
        for axis in reversed(self.rest[:-1]):
            where = where.outer
            buffers = gather_units(where, units, self.env.edges[axis], self.env.mesh, buffers, self.at).wait()
        return buffers

    def _gathered(self, units: Group) -> str:
        """Whose memory it is, for an error that has none of it."""
        all_units = self.views.where.structure.units
        names = lambda us: ", ".join(repr(name) for name in dict.fromkeys(all_units[u].name for u in us))
        others = names(u for u, held in self.holds.items() if held and u not in units)
        beside = f", beside those of {others}" if others else ""
        return f"for the gathered parameters of unit {names(units)}{beside}"

    def ahead(self, units: Group) -> None:
        """Start gathers that are not needed yet: of one stretch at a time, unless the step says to wait, or another
        rank may need others.
        """
        if self.env.prefetch and self.agreement is None and not self.flying.keys() - set(units):
            self.launch(units)

    def _landed(self, message: Message) -> list[Tensor]:
        """The buffers of a message, complete."""
        assert message.sent is not None
        with asking(lambda: self._gathered(message.units)):
            buffers, message.sent = message.sent.wait(), None
            buffers = self.outwards(message.units, buffers)
        for u in message.units:
            del self.flying[u]
        return buffers

    def bring(self, units: Group) -> None:
        """Units are here, and nothing else that was brought and not used."""
        for u in [u for u in self.here if u not in units]:
            self.drop(u)
        self.launch(units)
        for message in dict.fromkeys(self.flying[u] for u in units if u in self.flying):
            self.here |= dict(zip(message.units, self._landed(message), strict=True))

    def land(self, but: Group = ()) -> None:
        """Nothing is left under way but these units."""
        for message in dict.fromkeys(m for u, m in self.flying.items() if u not in but):
            self.here |= dict(zip(message.units, self._landed(message), strict=True))
            for u in message.units:
                if u not in but:
                    self.drop(u)

    # --- what is used
    def take(self, units: Group, stretch: Group = ()) -> dict[int, Tensor]:
        """Whole buffers for a forward, which says `leave` or `keep` of them.

        Args:
          stretch: what is gathered with them.
        """
        out: dict[int, Tensor] = {}
        for u in units:
            if u in self.open:  # a backward inside the forward has gathered it
                message = self.holds[u][-1]
                message.left += 1
                self.holds[u].append(message)
                out[u] = self.open[u]
                continue
            if self.agreement is not None and self.views.where.structure.units[u].seam:
                self.bring(())
                self.agreement.until(u, self._lend)
                self.bring((u,))
            elif u not in self.here:
                self.bring(tuple(v for v in stretch or units if v not in out))
            self.kept.discard(u)
            out[u] = self.here.pop(u)
        return out

    def _lend(self, unit: int) -> None:
        """A unit that another rank wants is gathered, and let go."""
        self.start((unit,))
        self._landed(self.flying[unit])
        self.leave((unit,))

    def leave(self, units: Iterable[int]) -> None:
        """Buffers that were taken are let go."""
        for u in units:
            message = self.holds[u].pop()
            message.left -= 1
            self.live -= message.left == 0

    def keep(self, buffers: dict[int, Tensor]) -> None:
        """Hold on to what the end of a forward has taken, which the backward reads first."""
        for u, buffer in buffers.items():
            if u in self.open:
                self.leave((u,))
            else:
                self.here[u] = buffer
                self.kept.add(u)

    def reopen(self, unit: int, group: Group, visit: Visit | None) -> Tensor:
        """The whole buffer for the backward, gathered at first touch with what is read next; then the gathers of the
        block before these start.

        Args:
          group: the units of its block.
          visit: of the forward that opened it, where it is known.
        """
        if unit in self.open:
            return self.open[unit]
        for other in [u for u in self.open if u not in group]:
            self.drop(other)  # a frozen unit, or a backward inside the forward, says nothing of its last use
        stretch, before = (group, None) if visit is None else visit.backwards()
        first = unit not in self.here
        if first:
            # nor does a first block whose input needs no gradient, and whose weights no backward reads
            self.land(stretch)
            if self.agreement is not None and self.views.where.structure.units[unit].seam:
                self.agreement.until(unit, self._lend)
                stretch = (unit,)
            self.bring(stretch)
        self.open[unit] = self.here.pop(unit)
        while before is not None and not before.reads:
            before = before.before
        if before is not None and (first or unit in self.kept):
            self.ahead(before.backwards()[0])
        self.kept.discard(unit)
        return self.open[unit]

    # --- what goes
    def drop(self, unit: int) -> None:
        """Forget a gathered buffer that nobody has in use."""
        self.kept.discard(unit)
        if self.open.pop(unit, None) is not None or self.here.pop(unit, None) is not None:
            self.leave((unit,))

    def drop_all(self) -> None:
        """Forget every gathered buffer; a backward that reads one gathers it again."""
        for unit in [*self.open, *self.here]:
            self.drop(unit)

    def end(self) -> None:
        """After the backward nothing is here or under way, on any rank."""
        if self.agreement is not None:
            self.agreement.until(None, self._lend)
        self.land()
        self.drop_all()
