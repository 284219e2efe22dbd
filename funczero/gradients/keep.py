"""The keep form of a block: saved tensors that live in a gathered buffer are swapped for their coordinates, and the
backward gathers the unit again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core.exhausted import asking
from funczero.core.spans import span
from funczero.gradients.arrivals import Group
from funczero.gradients.course import Visit
from funczero.gradients.gathers import Gathers
from funczero.gradients.surroundings import Uncached
from funczero.gradients.tape import Tape

Run = Callable[[dict[int, Tensor]], Any]  # a block as a function of its open leaves, by leaf number
Runs = Callable[[list[dict[int, Tensor]]], Any]  # the same of leaves that lie on several tapes


class Entered(NamedTuple):
    """A block's units on one tape, for one run of it."""

    tape: Tape
    group: Group
    leaves: dict[int, Tensor]
    buffers: dict[int, Tensor]  # gathered; empty where nothing is
    visit: Visit | None  # None where nothing is gathered or scattered
    learns: bool  # does a backward follow?


class Home(NamedTuple):
    """Where a gathered buffer comes from, for whoever reads it again."""

    gathers: Gathers
    unit: int
    visit: Visit


def run_unit(tape: Tape, group: Group, run: Run, guess: Group = ()) -> Any:
    """`run(leaves)` on one block, keep form. Gradients reach the tape; gathered buffers live only while they are read.

    Args:
      guess: the block that may run after it, whose gather starts early.
    """
    return run_units([(tape, group, guess)], lambda leaves: run(leaves[0]))


def run_units(parts: Sequence[tuple[Tape, Group, Group]], run: Runs) -> Any:
    """The same of a block whose parameters lie on several tapes, as adapters beside a base that rests elsewhere.

    Args:
      parts: (tape, its units, those of the block that may run after it).
      run: given the leaves of every tape.
    """
    entered = [_entered(*part) for part in parts]
    memory = {at: home for e in entered for at, home in _homes(e).items()}
    if not memory:
        out = _run_open(entered, run)
    else:

        def pack(t: Tensor) -> Any:
            home = memory.get(t.untyped_storage()._cdata)
            if home is None:
                return t
            home.visit.reads = True
            return home, t.shape, t.stride(), t.storage_offset()

        def unpack(saved: Any) -> Tensor:
            if type(saved) is not tuple:
                return saved
            (gathers, unit, visit), *form = saved
            return gathers.reopen(unit, visit.group, visit).as_strided(*form)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = _run_open(entered, run)
    for e in entered:
        _left(e, out)
    return out


def _entered(tape: Tape, group: Group, guess: Group) -> Entered:
    if not tape.seam:
        return Entered(tape, group, tape.resting_leaves(group), {}, None, False)
    learns = torch.is_grad_enabled() and tape.differentiate
    buffers, visit = tape.enter(group, guess)
    leaves = tape.open_leaves(buffers, learns)
    return Entered(tape, group, leaves, {} if tape.gathers is None else buffers, visit, learns)


def _homes(e: Entered) -> dict[int, Home]:
    """By storage, the buffers that a backward gathers again."""
    if e.tape.gathers is None or e.visit is None or not e.learns:
        return {}
    return {b.untyped_storage()._cdata: Home(e.tape.gathers, u, e.visit) for u, b in e.buffers.items()}


def _run_open(entered: Sequence[Entered], run: Runs) -> Any:
    """A block on its open leaves."""
    before, first = [e.tape.copies(e.leaves) for e in entered], entered[0]
    name = first.tape.whole.structure.units[first.group[0]].name
    where = lambda: f"in the forward of unit {name!r}: what it computes, and what is kept for the backward"
    with span(name), Uncached(), asking(where):
        out = run([e.leaves for e in entered])
    for e, copies in zip(entered, before, strict=True):
        e.tape.untouched(e.leaves, copies)
    return out


def _left(e: Entered, out: Any) -> None:
    """The block has run: its buffers go, but for those of the last one, which the backward reads first."""
    gathers = e.tape.gathers
    if gathers is None or e.visit is None:
        return
    if e.learns:
        e.tape.course.ran(e.visit, out)
    if e.learns and not e.visit.after:
        gathers.keep(e.buffers)
    else:
        gathers.leave(e.group)
