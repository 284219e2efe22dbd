"""A unit's leaves in the graph of a forward: the node that hears of their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from funczero.gradients.tape import Tape


def node(tape: Tape, unit: int, buffer: Tensor | None = None) -> tuple[Tensor, ...]:
    """A unit's leaves in the graph.

    Args:
      buffer: None: stand-ins of their shapes and of no memory, for who computes the gradients itself.
    """
    try:
        return _Open.apply(tape, unit, buffer, tape.port)
    except RuntimeError as error:
        if "setup_context" not in str(error):
            raise
        name = tape.whole.structure.units[unit].name
        why = "is opened inside a torch.func transform, but units are first-order and know no vmap or jvp"
        remedy = "write value_and_grad(..., higher_order=True)"
        raise RuntimeError(f"value_and_grad(units=...): unit {name!r} {why}; {remedy}") from None


class _Open(torch.autograd.Function):
    """A unit's leaves for the forward. Autograd runs this node only for a backward that asks for their gradients."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, unit: int, buffer: Tensor | None, port: Tensor) -> tuple[Tensor, ...]:
        ctx.tape, ctx.unit, ctx.held = tape, unit, buffer is not None
        ctx.set_materialize_grads(False)
        if buffer is None:
            one, leaves = torch.zeros((), dtype=tape.dtype, device=port.device), tape.whole.structure.leaves
            return tuple(one.expand(leaves[i].shape) for i in tape.whole.structure.members[unit])
        return tuple(x.data for x in tape.whole.views(unit, buffer))  # .data: each has a version counter of its own

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        first_order()
        ctx.tape.drop(ctx.unit)
        ctx.tape.arrivals.arrive(ctx.unit, grads)
        return None, None, None, None


def first_order() -> None:
    """The seam frees what a second derivative would need; say so instead of being wrong."""
    if torch.is_grad_enabled():
        why = "the seam is first-order only, but create_graph=True asks for a second derivative"
        raise RuntimeError(f"value_and_grad(units=...): {why}; write higher_order=True")
