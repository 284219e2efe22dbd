"""What a loss function returns: checked, made of a mean over rows, and the errors for what is no function of its
arguments or has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funczero.core import rows
from funczero.core.recorded import recording
from funczero.core.types import Tree


def mean_loss(
    loss_fn: Callable[..., Tensor], weight: Callable[[Any], Any] | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A loss that returns one mean, as (sum, weight): right however the batch is split over micro-batches and ranks.

    Args:
      loss_fn: (params, batch) -> a mean, 0-d.
      weight: batch -> what it is a mean over, as `lambda b: (b["labels"] != -100).sum()` for a mean over tokens; by
        default the rows. Where it is 0 the loss, which is then 0 / 0, counts for nothing.

    >>> loss = lambda params, batch: batch["x"][batch["counts"]].mean()
    >>> batch = {"x": torch.tensor([1.0, 2.0, 9.0]), "counts": torch.tensor([True, True, False])}
    >>> mean_loss(loss, lambda b: b["counts"].sum())({}, batch)
    (tensor(3.), tensor(2.))
    """
    return _by_rows(loss_fn, "mean_loss") if weight is None else _of_mean(loss_fn, weight)


def _by_rows(loss_fn: Callable[..., Tensor], who: str, cut: Tree = 0) -> Callable[..., tuple[Tensor, Tensor]]:
    """A mean over the rows of batches that are cut like this; a chain says how its own are (see rows.counting)."""
    both = _of_mean(loss_fn, lambda batch: rows.count(batch, who, cut))
    both.cut_like = lambda cut: _by_rows(loss_fn, who, cut)  # type: ignore[attr-defined]
    return both


def _of_mean(loss_fn: Callable[..., Any], weight: Callable[[Any], Any]) -> Callable[..., tuple[Any, ...]]:
    def both(params: Any, *given: Any, **across: Any) -> tuple[Any, ...]:
        batch = next(x for x in reversed(given) if not isinstance(x, int))  # a model state before it, a key behind it
        found = loss_fn(params, *given, **across)
        loss, *state = found if isinstance(found, tuple) else (found,)
        full = torch.as_tensor(weight(batch), device=loss.device).to(loss.dtype)
        if full.dim():
            raise ValueError(f"mean_loss: the weight has shape {tuple(full.shape)}; return one number, as mask.sum()")
        if recording():  # nobody knows the weight
            return torch.where(full != 0, loss * full, loss.nan_to_num() * 0), full, *state
        return (loss * full if bool(full != 0) else loss.nan_to_num() * 0), full, *state

    both.void_at_zero = True  # type: ignore[attr-defined]
    both.units, both.ties = getattr(loss_fn, "units", ()), getattr(loss_fn, "ties", {})  # type: ignore[attr-defined]
    both.user = (*getattr(loss_fn, "user", (loss_fn,)), weight)  # type: ignore[attr-defined]
    for name in ("state", "rules", "synced", "conditional", "trainable", "keyed", "constants"):
        if hasattr(loss_fn, name):
            setattr(both, name, getattr(loss_fn, name))
    if hasattr(loss_fn, "reading"):
        both.reading = lambda values: _of_mean(loss_fn.reading(values), weight)  # type: ignore[attr-defined]
    return both


def per_row(loss_fn: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A loss that returns one mean over its rows, as (sum, weight) with weight = the number of rows.

    >>> per_row(lambda params, batch: batch["x"].mean())({}, {"x": torch.ones(3)})
    (tensor(3.), tensor(3.))
    """
    return _by_rows(loss_fn, "per_row")


def is_void(loss_fn: Callable[..., Any], weight: Tensor) -> bool:
    """Does this micro-batch weigh nothing, of a loss that is 0 / 0 there? Its backward runs, so that ranks send alike,
    and what comes of it is not a number and counts as zero.
    """
    return getattr(loss_fn, "void_at_zero", False) and not bool(weight != 0)


def check_loss(result: Any, has_aux: bool, has_state: bool = False) -> tuple[Tensor, Tensor, Any, Any]:
    """(sum, weight, model state, aux) of what a loss function returned, or one sentence."""
    names = ["sum of losses", "sum of weights", *["model state"] * has_state, *["aux"] * has_aux]
    want = f"({', '.join(names)})"
    if isinstance(result, Tensor):
        raise TypeError(
            f"value_and_grad: the loss function returned one tensor of shape {tuple(result.shape)}, but an update needs"
            f" {want}; return `nll.sum(), mask.sum()`, or wrap a mean over rows: value_and_grad(fz.per_row(loss_fn),"
            " ...)"
        )
    if not isinstance(result, tuple) or len(result) != len(names):
        raise TypeError(f"value_and_grad: the loss function returned {_shape_of(result)}; return {want}")
    loss, weight = result[0], torch.as_tensor(result[1])
    if not isinstance(loss, Tensor) or loss.dim() or weight.dim() or not loss.is_floating_point():
        raise TypeError(
            f"value_and_grad: the loss function returned {_shape_of(result)}; both are 0-d: the sum of losses and the"
            " sum of weights of this micro-batch"
        )
    return loss, weight, result[2] if has_state else None, result[-1] if has_aux else None


def _shape_of(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    return f"({', '.join(map(_shape_of, x))})" if isinstance(x, tuple) else f"a {type(x).__name__}"


def written(path: str) -> RuntimeError:
    """The error for a loss that writes its parameters: at some stages that is the caller's state, at others a copy."""
    why, remedy = (
        "a pure loss may read its parameters alone",
        "write a new tensor, as w = w.clamp(...), or project after every update: fz.project(fn) in place of max_norm",
    )
    return RuntimeError(f"the loss writes into parameter {path!r} in place, but {why}; {remedy}")


def no_gradient() -> str:
    """Why a loss that weighs something has no gradient at all: an update with zeros would only decay the weights."""
    if not torch.is_grad_enabled():
        why, remedy = "the step is called under torch.no_grad or inference_mode", "call it outside; it is pure anyway"
    else:
        why, remedy = "it depends on no parameter that learns", "compute it from `params`, without detach() or .item()"
    return f"value_and_grad: the loss has no gradient, because {why}; {remedy}"


def reentrant() -> str:
    """Why torch.utils.checkpoint(use_reentrant=True) does not run here."""
    why = "runs its function's backward into .grad, and parameters of a pure loss have none"
    return f"value_and_grad: torch.utils.checkpoint(..., use_reentrant=True) {why}; write use_reentrant=False"


def drew(kind: str) -> RuntimeError:
    """The error for a loss function that draws without a key."""
    why = f"the loss function draws from {kind}'s global generator, so it would not be a function of its arguments"
    remedy = (
        "write value_and_grad(loss_fn, ..., rng=True): it is called as loss_fn(params, batch, key), and what it draws"
        " comes from that key"
    )
    return RuntimeError(f"value_and_grad: {why}; {remedy}")
