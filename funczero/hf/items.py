"""What a loss is normalised by: the items of an update, as Hugging Face's Trainer counts them.

Law: the loss of an update is that of the stock Trainer on one process with the same micro-batches, whoever has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def items_of(trainer: Any, inputs: Any) -> int | None:
    """The labels of one micro-batch that a loss is taken over; None where the loss does not ask for their number.

    Args:
      trainer: a transformers.Trainer.
      inputs: of one micro-batch.
    """
    asked = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    if not asked or not isinstance(inputs, Mapping) or "labels" not in inputs:
        return None
    labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"]
    if not isinstance(labels, Tensor):  # as of detection, where the stock Trainer counts none either
        return None
    if "shift_labels" not in inputs and getattr(trainer, "_loss_shifts_labels", False):
        labels = labels[..., 1:]
    return int(labels.ne(-100).sum())


def normalised(trainer: Any, counted: bool) -> bool:
    """Is the loss of a micro-batch already its share of the update's? Else it is a mean of its own.

    Args:
      counted: are items counted?
    """
    said = trainer.loss_is_scaled_for_ga
    if said is not None:
        return bool(said)
    return (trainer.model_accepts_loss_kwargs and counted) or trainer.compute_loss_func is not None


def batch_of(inputs: Mapping[str, Any], items: int | None, share: int) -> dict[str, Any]:
    """A micro-batch as training_loss reads it.

    Args:
      items: of the update on all ranks; None: the loss does not ask.
      share: micro-batches of the update, where the loss is normalised over it; else 1.
    """
    return {"inputs": dict(inputs), "items": items, "share": share}


def training_loss(trainer: Any, dtype: torch.dtype) -> Callable[[Any, Any], tuple[Tensor, Any]]:
    """`compute_loss` of a Trainer as a function (model, batch) -> (sum, weight).

    A micro-batch weighs 1, so that the mean over an update is one of micro-batches; a loss that is a share of the
    update's already comes multiplied by their number. Of an update without any item the loss is 0 / 0 and the gradient
    0, which is applied, as there.

    Args:
      dtype: what the model computes in, to which floating inputs are cast; labels stay as they are.
    """

    def loss(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        inputs, items = cast(trainer, batch["inputs"], dtype), batch["items"]
        with alone(trainer):
            found = trainer.compute_loss(
                model, inputs, num_items_in_batch=None if items is None else torch.tensor(float(items))
            )
        if not isinstance(found, Tensor) or found.dim():
            have = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"hf.Trainer: compute_loss returned {have}; return one number, as loss.mean()")
        return found * batch["share"], 1

    return loss


def cast(trainer: Any, inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating inputs in a dtype, labels as they are."""
    kept = {*trainer.label_names, "labels"}
    into = lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
    return {k: x if k in kept else into(x) for k, x in inputs.items()}


@contextmanager
def alone(trainer: Any) -> Iterator[None]:
    """Losses are not multiplied by the number of processes meanwhile: nobody here divides by it."""
    args, before = trainer.args, trainer.args.average_tokens_across_devices
    args.average_tokens_across_devices = False
    try:
        yield
    finally:
        args.average_tokens_across_devices = before
