"""The keep form of a block: saved tensors that live in a gathered buffer are swapped for their coordinates, and the
backward gathers the unit again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funczero.core.exhausted import told
from funczero.core.spans import span
from funczero.gradients.arrivals import Group
from funczero.gradients.surroundings import Uncached
from funczero.gradients.tape import Tape

Run = Callable[[dict[int, Tensor]], Any]  # a block as a function of its open leaves, by leaf number


def _run_open(tape: Tape, group: Group, leaves: dict[int, Tensor], run: Run) -> Any:
    """A block on its open leaves."""
    before, name = tape.copies(leaves), tape.whole.structure.units[group[0]].name
    with span(name), Uncached():
        try:
            out = run(leaves)
        except (RuntimeError, MemoryError) as error:
            told(error, lambda: f"in the forward of unit {name!r}: what it computes, and what is kept for the backward")
            raise
    tape.untouched(leaves, before)
    return out


def _run_once(tape: Tape, group: Group, run: Run, guess: Group) -> Any:
    """A forward that nothing will differentiate."""
    opened, _, _ = tape.enter(group, guess)
    out = _run_open(tape, group, tape.open_leaves(opened), run)
    tape.count(-len(group))
    return out


def run_unit(tape: Tape, group: Group, run: Run, guess: Group = ()) -> Any:
    """`run(leaves)` on one block, keep form. Gradients reach the tape; gathered buffers live only while they are read.

    Args:
      guess: the block that may run after it, whose gather starts early.
    """
    if not tape.seam:
        return _run_open(tape, group, tape.resting_leaves(group), run)
    if not torch.is_grad_enabled() or not tape.differentiate:
        return _run_once(tape, group, run, guess)
    buffers, before, after = tape.enter(group, guess)
    leaves = tape.open_leaves(buffers, track=True)
    if not tape.rest:
        return _run_open(tape, group, leaves, run)
    memory = {b.untyped_storage()._cdata: u for u, b in buffers.items()}
    held = {} if after else buffers
    del buffers

    def pack(t: Tensor) -> Any:
        unit = memory.get(t.untyped_storage()._cdata)
        return t if unit is None else (unit, t.shape, t.stride(), t.storage_offset())

    def unpack(saved: Any) -> Tensor:
        return tape.again(saved[0], group, before).as_strided(*saved[1:]) if type(saved) is tuple else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = _run_open(tape, group, leaves, run)
    tape.course.ran(group, out)
    if held:
        tape.keep(held)
    else:
        tape.count(-len(group))
    return out
