"""The keep form of a block: saved tensors that live in a gathered buffer are swapped for their coordinates, and the
backward gathers the unit again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core.exhausted import told
from funczero.core.spans import span
from funczero.gradients.arrivals import Group
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
    before: Group
    last: bool  # of the forward, as far as is known


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
    memory: dict[int, tuple[Tape, int, Group, Group]] = {}
    for e in entered:
        if e.tape.rest and e.tape.differentiate and torch.is_grad_enabled():
            memory |= {b.untyped_storage()._cdata: (e.tape, u, e.group, e.before) for u, b in e.buffers.items()}
    if not memory:
        out = _run_open(entered, run)
    else:

        def pack(t: Tensor) -> Any:
            home = memory.get(t.untyped_storage()._cdata)
            return t if home is None else (*home, t.shape, t.stride(), t.storage_offset())

        def unpack(saved: Any) -> Tensor:
            if type(saved) is not tuple:
                return saved
            tape, unit, group, before, *form = saved
            return tape.again(unit, group, before).as_strided(*form)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = _run_open(entered, run)
    for e in entered:
        _left(e, out)
    return out


def _entered(tape: Tape, group: Group, guess: Group) -> Entered:
    if not tape.seam:
        return Entered(tape, group, tape.resting_leaves(group), {}, (), False)
    track = torch.is_grad_enabled() and tape.differentiate
    buffers, before, after = tape.enter(group, guess)
    return Entered(tape, group, tape.open_leaves(buffers, track), buffers, before, not after)


def _run_open(entered: Sequence[Entered], run: Runs) -> Any:
    """A block on its open leaves."""
    before, first = [e.tape.copies(e.leaves) for e in entered], entered[0]
    name = first.tape.whole.structure.units[first.group[0]].name
    with span(name), Uncached():
        try:
            out = run([e.leaves for e in entered])
        except (RuntimeError, MemoryError) as error:
            told(error, lambda: f"in the forward of unit {name!r}: what it computes, and what is kept for the backward")
            raise
    for e, copies in zip(entered, before, strict=True):
        e.tape.untouched(e.leaves, copies)
    return out


def _left(e: Entered, out: Any) -> None:
    """The block has run: its buffers go, but for those of the last one, which the backward reads first."""
    tape = e.tape
    if not tape.seam:
        return
    learning = torch.is_grad_enabled() and tape.differentiate
    if learning and not tape.rest:
        return
    if learning:
        tape.course.ran(e.group, out)
    if learning and e.last:
        tape.keep(e.buffers)
    else:
        tape.count(-len(e.group))
