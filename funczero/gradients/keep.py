"""The keep form of a block: saved tensors that live in a gathered buffer are swapped for their coordinates, and the
backward gathers the unit again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funczero.gradients.arrivals import Group
from funczero.gradients.surroundings import Uncached
from funczero.gradients.tape import Tape

Run = Callable[[dict[int, Tensor]], Any]  # a block as a function of its open leaves, by leaf number


def _run_open(tape: Tape, leaves: dict[int, Tensor], run: Run) -> Any:
    """A block on its open leaves."""
    before = tape.copies(leaves)
    with Uncached():
        out = run(leaves)
    tape.untouched(leaves, before)
    return out


def _run_once(tape: Tape, group: Group, run: Run, guess: Group) -> Any:
    """A forward that nothing will differentiate."""
    opened, _ = tape.enter(group, guess)
    out = _run_open(tape, tape.open_leaves(opened), run)
    tape.left(group)
    return out


def run_unit(tape: Tape, group: Group, run: Run, guess: Group = ()) -> Any:
    """`run(leaves)` on one block, keep form. Gradients reach the tape; gathered buffers live only while they are read.

    Args:
      guess: the block that may run after it, whose gather starts early.
    """
    if not tape.seam:
        return _run_open(tape, tape.resting_leaves(group), run)
    if not torch.is_grad_enabled() or not tape.differentiate:
        return _run_once(tape, group, run, guess)
    buffers, visit = tape.enter(group, guess)
    leaves = tape.open_leaves(buffers, track=True)
    gathers = tape.gathers
    if gathers is None:
        return _run_open(tape, leaves, run)
    memory = {b.untyped_storage()._cdata: u for u, b in buffers.items()}
    held = {} if visit.after else buffers
    del buffers

    def pack(t: Tensor) -> Any:
        unit = memory.get(t.untyped_storage()._cdata)
        if unit is None:
            return t
        visit.reads = True
        return unit, t.shape, t.stride(), t.storage_offset()

    def unpack(saved: Any) -> Tensor:
        return gathers.reopen(saved[0], group, visit).as_strided(*saved[1:]) if type(saved) is tuple else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = _run_open(tape, leaves, run)
    tape.course.ran(visit, out)
    if held:
        gathers.keep(held)
    else:
        gathers.leave(group)
    return out
