"""A recorded line that runs: its segments compiled, its verbs on a tape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funczero.core.types import Seed
from funczero.gradients.call import LossCall
from funczero.gradients.course import Visit
from funczero.gradients.loss import is_void
from funczero.gradients.segments import Line, Segment, Slot
from funczero.gradients.tape import Tape

Compiled = Callable[..., Sequence[Tensor]]  # (tensors) -> tensors


class Program(NamedTuple):
    """A line whose segments are callables."""

    line: Line
    runs: tuple[Compiled | None, ...]  # by step; None at a verb
    form: pytree.TreeSpec  # of what the loss returned, before its gradients
    wanted: tuple[int, ...]  # leaf numbers of the gradients that follow


class Found(NamedTuple):
    """What a run gives."""

    returned: Any  # as the loss returned it
    grads: dict[int, Tensor | None]  # by leaf number
    void: bool


class Run:
    """One run of a program, on a tape: the verbs."""

    def __init__(self, line: Line, tape: Tape, call: LossCall, seed: Seed) -> None:
        self.line, self.tape, self.call, self.seed, self.stack = line, tape, call, seed, ExitStack()
        self.now: dict[int, tuple[Visit, dict[int, Tensor]]] = {}  # by visit's number; buffers until it is closed
        self.sums: dict[int, Tensor] = {}  # gradients of leaves where nothing is scattered
        self.void = False

    def opened(self, number: int) -> list[Tensor]:
        """A block's leaves for the forward."""
        stop, tape = self.line.visits[number], self.tape
        if not tape.seam:
            return [tape.leaves[i].detach() for i in stop.leaves]
        buffers, visit = tape.enter(stop.group, stop.guess)
        visit.reads = stop.reads
        units = tape.whole.structure.units
        tape.arrivals.use(tuple(u for u in stop.group if stop.learns and not units[u].frozen))
        self.now[number] = visit, buffers
        return self._leaves(number, buffers)

    def closed(self, number: int) -> None:
        """The block has run: its buffers go, but for those of the last one, which the backward reads first."""
        stop, tape = self.line.visits[number], self.tape
        if tape.gathers is None:
            return
        visit, buffers = self.now[number]
        self.now[number] = visit, {}
        if stop.learns:
            tape.course.ran(visit, tape.port)  # of what the block returned it is asked whether it wants a gradient
        if stop.learns and not stop.remat and not visit.after:
            tape.gathers.keep(buffers)
        else:
            tape.left(stop.group)

    def reopened(self, number: int) -> list[Tensor]:
        """Its leaves again, for the backward."""
        stop, tape = self.line.visits[number], self.tape
        if not tape.seam:
            return [tape.leaves[i].detach() for i in stop.leaves]
        return self._leaves(number, {u: tape.again(u, stop.group, self.now[number][0]) for u in stop.group})

    def _leaves(self, number: int, buffers: dict[int, Tensor]) -> list[Tensor]:
        found = self.tape.open_leaves(buffers)
        return [found[i] for i in self.line.visits[number].leaves]

    def arrived(self, number: int, grads: Sequence[Tensor | None]) -> None:
        """Its gradients, leaf by leaf; where nothing is scattered they are added in the order of arrival, too."""
        stop, tape = self.line.visits[number], self.tape
        by_leaf = dict(zip(stop.leaves, grads, strict=True))
        if tape.seam:
            for u in stop.group:
                tape.drop(u)
                if not tape.whole.structure.units[u].frozen:
                    tape.arrivals.arrive(u, [by_leaf[i] for i in tape.whole.structure.members[u]])
            return
        for i, g in by_leaf.items():
            if g is not None:
                self.sums[i] = self.sums[i] + g if i in self.sums else g

    def turned(self, loss: Tensor, weight: Tensor) -> None:
        """The forward has ended: does it count?"""
        self.void = self.seed.hole or is_void(self.call.fn, weight)
        self.stack.enter_context(self.tape.collecting(self.seed.look, void=self.void))


def run(program: Program, tape: Tape, call: LossCall, seed: Seed, given: Sequence[Tensor]) -> Found:
    """A program's values of the tensors given, in the order in which it was recorded."""
    line, now = program.line, Run(program.line, tape, call, seed)
    values: list[Any] = [None] * line.slots
    for slot, x in (*zip(line.inputs, given, strict=True), *line.constants):
        values[slot] = x
    del given
    with now.stack, torch.no_grad():
        for step, compiled in zip(line.steps, program.runs, strict=True):
            if compiled is None:
                out = getattr(now, step.name)(*_given(step.given, values)) or ()  # type: ignore[union-attr]
            else:
                assert isinstance(step, Segment)
                out = compiled(*[values[i] for i in step.reads])
            for i, x in zip(step.writes, out, strict=True):
                values[i] = x
            out = None
            for i in step.dies:
                values[i] = None
    outputs = [values[x.number] if isinstance(x, Slot) else x for x in line.outputs]
    n = program.form.num_leaves
    grads = dict(zip(program.wanted, outputs[n:], strict=True)) | now.sums
    return Found(pytree.tree_unflatten(outputs[:n], program.form), grads, now.void)


def _given(args: Any, values: list[Any]) -> Any:
    """A verb's arguments."""
    if isinstance(args, Slot):
        return values[args.number]
    return [_given(x, values) for x in args] if isinstance(args, (tuple, list)) else args
