"""A resolved config as a chain: schedules, optimizer, what stands between mean and optimizer, and where the bracket opens."""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from absl import logging

from funczero import optim
from funczero.comm.wire import as_born, cast
from funczero.core.transform import after
from funczero.core.types import Grad, GradientTransformation, Transform
from funczero.deepspeed.config.key import ConfigError
from funczero.deepspeed.config.keys import ENGINE, KEYS
from funczero.deepspeed.config.resolve import resolve
from funczero.deepspeed.config.resolved import Config, dtype_name
from funczero.gradients.gradient import pullback as pulled
from funczero.gradients.gradient import value_and_grad
from funczero.layout.mesh import P
from funczero.optim import schedules
from funczero.optim.rates import Rate
from funczero.optim.schedules import Schedule
from funczero.step.zero import zero
from funczero.transforms.accumulate import accumulate
from funczero.transforms.clip import clip_by_global_norm
from funczero.transforms.loss_scale import scale_loss
from funczero.transforms.mean import value

Optimizer = GradientTransformation | Callable[[Rate], GradientTransformation]
CLIP_EPS = 1e-6  # DeepSpeed's and torch's


class Rates(NamedTuple):
    """What changes from update to update: the learning rate, and beta 1 where the scheduler moves it too."""

    lr: float | Schedule | None  # None: the config names neither an optimizer nor a rate
    momentum: Schedule | None = None


def from_deepspeed(
    config: str | Path | Mapping[str, Any] | Config,
    loss_fn: Callable[..., Any] | None = None,
    *,
    pullback: bool = False,
    world: int | None = None,
    optimizer: Optimizer | None = None,
    auto: Mapping[str, Any] | None = None,
    axis: str | tuple[str, ...] = "data",
    units: Sequence[str] | None = None,
    weight: float | None = None,
    **source: Any,
) -> tuple[tuple[Any, ...], Config]:
    """The chain that a ds_config.json describes, for `train_step(*chain, **config.arguments)`, and the resolved config.

    Law: the values of DeepSpeed's run, up to rounding, where `differences(config)` does not say otherwise.

    Args:
      config: a dict, a path, base64 of its text, or what `resolve` returned.
      loss_fn: as value_and_grad's: (params, batch) -> (sum of losses, sum of weights).
      pullback: instead of loss_fn, the Source of a forward that runs elsewhere; micro-batches come one a call (see fz.pullback).
      world: ranks that share the batch; by default those that the environment names.
      optimizer: instead of the config's: an optimizer, or a function of the learning rate that the config's scheduler gives.
      auto: values for what says "auto".
      axis: the mesh axis, or axes outermost first, over which the batch is split.
      units, source: as value_and_grad's or pullback's.
      weight: as scale_loss's: near the weight of an update; by default measured, and the number of micro-batches with pullback.

    Raises:
      ConfigError: what cannot be honoured, with the key's path and what to write.

    Source: DeepSpeed 0.19.8.

    >>> page = {"train_batch_size": 8, "gradient_accumulation_steps": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
    ...         "fp16": {"enabled": True}, "zero_optimization": True}
    >>> chain, config = from_deepspeed(page, lambda params, batch: (batch["x"] @ params["w"], len(batch["x"])), world=2)
    >>> [getattr(part, "name", None) or getattr(part, "__name__", type(part).__name__) for part in chain]
    ['value_and_grad', 'Bracket']
    """
    resolved = config if isinstance(config, Config) else resolve(config, world, auto)
    if (loss_fn is None) == (not pullback):
        raise TypeError("from_deepspeed: a chain has one gradient; write from_deepspeed(config, loss_fn), or from_deepspeed(config, pullback=True)")
    if loss_fn is not None and resolved.value("fp16.auto_cast"):
        raise ConfigError(f"{resolved.where('fp16.auto_cast')}a loss function casts its own inputs; delete the key and write batch[...].half() in it")
    if loss_fn is not None:
        mine = [path for path in ENGINE if resolved.value(path) != KEYS[path].default]
        resolved = resolved._replace(notes=(*resolved.notes, *(f"{path} is an engine's, and this chain has none" for path in mine)))
    if resolved.notes and os.environ.get("RANK", "0") == "0":
        logging.warning("%s: %s", resolved.name, "; ".join(resolved.notes))
    split = P((axis,) if isinstance(axis, str) else axis)
    gradient = pulled(split, **source) if loss_fn is None else value_and_grad(loss_fn, split, units, **source)
    if pullback and weight is None:
        weight = 2.0 ** round(math.log2(resolved.triad.steps))  # mean losses: DeepSpeed seeds scale / steps
    return chain_of(resolved, gradient, optimizer_of(resolved, optimizer), axis=axis, stream=pullback, weight=weight), resolved


def chain_of(
    config: Config, source: Any, optimizer: GradientTransformation, axis: str | tuple[str, ...] = "data", stream: bool = False, weight: float | None = None
) -> tuple[Any, ...]:
    """A Source and an optimizer with everything between them that the config asks for.

    Args:
      stream: micro-batches come one a call, and a call with None closes the window.
      weight: as scale_loss's.
    """
    stage, k = config.value("zero_optimization.stage"), config.triad.steps
    over_time: tuple[Any, ...] = (accumulate(k, stream=stream),) if stream or k > 1 else ()
    narrow, scatter, first = dtype_name(config.value("communication_data_type")), as_born, source
    if narrow is not None and narrow not in ("float32", config.compute):  # lossy: the gradient is rounded where it is sent
        alone = rounded(getattr(torch, narrow))
        if config.world.size > 1:
            scatter = cast(narrow)
        else:  # nothing travels, but DeepSpeed rounds all the same
            first, over_time = ((source, alone), over_time) if stage == 2 else (source, (*over_time, alone))
    threshold = config.value("zero_optimization.stage3_param_persistence_threshold") + 1 if stage == 3 else 0
    return zero(first, *on_values(config, weight), optimizer, stage=stage, axis=axis, accumulate=over_time, threshold=threshold, scatter=scatter)


def on_values(config: Config, weight: float | None = None) -> tuple[Transform, ...]:
    """What stands between the mean and the optimizer: loss scale, the sum over ranks instead of the mean, clip."""
    parts: list[Transform] = []
    fp16, clip = config.block("fp16"), config.value("gradient_clipping")
    if fp16["enabled"]:
        static = fp16["loss_scale"]
        parts.append(
            scale_loss(
                static or 2.0 ** fp16["initial_scale_power"],
                weight,
                not static,
                fp16["loss_scale_window"],
                fp16["hysteresis"],
                float(fp16["min_loss_scale"]),
                fp16["consecutive_hysteresis"],
            )  # fmt: skip
        )
    if config.value("gradient_allreduce_op") == "sum":
        parts.append(times(config.world.size))
    if clip:
        parts.append(clip_by_global_norm(clip, eps=CLIP_EPS))
    return tuple(parts)


def times(n: float) -> Transform:
    """n times the mean gradient, through `factor` alone (DeepSpeed: gradient_allreduce_op sum)."""
    name = f"times({n:g})"

    def transform(g: Grad) -> Grad:
        g = value(g, name)
        return after(g, name, g.layout, lambda out, state: (out._replace(factor=out.factor * n, norm=None if out.norm is None else out.norm * n), state))

    transform.__name__ = name
    return transform


def rounded(dtype: torch.dtype) -> Transform:
    """Gradients rounded to a dtype where a world of one has nobody to send them to (DeepSpeed: communication_data_type)."""
    name = f"rounded({str(dtype).removeprefix('torch.')!r})"

    def transform(g: Grad) -> Grad:
        return after(g, name, g.layout, lambda out, state: (out._replace(grads=out.grads.to(dtype)), state))

    transform.__name__ = name
    return transform


def rates_of(config: Config, lr: float | None = None) -> Rates:
    """The learning rate of the config as a number or a function of applied updates, and beta 1 where OneCycle moves it.

    Args:
      lr: the optimizer's own rate where the config names no optimizer.
    """
    kind, p = config.values.get("scheduler.type"), config.block("scheduler.params")
    own = config.value("optimizer.params.lr") if "optimizer.params.lr" in config.values else lr
    if kind is None or kind.value is None:
        return Rates(own)
    try:
        return schedule_of(kind.value, p, own)
    except (ValueError, TypeError) as e:
        said = "it starts from the optimizer's lr, and there is none; add optimizer.params.lr" if own is None else _remedied(e, "scheduler.params")
        raise ConfigError(f"{config.where('scheduler.type')}{said}") from None


def _remedied(error: Exception, block: str) -> str:
    return f"{error}" if "write" in str(error) else f"{error}; write other {block}"


def schedule_of(kind: str, p: dict[str, Any], own: Any) -> Rates:
    if kind == "LRRangeTest":
        return Rates(schedules.lr_range_test(*(p[f"lr_range_test_{n}"] for n in ("min_lr", "step_size", "step_rate", "staircase"))))
    if kind == "OneCycle":
        names = {"first": "cycle_first_step_size", "second": "cycle_second_step_size", "decay_steps": "decay_step_size"}
        shape = {k: p[v] for k, v in names.items()} | {f"{half}_stairs": p[f"cycle_{half}_stair_count"] for half in ("first", "second")}
        lr = schedules.one_cycle(p["cycle_min_lr"], p["cycle_max_lr"], decay_rate=p["decay_lr_rate"], **shape)
        momentum = schedules.one_cycle_momentum(p["cycle_min_mom"], p["cycle_max_mom"], decay_rate=p["decay_mom_rate"], **shape)
        return Rates(lr, momentum if p["cycle_momentum"] else None)
    if kind == "WarmupCosineLR":
        return Rates(schedules.warmup_cosine_lr(own, p["total_num_steps"], p["warmup_num_steps"], p["warmup_min_ratio"], p["cos_min_ratio"], p["warmup_type"]))
    if kind in ("WarmupLR", "WarmupDecayLR"):
        peak = own if p["warmup_max_lr"] is None else p["warmup_max_lr"]
        rise = (p["warmup_num_steps"], p["warmup_min_lr"], p["warmup_type"])
        return Rates(schedules.warmup_lr(peak, *rise) if kind == "WarmupLR" else schedules.warmup_decay_lr(peak, p["total_num_steps"], *rise))
    return Rates(schedules.from_torch(kind, own, **p))


def optimizer_of(config: Config, given: Optimizer | None = None, rates: Rates | None = None) -> GradientTransformation:
    """The config's optimizer with its rates, or the one given.

    Args:
      given: takes precedence: an optimizer, or a function of the learning rate.
      rates: instead of the config's.
    """
    kind = config.value("optimizer.type")
    if given is None and kind is None:
        raise ConfigError(
            f'{config.name}: neither the config nor the call names an optimizer; add "optimizer": {{"type": "Adam"}}, or write optimizer=fz.adamw(...)'
        )
    if given is not None and callable(getattr(given, "init", None)):
        if config.value("scheduler.type") is not None:
            raise ConfigError(
                f"{config.where('scheduler.type')}the optimizer of the call has its own rate; write optimizer=lambda lr: fz.adamw(lr), or delete the scheduler"
            )
        return given  # type: ignore[return-value]
    lr, momentum = rates or rates_of(config)
    if given is not None:
        if lr is None:
            raise ConfigError(
                f"{config.name}: optimizer= is a function of the learning rate, but the config gives none; add a scheduler, or write an optimizer with its own"
            )
        return given(lr)  # type: ignore[operator]
    try:
        return make_optimizer(kind, config.block("optimizer.params"), lr, momentum)
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{config.where('optimizer.type')}{_remedied(e, 'optimizer.params')}") from None


def make_optimizer(kind: str, p: dict[str, Any], lr: Any, momentum: Schedule | None) -> GradientTransformation:
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
    if kind == "SGD":
        return optim.sgd(lr, p["momentum"], p["nesterov"], decay)
    own = {k: v for k, v in p.items() if k not in ("lr", "weight_decay", "foreach", "differentiable", "fused", "capturable")}
    if momentum is not None and "betas" in own:
        raise ValueError(f'the momentum of torch.optim.{kind} cannot follow a schedule here; write "cycle_momentum": false, or AdamW')
    return optim.from_torch(kind, lr, decay, **own)
