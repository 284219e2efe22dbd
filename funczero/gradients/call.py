"""A loss function as a chain calls it: what it is given beside parameters and rows, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import rng, tree
from funczero.core.order import Dealt
from funczero.core.types import Seed, State
from funczero.gradients import draws
from funczero.gradients.loss import check_loss, drew, is_void
from funczero.gradients.synced import Across
from funczero.transforms.model_state import Model
from funczero.transforms.outputs import Aux, Rules, aux_of


class Outcome(NamedTuple):
    """What a loss says of one micro-batch."""

    loss: Tensor  # 0-d sums
    weight: Tensor
    aux: Aux | None
    moved: tuple[Tensor, ...]  # its model state, by leaf [1, ...]

    def detached(self) -> Outcome:
        """The same without a graph."""
        aux = self.aux
        if aux is not None:
            rows, cat = ([x.detach() for x in xs] for xs in (aux.rows, aux.cat))
            aux = Aux(aux.sums.detach(), tuple(rows), tuple(cat), aux.form)
        return Outcome(self.loss.detach(), self.weight.detach(), aux, tuple(x.detach() for x in self.moved))


class LossCall(NamedTuple):
    """loss_fn(params, [model state], rows, [key]) -> (sum, weight, [model state], [aux])."""

    fn: Callable[..., Any]
    aux: Rules | None = None
    rng: bool = False
    model: Model | None = None
    across: Across | None = None  # for layers whose statistics are those of all ranks' rows

    def __call__(self, params: Any, batch: Any, seed: Seed, state: State, device: torch.device) -> Outcome:
        """The loss of one micro-batch.

        Raises:
          RuntimeError: it draws without a key, or with one that cannot be read here.
          TypeError: it returns something else; the rows still have copies among them, which would count.
        """
        if isinstance(batch, Dealt):
            why = "what local_rows(batch, rows=...) gave has copies in empty places, which would count here"
            raise TypeError(
                f"value_and_grad: {why}; hand it to a step, or deal as many micro-batches as there are places"
            )
        if self.rng and seed.key == rng.UNKNOWN:
            why = "the loss draws from a key, but the state's key is batched or traced here"
            raise RuntimeError(f"value_and_grad(rng=True): {why}; draw outside, and hand the numbers in with the batch")
        key = (rng.fold(seed.key, seed.index),) if self.rng else ()
        given = self.given(seed, state)
        return self.outcome(*self.called(params, given, batch, key, device), given, seed)

    def given(self, seed: Seed, state: State) -> list[Any]:
        """What the loss is given between parameters and rows: the model state, or nothing."""
        return [] if self.model is None else [self.model.given(state, 0 if seed.hole else seed.index, seed.of)]

    def called(
        self, params: Any, given: list[Any], batch: Any, key: tuple[int, ...], device: torch.device
    ) -> tuple[Tensor, Tensor, Any, Any]:
        """What the loss returns, checked: (sum, weight, model state, aux)."""
        own = getattr(self.fn, "keyed", False)
        with nullcontext() if own else draws.keyed(next(iter(key), None), device, drew):
            result = self.fn(params, *given, batch, *key, **({"across": self.across} if synced(self.fn) else {}))
        loss, weight, moved, aux = check_loss(result, self.aux is not None, self.model is not None)
        return loss, weight.to(loss.device), moved, aux

    def outcome(self, loss: Tensor, weight: Tensor, moved: Any, aux: Any, given: list[Any], seed: Seed) -> Outcome:
        """What that says of the micro-batch."""
        said = None if self.aux is None else aux_of(aux, self.aux, loss.device)
        if said is not None and seed.hole:
            said = said._replace(rows=tuple(x[:0] for x in said.rows))
        return Outcome(loss, weight, said, () if self.model is None else self.model.returned(moved, given[0]))

    @property
    def user(self) -> tuple[Callable[..., Any], ...]:
        """The functions that somebody wrote for this loss."""
        return getattr(self.fn, "user", (self.fn,))

    def void(self, outcome: Outcome, seed: Seed) -> bool:
        """Does this micro-batch count for nothing, with a loss that is 0 / 0, or as a copy in an empty place?"""
        return seed.hole or is_void(self.fn, outcome.weight)


def synced(loss_fn: Callable[..., Any]) -> bool:
    """Has the loss layers whose statistics are those of all ranks' rows?"""
    return getattr(loss_fn, "synced", False)


def reading(
    loss_fn: Callable[..., Any], has_state: bool | None, model: Model | None, values: Any, across: Across
) -> Callable[..., Any]:
    """A loss of parameters and rows alone, which reads a model state as it is, and forgets what becomes of it.

    Args:
      has_state: does the loss take one? None: where it names its own, as fz.stateless does.
      model, values: of the step; None where it has none.
      across: the step's ranks.

    Raises:
      TypeError: it takes one, and there is none that it could read.
    """
    takes = getattr(loss_fn, "state", None) is not None if has_state is None else has_state
    more: dict[str, Any] = {"across": across} if synced(loss_fn) else {}
    if not takes:
        bind = getattr(loss_fn, "reading", None)
        found: Any = loss_fn if values is None or bind is None else bind(values)
        if found is not loss_fn or more:
            found = partial(found, **more)
            found.keyed = getattr(loss_fn, "keyed", False)
        return found
    if model is None:
        why = "the loss takes a model state, but the step has none"
        raise TypeError(f"eval: {why}; write value_and_grad(loss_fn, state=...), or a loss without one")
    odd = next((path for path, rule in zip(model.paths, model.rules, strict=True) if rule == "rows"), None)
    if odd is not None:
        why = f"model state {odd!r} belongs to the rows of the training batch, and not to these"
        raise TypeError(f"eval: {why}; write a loss that begins with a state of its own, and leave out has_state")

    def fn(params: Any, batch: Any) -> tuple[Any, Any]:
        loss, weight, *_ = check_loss(loss_fn(params, tree.clone(values), batch, **more), False, True)
        return loss, weight

    fn.keyed = getattr(loss_fn, "keyed", False)  # type: ignore[attr-defined]
    return fn
