"""The optimizer that TrainingArguments name, as one of a chain: torch's groups, and Hugging Face's schedule as a
function of applied updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import Adafactor

from funczero import optim
from funczero.optim.from_torch import SAME
from funczero.optim.param_groups import param_groups
from funczero.transforms.shares import Optimizer

Rate = Callable[[Any], Any]  # of applied updates
LIKE = "write Zero(optimizer=lambda lr: fz.adamw(lr)) or another of funczero's, or optim='adamw_torch'"


def rate_of(scheduler: Any, group: int = 0) -> Rate:
    """A scheduler's rate for one of its optimizer's groups, as a function of applied updates.

    Raises:
      ValueError: its rate is no function of their number.

    >>> o = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    >>> [rate_of(LambdaLR(o, lambda n: 1 / (1 + n)))(torch.tensor(n)) for n in range(3)]
    [0.5, 0.25, 0.16666666666666666]
    """
    if type(scheduler) is not LambdaLR:
        kind, what = type(scheduler).__name__, "a rate here is a function of the number of applied updates"
        raise ValueError(
            f"hf.Trainer: the schedule is a {kind}, but {what}; write a lr_scheduler_type that is one, as 'linear' or"
            " 'cosine', or give a LambdaLR"
        )
    base, fn = scheduler.base_lrs[group], scheduler.lr_lambdas[group]
    return lambda updates: float(base * fn(int(updates)))


def of_torch(module: nn.Module, optimizer: Any, scheduler: Any) -> Optimizer:
    """An optimizer of torch and its scheduler, as a partition with a part for each of its groups.

    Law: its values, where it is one of torch.optim's or Hugging Face's Adafactor with a rate from outside.

    Args:
      module: whose parameters it was given.

    Raises:
      ValueError, TypeError, ChainError: by the optimizer's name.
    """
    rates = [rate_of(scheduler, i) for i in range(len(optimizer.param_groups))]
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    groups = []
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        mine = [p for p in group["params"] if id(p) in trained]
        frozen = [p for p in group["params"] if id(p) not in trained and p.requires_grad]
        if frozen:
            why = "has a parameter that is not the model's"
            raise ValueError(f"hf.Trainer: the {type(optimizer).__name__} {why}; make it of model.parameters()")
        if mine:
            groups.append({**group, "params": mine, "lr": rate})
    if not groups:
        raise ValueError("hf.Trainer: no parameter of the model requires a gradient, so nothing would be trained")
    return param_groups(module, groups, _maker(optimizer))


def _maker(optimizer: Any) -> Callable[..., Any]:
    """(options of a group) -> an optimizer of this package."""
    kind = type(optimizer)
    if kind is Adafactor:
        return _adafactor
    if getattr(torch.optim, kind.__name__, None) is not kind:
        raise ValueError(
            f"hf.Trainer: nothing here knows how {kind.__module__}.{kind.__name__} moves a parameter; {LIKE}"
        )

    def make(lr: Rate, weight_decay: float = 0.0, initial_lr: Any = None, **options: Any) -> Any:
        given = {k: x for k, x in options.items() if k not in SAME}
        plain = not given.get("amsgrad") and not given.get("maximize")
        if kind in (torch.optim.AdamW, torch.optim.Adam) and plain:
            decoupled = kind is torch.optim.AdamW or given.get("decoupled_weight_decay", False)
            b1, b2 = map(float, given["betas"])
            return (optim.adamw if decoupled else optim.adam)(lr, b1, b2, given["eps"], weight_decay)
        if kind is torch.optim.AdamW:
            given.pop("decoupled_weight_decay", None)
        return optim.from_torch(kind.__name__, lr, weight_decay, **given)

    return make


def _adafactor(
    lr: Rate, eps: Any, clip_threshold: float, decay_rate: float, beta1: Any, weight_decay: float, **rest: Any
) -> Any:
    """Hugging Face's, as its Trainer makes it."""
    for what in ("scale_parameter", "relative_step", "warmup_init"):
        if rest.get(what):
            why = f"{what}=True makes a rate of its own"
            raise ValueError(f"hf.Trainer: Adafactor: {why}; write {what}=False, or Zero(optimizer=fz.adafactor)")
    if beta1 is not None:
        raise ValueError("hf.Trainer: Adafactor: beta1 is a moment that fz.adafactor does not keep; write beta1=None")
    return optim.adafactor(lr, decay_rate, (eps[0] ** 0.5, eps[1]), clip_threshold, weight_decay, relative=False)


def face_of(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """What callbacks and schedulers are shown where a chain's optimizer is none of torch's: a learning rate."""
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr)
