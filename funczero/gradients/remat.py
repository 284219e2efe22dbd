"""The remat form of a block: only its inputs are saved, and it runs again in the backward, as it ran first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from funczero.gradients.arrivals import Group
from funczero.gradients.course import Visit
from funczero.gradients.draws import foreseen
from funczero.gradients.surroundings import Uncached, here, restored
from funczero.gradients.tape import Tape


class Rerun(torch.autograd.Function):
    """A block that saves only its inputs: run again in the backward, in the surroundings of its first run.

    Its units' leaves come in as stand-ins (node.py), so that a backward that does not ask for the parameters books
    none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        visit: Visit,
        buffers: dict[int, Tensor],
        run: Callable[..., Any],
        n: int,
        *tensors: Tensor,
    ) -> Any:
        inputs = tensors[n:]
        ctx.tape, ctx.visit, ctx.run, ctx.n, ctx.needs = tape, visit, run, n, ctx.needs_input_grad[5 + n :]
        ctx.surroundings = here(tape.port.device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        visit.reads = True
        # torch chooses kernels by what needs a gradient:
        with torch.autograd.graph.saved_tensors_hooks(_keep_nothing, _keep_nothing):
            with foreseen(tape.port.device, _drew):
                # a graph that keeps nothing, so that both runs give the same bits
                outs, _, _ = _run_fresh(ctx, buffers, inputs)
        tape.left(visit.group)
        result = tuple(x.detach() if isinstance(x, Tensor) else x for x in outs)
        ctx.mark_non_differentiable(
            *(y for x, y in zip(outs, result, strict=True) if isinstance(x, Tensor) and not x.requires_grad)
        )
        return result

    @staticmethod
    def backward(ctx: Any, *gouts: Tensor | None) -> tuple[Any, ...]:
        tape, group = ctx.tape, ctx.visit.group
        if torch.is_grad_enabled():
            why = (
                "a block that runs again in the backward (remat) is first-order only, but create_graph=True asks for a"
                " second derivative"
            )
            raise RuntimeError(f"value_and_grad(units=...): {why}; leave remat out for this loss")
        with restored(ctx.surroundings):
            opened = {u: tape.again(u, group, ctx.visit) for u in group}
            outs, learning, inputs = _run_fresh(ctx, opened, ctx.saved_tensors)
        pairs = [(o, g) for o, g in zip(outs, gouts, strict=True) if g is not None and o.requires_grad]
        wanted = [*learning, *(x for x in inputs if x.requires_grad)]
        found: Any = [None] * len(wanted)
        if pairs:
            found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        del opened, outs, pairs
        for u in group:
            tape.drop(u)
        rest = iter(found[ctx.n :])
        return (*(None,) * 5, *found[: ctx.n], *(next(rest) if x.requires_grad else None for x in inputs))


def _drew(kind: str) -> RuntimeError:
    why = (
        f"a block that runs again in the backward (remat) draws from {kind}'s global generator, and would draw other"
        " numbers then"
    )
    return RuntimeError(f"fz.layers: {why}; draw before the block and hand the numbers in, or leave remat out")


def _keep_nothing(x: Any) -> Any:
    return None


def _run_fresh(ctx: Any, opened: dict[int, Tensor], saved: Sequence[Tensor]) -> tuple[Any, list[Tensor], list[Tensor]]:
    """A block as a function of fresh leaves: (its outputs, its units' leaves that learn, its inputs)."""
    whole, inputs = ctx.tape.whole, [x.detach().requires_grad_(need) for x, need in zip(saved, ctx.needs, strict=True)]
    leaves = ctx.tape.open_leaves(opened)
    learning = {
        i: leaves[i].requires_grad_()
        for u in ctx.visit.group
        if not whole.structure.units[u].frozen
        for i in whole.structure.members[u]
    }
    before = ctx.tape.copies(leaves)
    with torch.enable_grad(), Uncached():
        outs = ctx.run(leaves, inputs)
    ctx.tape.untouched(leaves, before)
    return outs, list(learning.values()), inputs


def rerun_resting(run: Callable[..., Any], tape: Tape | None, group: Group, inputs: list[Tensor]) -> Any:
    """Remat where nothing is gathered. Views: as in Rerun, a block's uses of a tensor are summed before those of
    other blocks are added.
    """
    leaves = {} if tape is None else tape.resting_leaves(group)
    numbers, n = list(leaves), len(inputs)
    device = inputs[0].device if tape is None and inputs else torch.device("cpu") if tape is None else tape.port.device
    found = here(device)

    def again(*xs: Tensor) -> Any:
        with restored(found) if rerun else nullcontext(), Uncached():
            return run(dict(zip(numbers, xs[n:], strict=True)), xs[:n])

    rerun = False
    views = [*(x.view_as(x) if x.requires_grad else x for x in inputs), *leaves.values()]
    before = None if tape is None else tape.copies(leaves)
    with foreseen(device, _drew):
        outs = checkpoint(again, *views, use_reentrant=False, preserve_rng_state=False)
    rerun = True
    if tape is not None:
        tape.untouched(leaves, before)
    return outs
