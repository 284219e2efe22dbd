"""`value_and_grad` of a captured step: the loss and its gradient recorded once for every form of a batch, and run as
compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from absl import logging
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from funczero.core import rng, rows, tree
from funczero.core.closed_over import ClosedOver
from funczero.core.exhausted import asking
from funczero.core.spans import span
from funczero.core.types import Seed, State
from funczero.gradients import draws
from funczero.gradients.call import LossCall, Outcome
from funczero.gradients.compiler import compiler
from funczero.gradients.loss import drew, written
from funczero.gradients.program import Program, run
from funczero.gradients.recording import Drawing, NotCaptured, Recording, say, turned
from funczero.gradients.ref import Ref
from funczero.gradients.segments import Line, Segment, Verb, cut
from funczero.gradients.tape import Tape

FORMS = 32  # of batches that are captured; others run as they are written
TIMES = 4  # that one form is recorded, because of what the loss reads around itself
Eager = Callable[[list[Any], Any, Seed, State, Tape], tuple[Outcome, list[Any]]]


class Record(NamedTuple):
    """What was captured of one loss for one form of a batch."""

    program: Program | None  # None: it runs as it is written
    around: ClosedOver
    fn: Any  # the loss, by whose identity it is found
    times: int = 1  # it was recorded


class Given(NamedTuple):
    """What a loss is called with, and the cotangent of its sum."""

    whole: list[Any]  # leaves as a tape opens them for a loss
    state: list[Any]  # the model state, or nothing
    batch: Any
    cotangent: Tensor

    def tensors(self) -> list[Tensor]:
        """In the order in which a program takes them."""
        return [*self.loose().values(), *tree.tensors(self.state), *rows.tensors(self.batch), self.cotangent]

    def loose(self) -> dict[int, Tensor]:
        """Leaves that are open for the whole forward, by number."""
        return {i: x for i, x in enumerate(self.whole) if isinstance(x, Tensor)}

    def odd(self) -> str:
        """What of it a recording cannot be told by; "" where there is nothing."""
        for path, x, _ in rows.opened(self.batch)[0]:
            plain = type(x) is Tensor and x.layout == torch.strided or x is None or isinstance(x, rows.PLAIN)
            if not plain:
                return f"{path!r} of the batch is a {type(x).__name__}"
        return ""


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

    def tell(self, rank: int, words: str, everywhere: bool = False) -> None:
        """Say something once, on rank 0 alone or wherever it is so."""
        if words not in self.told and (everywhere or rank == 0):
            logging.warning("compile: %s%s", f"rank {rank}: " if rank else "", words)
        self.told[words] = None

    def as_written(self, rank: int, why: Any) -> None:
        """Say why the eager step's code runs, on every rank where it does: others may run what is compiled."""
        self.tell(rank, f"the loss runs as it is written, with eager's bits, because {why}", everywhere=True)

    def differentiate(
        self, call: LossCall, eager: Eager, whole: list[Any], batch: Any, seed: Seed, state: State, tape: Tape
    ) -> tuple[Outcome, list[Any]]:
        """The loss of one micro-batch and its gradients by leaf, as `_differentiate` of gradient.py gives them."""
        key: tuple[int, ...] = ()
        if call.rng and seed.key != rng.UNKNOWN:
            key = (rng.fold(seed.key, seed.index),)
        if not torch.is_grad_enabled() or type(tape.port) is not Tensor or tape.port.is_meta or call.rng and not key:
            return eager(whole, batch, seed, state, tape)
        given = Given(whole, call.given(seed, state), batch, seed.cotangent)
        program = self._program(call, given, tape, key)
        if program is None:
            return eager(whole, batch, seed, state, tape)
        flat = given.tensors()
        with span("captured"), asking(lambda: "in the captured forward and backward"):
            if program.line.draws:
                with draws.keyed(key[0], tape.device, drew):
                    found = run(program, tape, call, seed, flat)
            else:
                found = run(program, tape, call, seed, flat)
        loss, weight, moved, aux = found.returned
        outcome = call.outcome(loss, weight, moved, aux, given.state, seed)
        grads = [None if found.void else found.grads.get(i) for i in range(len(tape.whole.structure.leaves))]
        return outcome, grads

    def _program(self, call: LossCall, given: Given, tape: Tape, key: tuple[int, ...]) -> Program | None:
        rank, times = tape.env.mesh.rank(tuple(tape.env.mesh.axes))[0], 1
        if odd := given.odd():
            self.as_written(rank, odd)
            return None
        form = _form(call, given, tape)
        record = self.records.get(form)
        if record is not None:
            name = "" if record.program is None else record.around.changed()
            if not name:
                return record.program
            times = record.times + 1
            self.tell(rank, f"the loss reads {name!r}, which is another now: it is recorded again")
        elif len(self.records) >= FORMS:
            self.as_written(rank, f"there are more than {FORMS} forms of batches")
            return None
        elif self.records:
            self.tell(rank, "another form of a batch is recorded, too")
        around = ClosedOver(list(call.user))
        try:
            if times == TIMES:
                raise NotCaptured(f"what it reads around itself has changed {TIMES - 1} times")
            program = self._made(call, given, tape, key, around)
        except NotCaptured as error:
            self.as_written(rank, error)
            program = None
        self.records[form] = Record(program, around, call.fn, times)
        return program

    def _made(self, call: LossCall, given: Given, tape: Tape, key: tuple[int, ...], around: ClosedOver) -> Program:
        if draws.own_generator() is not None:
            raise NotCaptured("ranks are threads of one process (simulate), which share the compiler")
        if around.odd:
            raise NotCaptured(f"it can see {around.odd}, around itself, and nobody can tell whether that is the same")
        held = [*around.tensors, *getattr(call.fn, "constants", lambda: [])()]
        record = lambda key: recorded(call, given, tape, key, held)
        line, form, wanted = record(key)
        if line.draws and not key:
            raise NotCaptured("it draws from torch's generator without a key")  # eager refuses it, by the layer's name
        if key and not _alike(line, record((key[0] ^ 1,))[0]):
            raise NotCaptured("it computes with its key, which is another number at every call")
        if name := around.changed():
            raise NotCaptured(f"it changes {name!r}, which it reads, too, and has done so once more for the recording")
        compiled = compiler(self.mode)
        runs = [self._run(step, compiled) if isinstance(step, Segment) else None for step in line.steps]
        return Program(line, tuple(runs), form, wanted)

    def _run(self, step: Segment, compiled: Callable[[Segment], Any]) -> Any:
        if step.form not in self.compiled:
            self.compiled[step.form] = compiled(step)
        return self.compiled[step.form]


def recorded(
    call: LossCall, given: Given, tape: Tape, key: tuple[int, ...], held: Sequence[Tensor]
) -> tuple[Line, pytree.TreeSpec, tuple[int, ...]]:
    """A loss and its gradient as a line; the form of what the loss returns, and which gradients follow.

    Args:
      held: tensors that it may read beside its arguments.

    Raises:
      NotCaptured: whatever stands in the way, with where.
    """
    structure, loose = tape.whole.structure, given.loose()
    leaves, build = rows.opened(given.batch)
    flat_state, states = tree.flatten(given.state)
    said: list[Any] = []

    def line(loose_now: list[Tensor], state_now: list[Tensor], batch_now: list[Tensor], cotangent: Tensor) -> Any:
        rec = Recording(tape.whole, tape.dtype, tape.device)
        params = [Ref(rec, i) if isinstance(x, Ref) else x for i, x in enumerate(given.whole)]
        for i, x in zip(loose, loose_now, strict=True):
            params[i] = x
        it, own = iter(batch_now), iter(state_now)
        rows_now = build([next(it) if isinstance(x.value, Tensor) else x.value for x in leaves])
        given_now = tree.unflatten([next(own) if isinstance(x, Tensor) else x for x in flat_state], states)
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
        if any(g is not None and g.layout != torch.strided for g in grads):
            raise NotCaptured("a gradient is sparse")
        flat, form = tree.flatten(result)
        flat = [x.detach() if isinstance(x, Tensor) else x for x in flat]
        said[:] = [rec.visits, form, tuple(wanted)]
        return [*flat, *grads[:-1]]

    at = [x.detach().requires_grad_(x.requires_grad) for x in loose.values()]
    state, mine = tree.tensors(given.state), rows.tensors(given.batch)
    try:
        with Drawing(tape.device):
            graph = make_fx(line, tracing_mode="fake", _allow_non_fake_inputs=True)(at, state, mine, given.cotangent)
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
    if isinstance(x, torch.Generator):
        raise NotCaptured("it draws from a generator of its own")
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


def _alike(a: Line, b: Line) -> bool:
    """Are two recordings of one function the same, but for where their tensors lie?"""
    words = lambda line: repr(
        [
            (x.form, x.reads, x.writes) if isinstance(x, Segment) else (x.name, x.given, x.writes)
            for x in (*line.steps, Verb("", line.outputs, line.inputs, ()))
        ]
    )
    if words(a) != words(b) or [n for n, _ in a.constants] != [n for n, _ in b.constants]:
        return False
    return all(x is y or torch.equal(x, y) for (_, x), (_, y) in zip(a.constants, b.constants, strict=True))


def _form(call: LossCall, given: Given, tape: Tape) -> Any:
    """All that a recording, or compiled code, depends on, but values of tensors."""
    leaves, kind = rows.opened(given.batch)[0], tape.device.type
    own = tuple((x.path, _meta(x.value) if isinstance(x.value, Tensor) else repr(x.value)) for x in leaves)
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return (
        *(id(call.fn), bool(call.rng), tape.whole.structure, tape.dtype, tape.device, type(given.batch), own),
        *(_meta(given.cotangent), tuple(map(_meta, tree.tensors(given.state)))),
        tuple(x.requires_grad if isinstance(x, Tensor) else None for x in given.whole),
        *(cast, torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()),
        *(torch.get_float32_matmul_precision(), torch._C._get_mkldnn_enabled(), torch._C._get_math_sdp_enabled()),
        *(torch._C._get_flash_sdp_enabled(), torch._C._get_mem_efficient_sdp_enabled()),
    )


def _meta(x: Tensor) -> Any:
    return x.dtype, x.shape, x.stride(), x.device, x.requires_grad, x.layout, x.is_conj(), x.is_neg()
