"""A loss and its gradient as one straight line of operations: recorded once on tensors without values.

While it is recorded a `Recording` stands in a tape's place. A unit is opened, closed, opened again for the backward,
and its gradients arrive: these verbs stand in the line, at the same places at every stage, and between them there are
torch's operations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from funczero.core import tree
from funczero.gradients.arrivals import Group
from funczero.gradients.draws import generators
from funczero.gradients.loss import written
from funczero.gradients.surroundings import Uncached
from funczero.layout.where import Where


class NotCaptured(RuntimeError):
    """Why something cannot be recorded; it then runs as it is written."""


class Stop(NamedTuple):
    """A block, opened once in a forward."""

    group: Group
    guess: Group  # the block that may be opened after it
    leaves: tuple[int, ...]
    remat: bool
    learns: bool  # does its output want a gradient?
    reads: bool = True  # does its backward read its leaves?


# --- the verbs, as they stand in a recorded graph; the first argument is a visit's number
def opened(visit: int) -> NoReturn:
    """A block's leaves for the forward."""
    raise NotImplementedError


def closed(visit: int) -> NoReturn:
    """The block has run."""
    raise NotImplementedError


def reopened(visit: int) -> NoReturn:
    """Its leaves again, for the backward."""
    raise NotImplementedError


def arrived(visit: int, grads: Sequence[Tensor | None]) -> NoReturn:
    """Its gradients, leaf by leaf."""
    raise NotImplementedError


def turned(loss: Tensor, weight: Tensor) -> NoReturn:
    """The forward has ended, and the backward begins."""
    raise NotImplementedError


VERBS = (opened, closed, reopened, arrived, turned)


def say(verb: Callable[..., Any], *args: Any, gives: Sequence[Tensor] = ()) -> None:
    """A verb in the line that is being recorded.

    Args:
      gives: the tensors that it returns there.
    """
    mode: Any = get_proxy_mode()
    named = tree.map(lambda x: mode.tracer.unwrap_proxy(x) if isinstance(x, Tensor) else x, args)
    proxy = mode.tracer.create_proxy("call_function", verb, named, {})
    if gives:
        track_tensor_tree(tuple(gives), proxy, constant=None, tracer=mode.tracer)


def draws(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Does a call of an operation draw? Attention without dropout does not."""
    names = [a.name for a in op._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    never = "dropout_p" in names and not given.get("dropout_p")
    return torch.Tag.nondeterministic_seeded in op.tags and not never


class Drawing(TorchDispatchMode):
    """Refuses draws that would have other numbers in the line than in the step: a line has one stream, from which
    every draw takes what comes next.
    """

    def __init__(self, device: torch.device) -> None:
        """The generators stand as a recording finds them, which itself draws nothing."""
        super().__init__()
        self.generators = generators(device)
        self.began = self._states()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation, where it may be recorded."""
        if draws(func, args, kwargs or {}):
            if torch._C._current_graph_task_id() != -1:
                why = "again in the backward (remat, torch.utils.checkpoint), which must draw the same"
                raise NotCaptured(f"it draws in what runs {why}")
            if not all(map(torch.equal, self._states(), self.began)):
                raise NotCaptured("it sets the state of torch's generator, and draws from there")
        return func(*args, **(kwargs or {}))

    def _states(self) -> list[Tensor]:
        with _disable_current_modes():
            return [g.get_state() for g in self.generators]


class Recording:
    """A tape's place while a loss is recorded: every unit is closed, and a block that runs says so."""

    def __init__(self, whole: Where, dtype: torch.dtype, device: torch.device) -> None:
        """whole: of all leaves, as a loss sees them; dtype: in which it sees them."""
        self.whole, self.dtype, self.device, self.differentiate = whole, dtype, device, True
        self.visits: list[Stop] = []
        with disable_proxy_modes_tracing():
            self.port = torch.zeros((), device=device, requires_grad=True)
            self.still = torch.zeros((), device=device)  # in the port's place where nothing learns

    @property
    def ports(self) -> list[Tensor]:
        """What stands for the closed leaves in a graph."""
        return [self.port]

    def gathered(self, group: Sequence[int]) -> NoReturn:
        """Refused: what a loss holds open by itself has no place in the line."""
        name = self.whole.structure.units[group[0]].name
        raise NotCaptured(f"unit {name!r} is opened by fz.gather, for as long as the loss holds it")

    def reopened(self, leaf: int) -> NoReturn:
        """Refused: a part of a block runs again inside the block's backward."""
        name = self.whole.structure.units[self.whole.structure.leaves[leaf].unit].name
        raise NotCaptured(f"unit {name!r} runs a part of itself again (torch.utils.checkpoint)")

    def run(self, group: Group, guess: Group, block: Callable[..., Any], inputs: Sequence[Tensor], remat: bool) -> Any:
        """block(leaves by number, inputs) -> a tuple, in the line."""
        learns = any(not self.whole.structure.units[u].frozen for u in group)
        return _Block.apply(self, group, guess, block, remat, self.port if learns else self.still, *inputs)

    def leaves(self, group: Group, verb: Callable[..., Any], visit: int) -> dict[int, Tensor]:
        """A block's leaves as a verb gives them."""
        structure = self.whole.structure
        with disable_proxy_modes_tracing():
            found = {
                i: torch.empty(structure.leaves[i].shape, dtype=self.dtype, device=self.device)
                for u in group
                for i in structure.members[u]
            }
        say(verb, visit, gives=list(found.values()))
        return {i: x if structure.frozen(i) else x.requires_grad_() for i, x in found.items()}


class _Block(torch.autograd.Function):
    """A block in the line. Its inner graph is its own, so that its backward stands between two verbs."""

    @staticmethod
    def forward(
        ctx: Any,
        rec: Recording,
        group: Group,
        guess: Group,
        block: Callable[..., Any],
        remat: bool,
        port: Tensor,
        *inputs: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[6:]
        number, first = len(rec.visits), [x.detach() for x in inputs]
        leaves = rec.leaves(group, opened, number)
        rec.visits.append(Stop(group, guess, tuple(leaves), remat, any(ctx.needs_input_grad)))
        outs, fresh = _run(rec, block, leaves, first, needs)
        say(closed, number)
        ctx.rec, ctx.number, ctx.block, ctx.needs, ctx.n = rec, number, block, needs, len(inputs)
        ctx.ran = None if remat else (outs, leaves, fresh)
        ctx.first = first if remat else None
        result = tuple(x.detach() if isinstance(x, Tensor) else x for x in outs)
        ctx.mark_non_differentiable(
            *(y for x, y in zip(outs, result, strict=True) if isinstance(x, Tensor) and not x.requires_grad)
        )
        return result

    @staticmethod
    def backward(ctx: Any, *gouts: Tensor | None) -> tuple[Any, ...]:
        rec, visit = ctx.rec, ctx.rec.visits[ctx.number]
        leaves = rec.leaves(visit.group, reopened, ctx.number)
        if ctx.ran is None:
            outs, fresh = _run(rec, ctx.block, leaves, ctx.first, ctx.needs)
        else:
            outs, leaves, fresh = ctx.ran  # of the first opening: program.py puts the second one in its place
        pairs = [(o, g) for o, g in zip(outs, gouts, strict=True) if g is not None and o.requires_grad]
        learning = [x for x in leaves.values() if x.requires_grad]
        inputs = [x for x in fresh if x.requires_grad]
        found: Sequence[Any] = [None] * (len(learning) + len(inputs))
        if pairs:
            wanted = [*learning, *inputs]
            found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        ctx.ran = None
        own, rest = iter(found[: len(learning)]), iter(found[len(learning) :])
        say(arrived, ctx.number, [next(own) if x.requires_grad else None for x in leaves.values()])
        return (*(None,) * 6, *(next(rest) if x.requires_grad else None for x in fresh))


def _run(
    rec: Recording,
    block: Callable[..., Any],
    leaves: dict[int, Tensor],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """A block on fresh inputs: (what it returns, its inputs)."""
    fresh = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    before = [x._version for x in fresh]
    with torch.enable_grad(), Uncached():
        outs = block(leaves, fresh)
    for i, x in leaves.items():
        if x._version:
            raise written(rec.whole.structure.leaves[i].path)
    if any(x._version != version for x, version in zip(fresh, before, strict=True)):
        raise NotCaptured("a block changes one of its inputs in place")
    _all_its_own(outs, [*leaves.values(), *fresh])
    return outs, fresh


def _all_its_own(outs: Sequence[Any], own: Sequence[Tensor]) -> None:
    """Refuse a block whose output depends on a leaf that was not handed in: the line would lose its gradient."""
    known, seen = {id(x) for x in own}, set[Any]()
    todo: list[Any] = [x.grad_fn for x in outs if isinstance(x, Tensor) and x.grad_fn is not None]
    todo += [
        None for x in outs if isinstance(x, Tensor) and x.requires_grad and x.grad_fn is None and id(x) not in known
    ]
    while todo:
        fn = todo.pop()
        if fn is None or hasattr(fn, "variable") and id(fn.variable) not in known:
            raise NotCaptured("a block reads a tensor that needs a gradient and was not handed to it")
        if fn not in seen:
            seen.add(fn)
            todo += [nxt for nxt, _ in fn.next_functions if nxt is not None]
