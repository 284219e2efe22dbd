"""`value_and_grad` of a captured step: the loss and its gradient recorded once for every form of a batch, and run as
compiled code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from absl import logging
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from funczero.core import rng, rows, tree
from funczero.core.closed_over import ClosedOver
from funczero.core.exhausted import told
from funczero.core.spans import span
from funczero.core.types import Seed, State
from funczero.gradients import draws
from funczero.gradients.call import LossCall, Outcome
from funczero.gradients.compiler import NotCompiled, compiler
from funczero.gradients.loss import drew, written
from funczero.gradients.program import Program, run
from funczero.gradients.recording import NotCaptured, Recording, say, turned
from funczero.gradients.ref import Ref
from funczero.gradients.segments import Line, Segment, cut
from funczero.gradients.tape import Tape

FORMS = 32  # of batches that are captured; others run as they are written
Eager = Callable[[list[Any], Any, Seed, State, Tape], tuple[Outcome, list[Any]]]


class Record(NamedTuple):
    """What was captured of one loss for one form of a batch."""

    program: Program | None  # None: it runs as it is written
    around: ClosedOver


class Capture:
    """What one step has captured; it is shared by the chains that are built of it."""

    def __init__(self, mode: str) -> None:
        """mode: "inductor", or "graph" for the operations as they were recorded."""
        self.mode = mode
        self.records: dict[Any, Record] = {}
        self.compiled: dict[str, Any] = {}  # like segments of any program, by their form
        self.told: dict[str, None] = {}

    def __str__(self) -> str:
        return f"compiled ({self.mode})"

    def notes(self) -> list[str]:
        """What a printed step says of it."""
        if self.mode == "graph":
            said = "the loss and its gradient run as they were recorded: eager's bits"
        else:
            said = (
                "the loss and its gradient are compiled (inductor): another trajectory than the eager step's, the same"
                " wherever the eager step's would be"
            )
        return [said, *self.told]

    def tell(self, speaks: bool, words: str) -> None:
        """Say something once."""
        if speaks and words not in self.told:
            logging.warning("compile: %s", words)
        self.told[words] = None

    def differentiate(
        self, call: LossCall, eager: Eager, whole: list[Any], batch: Any, seed: Seed, state: State, tape: Tape
    ) -> tuple[Outcome, list[Any]]:
        """The loss of one micro-batch and its gradients by leaf, as `_differentiate` of gradient.py gives them."""
        key = (rng.fold(seed.key, seed.index),) if call.rng and seed.key != rng.UNKNOWN else ()
        if not torch.is_grad_enabled() or type(tape.port) is not Tensor or tape.port.is_meta or call.rng and not key:
            return eager(whole, batch, seed, state, tape)
        given = call.given(seed, state)
        program = self._program(call, whole, given, batch, tape, key)
        if program is None:
            return eager(whole, batch, seed, state, tape)
        flat = [*_loose(whole).values(), *_tensors(given), *rows.tensors(batch), seed.cotangent]
        try:
            with span("captured"):
                if program.line.draws:
                    with draws.keyed(key[0], tape.device, drew):
                        found = run(program, tape, call, seed, flat)
                else:
                    found = run(program, tape, call, seed, flat)
        except (RuntimeError, MemoryError) as error:
            told(error, lambda: "in the captured forward and backward")
            raise
        outcome = call.outcome(*found.returned, given, seed)
        grads = [None if found.void else found.grads.get(i) for i in range(len(tape.whole.structure.leaves))]
        return outcome, grads

    def _program(
        self, call: LossCall, whole: list[Any], given: list[Any], batch: Any, tape: Tape, key: tuple[int, ...]
    ) -> Program | None:
        form = (_form(call, whole, given, batch, tape), _surroundings(tape.device))
        record, speaks = self.records.get(form), tape.env.mesh.rank(tuple(tape.env.mesh.axes))[0] == 0
        if record is not None:
            name = record.around.changed()
            if not name:
                return record.program
            self.tell(speaks, f"the loss reads {name!r}, which is another now: what was recorded of it is recorded again")
        elif len(self.records) >= FORMS:
            self.tell(speaks, f"more than {FORMS} forms of batches: others run as they are written, with eager's bits")
            return None
        elif self.records:
            self.tell(speaks, "another form of a batch: it is captured, too")
        around = ClosedOver(list(call.user))
        try:
            program = self._made(call, whole, given, batch, tape, key, around)
        except NotCaptured as error:
            alone = isinstance(error, NotCompiled)  # on this machine, perhaps
            self.tell(speaks or alone, f"the loss runs as it is written, with eager's bits, because {error}")
            program = None
        self.records[form] = Record(program, around)
        return program

    def _made(
        self,
        call: LossCall,
        whole: list[Any],
        given: list[Any],
        batch: Any,
        tape: Tape,
        key: tuple[int, ...],
        around: ClosedOver,
    ) -> Program:
        if draws.own_generator() is not None:
            raise NotCaptured("ranks are threads of one process (simulate), which share the compiler")
        if not around.whole:
            raise NotCaptured("it can see more values around itself than are looked at before each call")
        held = [*around.tensors, *getattr(call.fn, "constants", lambda: [])()]
        record = lambda key: recorded(call, whole, given, batch, tape, key, held)
        line, form, wanted = record(key)
        if line.draws and not key:
            raise NotCaptured("it draws from torch's generator without a key")  # eager refuses it, by the layer's name
        if line.draws and any(stop.remat for stop in line.visits):
            raise NotCaptured("it draws, and has blocks that run again (remat)")
        if key:
            again, _, _ = record((key[0] ^ 1,))
            if _words(line) != _words(again):
                raise NotCaptured("it computes with its key, which is another number at every call")
        with _ALONE:
            compiled = compiler(self.mode)
            runs = [self._run(step, compiled) if isinstance(step, Segment) else None for step in line.steps]
        return Program(line, tuple(runs), form, wanted)

    def _run(self, step: Segment, compiled: Callable[[Segment], Any]) -> Any:
        if step.form not in self.compiled:
            self.compiled[step.form] = compiled(step)
        return self.compiled[step.form]


_ALONE = threading.Lock()  # the compiler's settings are the process's


def recorded(
    call: LossCall,
    whole: list[Any],
    given: list[Any],
    batch: Any,
    tape: Tape,
    key: tuple[int, ...],
    held: Sequence[Tensor],
) -> tuple[Line, pytree.TreeSpec, tuple[int, ...]]:
    """A loss and its gradient as a line; the form of what the loss returns, and which gradients follow.

    Raises:
      NotCaptured: whatever stands in the way, with where.
    """
    structure, loose = tape.whole.structure, _loose(whole)
    leaves, build = rows.opened(batch)
    mine = [x.value for x in leaves if isinstance(x.value, Tensor)]
    state, states = _tensors(given), tree.flatten(given)
    said: list[Any] = []

    def line(loose_now: list[Tensor], state_now: list[Tensor], batch_now: list[Tensor], cotangent: Tensor) -> Any:
        rec = Recording(tape.whole, tape.dtype, tape.device)
        params = [Ref(rec, i) if isinstance(x, Ref) else x for i, x in enumerate(whole)]
        for i, x in zip(loose, loose_now, strict=True):
            params[i] = x
        it, own = iter(batch_now), iter(state_now)
        rows_now = build([next(it) if isinstance(x.value, Tensor) else x.value for x in leaves])
        given_now = tree.unflatten([next(own) if isinstance(x, Tensor) else x for x in states[0]], states[1])
        versions = [x._version for x in loose_now]
        result = call.called(structure.unflatten(params), given_now, rows_now, key, tape.device)
        for i, x, version in zip(loose, loose_now, versions, strict=True):
            if x._version != version:
                raise written(structure.leaves[i].path)
        loss, weight, *_ = result
        if not loss.requires_grad:
            raise NotCaptured("its value depends on no parameter that learns")
        say(turned, loss, weight)
        wanted = {i: x for i, x in zip(loose, loose_now, strict=True) if x.requires_grad}
        grads = torch.autograd.grad(loss, [*wanted.values(), rec.port], cotangent.to(loss.dtype), allow_unused=True)
        flat, form = tree.flatten(result)
        flat = [x.detach() if isinstance(x, Tensor) else x for x in flat]
        said[:] = [rec.visits, form, tuple(wanted)]
        return [*flat, *grads[:-1]]

    at = [x.detach().requires_grad_(x.requires_grad) for x in loose.values()]
    try:
        graph = make_fx(line, tracing_mode="fake", _allow_non_fake_inputs=True)(at, state, mine, torch.ones_like(
            tape.port, dtype=torch.float32
        ))
    except NotCaptured:
        raise
    except Exception as error:  # somebody's code, on tensors without values: whatever it raises there, it does not here
        first = str(error).strip().splitlines()
        raise NotCaptured(f"it cannot be recorded: {type(error).__name__}: {first[0] if first else ''}") from error
    visits, form, wanted = said
    constant = lambda name: _known(getattr(graph, name), name, graph.graph, held)
    return cut(graph.graph, visits, constant, len(at)), form, wanted


def _known(x: Any, name: str, graph: torch.fx.Graph, held: Sequence[Tensor]) -> Tensor:
    """A tensor that the loss read beside its arguments, where it is known to be the same at every call."""
    literal = all(
        getattr(user.target, "_opname", "").startswith("lift_fresh")
        for node in graph.nodes
        if node.op == "get_attr" and node.target == name
        for user in node.users
    )
    if not isinstance(x, Tensor) or not literal and not any(x is y for y in held):
        what = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise NotCaptured(f"it reads {what} that is neither an argument nor among what it holds")
    return x


def _words(line: Line) -> Any:
    """What two recordings of one function must have in common: all but their memory."""
    steps = [
        (step.form, step.reads, step.writes) if isinstance(step, Segment) else (step.name, step.given, step.writes)
        for step in line.steps
    ]
    return repr((steps, line.outputs, [(n, x.tolist()) for n, x in line.constants]))


def _loose(whole: list[Any]) -> dict[int, Tensor]:
    """Leaves that are open for the whole forward, each by the first of its numbers."""
    return {i: x for i, x in enumerate(whole) if isinstance(x, Tensor)}


def _tensors(given: list[Any]) -> list[Tensor]:
    return tree.tensors(given)


def _form(call: LossCall, whole: list[Any], given: list[Any], batch: Any, tape: Tape) -> Any:
    """All that a recording depends on but values of tensors."""
    leaves, _ = rows.opened(batch)
    own = tuple((x.path, _meta(x.value) if isinstance(x.value, Tensor) else repr(x.value)) for x in leaves)
    learning = tuple(x.requires_grad if isinstance(x, Tensor) else None for x in whole)
    return (
        call.fn,
        tape.whole.structure,
        type(batch),
        own,
        tuple(map(_meta, _tensors(given))),
        learning,
        tape.dtype,
        bool(call.rng),
    )


def _meta(x: Tensor) -> Any:
    return x.dtype, x.shape, x.stride(), x.device, x.requires_grad, x.layout


def _surroundings(device: torch.device) -> Any:
    """Settings of this process that a recording, or compiled code, has in it."""
    kind = device.type
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return cast, torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
