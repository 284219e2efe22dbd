"""Gradients of losses that may be differentiated any number of times: `value_and_grad(..., higher_order=True)`, and all
gradients of a differentiable step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.comm import collectives, differentiable
from funczero.comm.adjoint import vary
from funczero.core import tree
from funczero.core.exhausted import amid, asking
from funczero.core.spans import span
from funczero.core.straight import HOLE
from funczero.core.types import Apply, ChainError, Env, Seed, State, Sum
from funczero.gradients.arrivals import sparse
from funczero.gradients.call import LossCall, Outcome
from funczero.gradients.loss import no_gradient, reentrant
from funczero.gradients.parts import Derivable, Parts
from funczero.gradients.ref import opened_first
from funczero.gradients.source import of_deal
from funczero.layout.slots import Slots
from funczero.transforms.chain import Source, no_wires
from funczero.transforms.exact import scattered


class Loss(NamedTuple):
    """A loss function of parts, and where it runs."""

    call: LossCall
    env: Env
    batch: tuple[str, ...]  # mesh axes that rows are split over

    @property
    def wide(self) -> torch.dtype:
        """In which the parts wait to be cast, and their gradients are added."""
        return torch.promote_types(self.env.policy.compute, self.env.policy.accumulate)

    def parts(self, views: Slots, leaves: dict[int, Tensor], seed: Seed) -> Parts:
        """Leaves of views, as the loss reads them."""
        void = seed.hole or getattr(self.call.fn, "void_at_zero", False)
        return Parts(views.where, leaves, self.env.mesh, dtype=self.env.policy.compute, may_be_void=void)

    def __call__(self, parts: Parts, batch: Any, seed: Seed, state: State) -> Outcome:
        """What it says of this rank's rows."""
        with span("forward"), asking(lambda: "in the forward"), Derivable(), opened_first():
            found = self.call(parts.tree(), batch, seed, state, parts.device)
        parts.left_alone()
        parts.void = self.call.void(found, seed)
        return found


def applied(source: Source, loss: Loss, index: int) -> Apply:
    """The gradient of a Source, with every block as a function of parts.

    Args:
      index: of this rank's micro-batch, among those of the axes of the source's brackets.

    Raises:
      ChainError: an axis has a wire, which no derivative knows.
    """
    env = loss.env
    if env.exact and source.axes and not env.differentiable:
        why = "its gradients are added over the ranks of a bracket inside the derivative, as floats"
        raise ChainError(f"value_and_grad(higher_order=True): sums='exact', but {why}; open the bracket right of it")
    no_wires("value_and_grad", [env.edges[a] for a in (*source.axes, *source.scatter)])
    kind, derive = (differentiable, _derivable) if env.differentiable else (collectives, _derived)

    def apply(views: Slots, state: State, batch: Any, seed: Seed) -> tuple[Sum, State]:
        found, grads = derive(loss, views, batch, seed._replace(index=seed.index + index), state)
        bad = _bad(grads) if seed.look else None
        if seed.grid is not None:  # counted as they are born at every stage
            grads = grads.to(env.policy.compute)
        out = of_deal(Sum(found.loss[None], found.weight[None], found.aux, grads, bad, found.moved), seed)
        for a in source.scatter:
            born = grads.to(env.policy.compute) if not grads.where.coords else grads  # sums travel as they are added
            if seed.grid is not None:
                out = scattered(out._replace(grads=born), env.edges[a], env, seed.grid)
                grads = out.grads
                continue
            grads, _ = kind.reduce_scatter(born, env.edges[a], env.mesh)
            out = out._replace(grads=grads)
        return out, state

    return apply


def _derived(loss: Loss, views: Slots, batch: Any, seed: Seed, state: State) -> tuple[Outcome, Slots]:
    """The loss and its gradient, summed over the axes of rest; nothing is kept."""
    leaves = {i: x.data.to(loss.wide) for i, x in views.present().items()}
    learning = {i: x.requires_grad_() for i, x in leaves.items() if not views.where.structure.frozen(i)}
    outcome = loss(loss.parts(views, leaves, seed), batch, seed, state)
    value = outcome.loss
    found: list[Any] = [None] * len(learning)
    if value.requires_grad:
        cotangent = seed.cotangent.to(value.dtype)
        with _backward():
            found = list(torch.autograd.grad(value, list(learning.values()), cotangent, allow_unused=True))
    if learning and all(g is None for g in found) and bool(outcome.weight != 0):
        raise RuntimeError(no_gradient())
    early = loss.env.early
    if early is not None and early.used is not None:
        early.used.update(i for i, g in zip(learning, found, strict=True) if g is not None)
    grads = {i: torch.zeros_like(x) if g is None else g for (i, x), g in zip(learning.items(), found, strict=True)}
    return outcome.detached(), _packed(grads, views)


def _derivable(loss: Loss, views: Slots, batch: Any, seed: Seed, state: State) -> tuple[Outcome, Slots]:
    """The same as functions of views, batch and cotangent; what is frozen is a constant."""
    mesh, where, wide = loss.env.mesh, views.where, loss.wide
    apart = tuple(a for a in loss.batch if a not in where.axes)
    each = {i: x.to(wide) for i, x in views.present().items()}
    still = {i: x.detach() for i, x in each.items() if where.structure.frozen(i)}
    moving = {i: x for i, x in each.items() if i not in still}
    moving = differentiable.over_leaves(where, moving, lambda i: apart, mesh, vary)
    form: list[Any] = []  # of the outcome, whose tensors are handed out of the transform

    def fn(learning: dict[int, Tensor]) -> tuple[Tensor, list[Tensor]]:
        outcome = loss(loss.parts(views, {**still, **learning}, seed), batch, seed, state)
        flat, treedef = tree.flatten(outcome)
        form[:] = [treedef, [HOLE if isinstance(x, Tensor) else x for x in flat]]
        return outcome.loss, [x for x in flat if isinstance(x, Tensor)]

    found: Any = torch.func.vjp(fn, moving, has_aux=True)
    value, pull, tensors = found
    outcome = tree.unflatten([tensors.pop(0) if x is HOLE else x for x in form[1]], form[0])
    cotangent = differentiable.over_all(seed.cotangent, loss.batch, mesh, vary)
    with _backward():
        grads = pull(cotangent.to(value.dtype))[0]
    return outcome._replace(loss=value), _packed(grads, views)


def _packed(grads: dict[int, Tensor], views: Slots) -> Slots:
    odd = next((i for i, g in grads.items() if g.layout != torch.strided), None)
    if odd is not None:
        raise TypeError(sparse(views.where.structure.leaves[odd].path))
    return differentiable.pack(views.where, grads, views)


@contextmanager
def _backward() -> Iterator[None]:
    try:
        with span("backward"), asking(amid):
            yield
    except (RuntimeError, NotImplementedError) as error:
        if "sparse" in str(error).lower():
            raise TypeError(sparse()) from error
        if "When use_reentrant=True" in str(error):
            raise TypeError(reentrant()) from None
        raise


def _bad(grads: Slots) -> Tensor:
    """[leaves]: values of this rank's part that are not finite."""
    zero = torch.zeros((), dtype=torch.int64, device=grads.buffers[0].device)
    return torch.stack([zero if x is None else (~x.isfinite()).sum() for x in grads.leaves()])
