"""The optimizer that a config names, and its rates: numbers, or functions of applied updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from funczero import optim
from funczero.core.optimizer import GradientTransformation
from funczero.deepspeed.config.key import ConfigError
from funczero.deepspeed.config.options import SCHEDULERS
from funczero.deepspeed.config.resolved import Config
from funczero.optim import schedules
from funczero.optim.curves import Schedule
from funczero.optim.rate import Rate
from funczero.transforms.partition import partition
from funczero.transforms.shares import Optimizer

GivenOptimizer = GradientTransformation | Callable[[Rate], GradientTransformation]


class GroupRates(NamedTuple):
    """What changes from update to update: the learning rate, and beta 1 where the scheduler moves it too."""

    lr: float | Schedule | None  # None: the config names neither an optimizer nor a rate
    momentum: Schedule | None = None


def rates_of(config: Config, lr: float | None = None, group: int = 0, groups: int = 1) -> GroupRates:
    """The learning rate of the config as a number or a function of applied updates, and beta 1 where OneCycle moves it.

    Args:
      lr: the optimizer's own rate where the config names no optimizer.
      group: which of so many groups of parameters it is, where the scheduler names one number a group.
    """
    kind, p = config.values.get("scheduler.type"), config.block("scheduler.params")
    own = config.value("optimizer.params.lr") if "optimizer.params.lr" in config.values else lr
    if kind is None or kind.value is None:
        return GroupRates(own)
    try:
        p = of_group(kind.value, p, group, groups)
    except ValueError as e:
        raise ConfigError(f"{config.where('scheduler.type')}{e}") from None
    try:
        return schedule_of(kind.value, p, own)
    except (ValueError, TypeError) as e:
        why = "it starts from the optimizer's lr, and there is none; add optimizer.params.lr"
        why = why if own is None else _remedied(e, "scheduler.params")
        raise ConfigError(f"{config.where('scheduler.type')}{why}") from None


def _remedied(error: Exception, block: str) -> str:
    return f"{error}" if "write" in str(error) else f"{error}; write other {block}"


def of_group(kind: str, p: dict[str, Any], group: int, groups: int) -> dict[str, Any]:
    """A scheduler's parameters for one group of several; what is a list names one number a group."""
    known = SCHEDULERS.get(kind, {})
    lists = {n: x for n, x in p.items() if n in known and known[n].kind == "rate" and isinstance(x, (list, tuple))}
    odd = next((n for n, x in lists.items() if len(x) != groups), None)
    if odd is not None:
        have = "one group" if groups == 1 else f"{groups} groups"
        raise ValueError(
            f"{kind}: {odd} names {len(lists[odd])} numbers, but there is {have} of parameters; "
            "write one number, or one a group"
        )
    return {**p, **{n: x[group] for n, x in lists.items()}}


def schedule_of(kind: str, p: dict[str, Any], own: Any) -> GroupRates:
    """A scheduler type with its parameters as functions of applied updates.

    Args:
      p: every parameter of the type, by DeepSpeed's or torch's name.
      own: the optimizer's learning rate, from which some types start.
    """
    if kind == "LRRangeTest":
        names = "min_lr", "step_size", "step_rate", "staircase"
        return GroupRates(schedules.lr_range_test(*(p[f"lr_range_test_{n}"] for n in names)))
    if kind == "OneCycle":
        shape = {
            "first": p["cycle_first_step_size"],
            "second": p["cycle_second_step_size"],
            "decay_steps": p["decay_step_size"],
            "first_stairs": p["cycle_first_stair_count"],
            "second_stairs": p["cycle_second_stair_count"],
        }
        lr = schedules.one_cycle(p["cycle_min_lr"], p["cycle_max_lr"], decay_rate=p["decay_lr_rate"], **shape)
        low, high, decay = p["cycle_min_mom"], p["cycle_max_mom"], p["decay_mom_rate"]
        momentum = schedules.one_cycle_momentum(low, high, decay_rate=decay, **shape)
        return GroupRates(lr, momentum if p["cycle_momentum"] else None)
    if kind == "WarmupCosineLR":
        rise = p["warmup_num_steps"], p["warmup_min_ratio"]
        return GroupRates(
            schedules.warmup_cosine_lr(own, p["total_num_steps"], *rise, p["cos_min_ratio"], p["warmup_type"])
        )
    if kind in ("WarmupLR", "WarmupDecayLR"):
        peak = own if p["warmup_max_lr"] is None else p["warmup_max_lr"]
        way = p["warmup_num_steps"], p["warmup_min_lr"], p["warmup_type"]
        if kind == "WarmupLR":
            return GroupRates(schedules.warmup_lr(peak, *way))
        return GroupRates(schedules.warmup_decay_lr(peak, p["total_num_steps"], *way))
    return GroupRates(schedules.from_torch(kind, own, **p))


def optimizer_of(config: Config, given: GivenOptimizer | None = None, rates: GroupRates | None = None) -> Optimizer:
    """The config's optimizer with its rates, or the one given.

    Args:
      given: takes precedence: an optimizer, or a function of the learning rate.
      rates: instead of the config's.
    """
    kind = config.value("optimizer.type")
    if given is None and kind is None:
        raise ConfigError(
            f"{config.name}: neither the config nor the call names an optimizer; "
            "add \"optimizer\": {\"type\": \"Adam\"}, or write optimizer=fz.adamw(...)"
        )
    if given is not None and callable(getattr(given, "init", None)):
        if config.value("scheduler.type") is not None:
            why = "the optimizer of the call has its own rate"
            remedy = "write optimizer=lambda lr: fz.adamw(lr), or delete the scheduler"
            raise ConfigError(f"{config.where('scheduler.type')}{why}; {remedy}")
        return given  # type: ignore[return-value]
    lr, momentum = rates or rates_of(config)
    if given is not None:
        if lr is None:
            raise ConfigError(
                f"{config.name}: optimizer= is a function of the learning rate, but the config gives none; "
                "add a scheduler, or write an optimizer with its own"
            )
        return given(lr)  # type: ignore[operator]
    try:
        return make_optimizer(kind, config.block("optimizer.params"), lr, momentum)
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{config.where('optimizer.type')}{_remedied(e, 'optimizer.params')}") from None


def make_optimizer(kind: str, p: dict[str, Any], lr: Any, momentum: Schedule | None) -> Optimizer:
    """An optimizer type with its parameters.

    Args:
      p: every parameter of the type, by DeepSpeed's or torch's name.
      lr: instead of theirs.
      momentum: beta 1, where a schedule moves it.
    """
    b1, b2 = p.get("betas", (0.9, 0.999))
    if momentum is not None:  # OneCycle forces the second beta
        b1, b2 = momentum, 0.99
    name, decay = kind.lower(), p.get("weight_decay", 0.0)
    if name in ("adam", "adamw"):
        make = optim.adamw if name == "adamw" or p["adam_w_mode"] else optim.adam
        return make(lr, b1, b2, p["eps"], decay)
    if name == "lion":
        return optim.lion(lr, b1, b2, decay)
    if name == "adagrad":
        return optim.adagrad(lr, p["eps"], decay)
    if name == "lamb":
        corrected = "rate" if p["bias_correction"] else "none"
        return optim.lamb(lr, b1, b2, p["eps"], decay, p["min_coeff"], p["max_coeff"], corrected)
    if name == "muon":
        return _muon_and_adam(p, lr, momentum)
    if kind == "SGD":
        return optim.sgd(lr, p["momentum"], p["nesterov"], decay)
    passed = "lr", "weight_decay", "foreach", "differentiable", "fused", "capturable"
    own = {k: v for k, v in p.items() if k not in passed}
    if momentum is not None and "betas" in own:
        why = f"the momentum of torch.optim.{kind} cannot follow a schedule here"
        raise ValueError(f'{why}; write "cycle_momentum": false, or AdamW')
    return optim.from_torch(kind, lr, decay, **own)


def _muon_and_adam(p: dict[str, Any], lr: Any, momentum: Schedule | None) -> Optimizer:
    """DeepSpeed's Muon: matrices by Muon, embeddings, heads and the rest by AdamW, each with its rate."""
    apart = next((k for k in ("muon_lr", "adam_lr") if p[k] is not None), None)
    if callable(lr) and apart is not None:
        raise ValueError(f"the scheduler writes one rate for both halves; delete {apart}, and write lr")
    if momentum is not None:
        raise ValueError('Muon\'s momentum does not follow a schedule; write "cycle_momentum": false, or AdamW')
    rate = lambda own, default: own if own is not None else default if lr is None else lr
    first = optim.muon(rate(p["muon_lr"], 0.02), p["momentum"], p["weight_decay"], flatten=4)
    b1, b2 = p["betas"]
    second = optim.adamw(rate(p["adam_lr"], 3e-4), b1, b2, p["eps"], p["weight_decay"])
    return partition([(optim.matrices(but="embed|lm_head"), first), ("", second)])
