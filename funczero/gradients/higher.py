"""Gradients of losses that may be differentiated any number of times: `value_and_grad(..., higher_order=True)`, and all
gradients of a differentiable step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.comm import collectives, differentiable
from funczero.comm.adjoint import vary
from funczero.core import rng, tree
from funczero.core.types import Apply, Env, Seed, State, Sum
from funczero.gradients import draws
from funczero.gradients.arrivals import sparse
from funczero.gradients.loss import aux_sum, check_loss, drew, is_void, no_gradient, reentrant
from funczero.gradients.parts import Derivable, Parts
from funczero.gradients.ref import opened_first
from funczero.layout.slots import Slots
from funczero.transforms.chain import Source, no_wires


class Loss(NamedTuple):
    """A loss function of parts, and where it runs."""

    fn: Callable[..., Any]
    has_aux: bool
    rng: bool  # is it given a key?
    env: Env
    batch: tuple[str, ...]  # mesh axes that rows are split over

    @property
    def wide(self) -> torch.dtype:
        """In which the parts wait to be cast, and their gradients are added."""
        return torch.promote_types(self.env.policy.compute, self.env.policy.accumulate)

    def parts(self, views: Slots, leaves: dict[int, Tensor]) -> Parts:
        """Leaves of views, as the loss reads them."""
        void = getattr(self.fn, "void_at_zero", False)
        return Parts(views.where, leaves, self.env.mesh, dtype=self.env.policy.compute, may_be_void=void)

    def __call__(self, parts: Parts, batch: Any, seed: Seed) -> tuple[Tensor, Tensor, Any]:
        """(sum of losses, sum of weights, (the user's sums as [1, n] float64, the form of their tree) or None)."""
        if self.rng and seed.key == rng.UNKNOWN:
            why = "the loss draws from a key, but the state's key is batched or traced here"
            raise RuntimeError(f"value_and_grad(rng=True): {why}; draw outside, and hand the numbers in with the batch")
        key = (rng.fold(seed.key, seed.index),) if self.rng else ()
        own = getattr(self.fn, "keyed", False)
        drawing = nullcontext() if own else draws.keyed(next(iter(key), None), parts.device, drew)
        with Derivable(), opened_first(), drawing:
            loss, weight, aux = check_loss(self.fn(parts.tree(), batch, *key), self.has_aux)
        parts.left_alone()
        parts.void = is_void(self.fn, weight)
        if not self.has_aux:
            return loss, weight.to(loss.device), None
        sums = [aux_sum(path, x, loss.device) for path, x in tree.paths(aux)]
        return loss, weight.to(loss.device), (torch.stack(sums)[None], tree.flatten(aux)[1])


def applied(source: Source, loss: Loss, index: int) -> Apply:
    """The gradient of a Source, with every block as a function of parts.

    Args:
      index: of this rank's micro-batch, among those of the axes of the source's brackets.

    Raises:
      ChainError: an axis has a wire, which no derivative knows.
    """
    env = loss.env
    no_wires("value_and_grad", [env.edges[a] for a in (*source.axes, *source.scatter)])
    kind, derive = (differentiable, _derivable) if env.differentiable else (collectives, _derived)

    def apply(views: Slots, state: State, batch: Any, seed: Seed) -> tuple[Sum, State]:
        value, weight, aux, grads = derive(loss, views, batch, seed._replace(index=seed.index + index))
        bad = _bad(grads) if seed.look else None
        for a in source.scatter:
            born = grads.to(env.policy.compute) if not grads.where.coords else grads  # sums travel as they are added
            grads, _ = kind.reduce_scatter(born, env.edges[a], env.mesh)
        return Sum(value[None], weight[None], aux, grads, bad=bad), state

    return apply


def _derived(loss: Loss, views: Slots, batch: Any, seed: Seed) -> tuple[Tensor, Tensor, Any, Slots]:
    """The loss and its gradient, summed over the axes of rest; nothing is kept."""
    leaves = {i: x.data.to(loss.wide) for i, x in views.present().items()}
    learning = {i: x.requires_grad_() for i, x in leaves.items() if not views.where.structure.frozen(i)}
    value, weight, aux = loss(loss.parts(views, leaves), batch, seed)
    found: list[Any] = [None] * len(learning)
    if value.requires_grad:
        cotangent = seed.cotangent.to(value.dtype)
        with _dense():
            found = list(torch.autograd.grad(value, list(learning.values()), cotangent, allow_unused=True))
    if learning and all(g is None for g in found) and bool(weight != 0):
        raise RuntimeError(no_gradient())
    early = loss.env.early
    if early is not None and early.used is not None:
        early.used.update(i for i, g in zip(learning, found, strict=True) if g is not None)
    grads = {i: torch.zeros_like(x) if g is None else g for (i, x), g in zip(learning.items(), found, strict=True)}
    aux = None if aux is None else (aux[0].detach(), aux[1])
    return value.detach(), weight.detach(), aux, _packed(grads, views)


def _derivable(loss: Loss, views: Slots, batch: Any, seed: Seed) -> tuple[Tensor, Tensor, Any, Slots]:
    """The same as functions of views, batch and cotangent; what is frozen is a constant."""
    mesh, where, wide = loss.env.mesh, views.where, loss.wide
    apart = tuple(a for a in loss.batch if a not in where.axes)
    each = {i: x.to(wide) for i, x in views.present().items()}
    still = {i: x.detach() for i, x in each.items() if where.structure.frozen(i)}
    moving = {i: x for i, x in each.items() if i not in still}
    moving = differentiable.over_leaves(where, moving, lambda i: apart, mesh, vary)
    form: list[Any] = []  # of the user's sums

    def fn(learning: dict[int, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        value, weight, aux = loss(loss.parts(views, {**still, **learning}), batch, seed)
        form[:] = [] if aux is None else [aux[1]]
        return value, (weight,) if aux is None else (weight, aux[0])

    found: Any = torch.func.vjp(fn, moving, has_aux=True)
    value, pull, (weight, *sums) = found
    cotangent = differentiable.over_all(seed.cotangent, loss.batch, mesh, vary)
    with _dense():
        grads = pull(cotangent.to(value.dtype))[0]
    return value, weight, (sums[0], form[0]) if sums else None, _packed(grads, views)


def _packed(grads: dict[int, Tensor], views: Slots) -> Slots:
    odd = next((i for i, g in grads.items() if g.layout != torch.strided), None)
    if odd is not None:
        raise TypeError(sparse(views.where.structure.leaves[odd].path))
    return differentiable.pack(views.where, grads, views)


@contextmanager
def _dense() -> Iterator[None]:
    try:
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
