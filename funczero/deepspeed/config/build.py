"""A resolved config as a chain: what stands between mean and optimizer, and where the bracket opens."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from absl import logging

from funczero.comm.wire import as_born, cast
from funczero.core.transform import after, refuse
from funczero.core.types import Grad, State, Sum, Transform
from funczero.deepspeed.config.crossing import HPZ, crossing
from funczero.deepspeed.config.key import ConfigError
from funczero.deepspeed.config.keys import ENGINE, KEYS
from funczero.deepspeed.config.optimizers import GivenOptimizer, optimizer_of
from funczero.deepspeed.config.resolve import resolve
from funczero.deepspeed.config.resolved import Config, dtype_name
from funczero.gradients.gradient import value_and_grad
from funczero.gradients.pullback import pullback as pulled
from funczero.layout.spec import P
from funczero.step.zero import zero, zeropp
from funczero.transforms.accumulate import accumulate
from funczero.transforms.clip import clip_by_global_norm
from funczero.transforms.loss_scale import scale_loss
from funczero.transforms.mean import value
from funczero.transforms.shares import Optimizer

CLIP_EPS = 1e-6  # DeepSpeed's and torch's


def from_deepspeed(
    config: str | Path | Mapping[str, Any] | Config,
    loss_fn: Callable[..., Any] | None = None,
    *,
    pullback: bool = False,
    world: int | None = None,
    optimizer: GivenOptimizer | None = None,
    auto: Mapping[str, Any] | None = None,
    axis: str | tuple[str, ...] | None = None,
    units: Sequence[str] | None = None,
    weight: float | None = None,
    **source: Any,
) -> tuple[tuple[Any, ...], Config]:
    """The chain that a ds_config.json describes, for `train_step(*chain, **config.arguments)`, and the resolved config.

    Law: the values of DeepSpeed's run, up to rounding, where `differences(config)` does not say otherwise.

    Args:
      config: a dict, a path, base64 of its text, or what `resolve` returned.
      loss_fn: as value_and_grad's: (params, batch) -> (sum of losses, sum of weights).
      pullback: instead of loss_fn, the Source of a forward that runs elsewhere. Micro-batches come one a call (see
        fz.pullback).
      world: ranks that share the batch; by default those that the environment names.
      optimizer: instead of the config's: an optimizer, or a function of the learning rate that its scheduler gives.
      auto: values for what says "auto".
      axis: the mesh axis, or axes outermost first, over which the batch is split. By default "data", and ("node",
        "local") where ZeRO++'s keys ask for nodes.
      units, source: as value_and_grad's or pullback's.
      weight: as scale_loss's, near the weight of an update. By default it is measured, and with pullback the number of
        micro-batches.

    Raises:
      ConfigError: what cannot be honoured, with the key's path and what to write.

    Source: DeepSpeed 0.19.8.

    >>> page = {"train_batch_size": 8, "gradient_accumulation_steps": 1, "fp16": {"enabled": True},
    ...         "optimizer": {"type": "Adam", "params": {"lr": 0.00015}}, "zero_optimization": True}
    >>> loss_fn = lambda params, batch: (batch["x"] @ params["w"], len(batch["x"]))
    >>> chain, config = from_deepspeed(page, loss_fn, world=2)
    >>> [getattr(part, "name", None) or getattr(part, "__name__", type(part).__name__) for part in chain]
    ['value_and_grad', 'Bracket']
    """
    if (loss_fn is None) == (not pullback):
        remedy = "write from_deepspeed(config, loss_fn), or from_deepspeed(config, pullback=True)"
        raise TypeError(f"from_deepspeed: a chain has one gradient; {remedy}")
    resolved = config if isinstance(config, Config) else resolve(config, world, auto)
    resolved = resolved if loss_fn is None else _without_engine(resolved)
    if resolved.notes and os.environ.get("RANK", "0") == "0":
        logging.warning("%s: %s", resolved.name, "; ".join(resolved.notes))
    axes = crossing(resolved).axes if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
    split = P(axes)
    gradient = pulled(split, **source) if loss_fn is None else value_and_grad(loss_fn, split, units, **source)
    if pullback and weight is None:
        weight = 2.0 ** round(math.log2(resolved.triad.steps))  # mean losses: DeepSpeed seeds scale / steps
    tx = optimizer_of(resolved, optimizer)
    return chain_of(resolved, gradient, tx, axis=axis, stream=pullback, weight=weight), resolved


def _without_engine(config: Config) -> Config:
    """A config for a loss function, with a note for every key of it that only an engine would follow.

    Raises:
      ConfigError: the key would change the values.
    """
    if config.value("fp16.auto_cast"):
        remedy = "delete the key and write batch[...].half() in it"
        raise ConfigError(f"{config.where('fp16.auto_cast')}a loss function casts its own inputs; {remedy}")
    changed = [path for path in ENGINE if config.value(path) != KEYS[path].default]
    return config._replace(
        notes=(*config.notes, *(f"{path} is an engine's, and this chain has none" for path in changed))
    )


def chain_of(
    config: Config,
    source: Any,
    optimizer: Optimizer,
    axis: str | tuple[str, ...] | None = None,
    stream: bool = False,
    weight: float | None = None,
    between: Sequence[Transform] = (),
) -> tuple[Any, ...]:
    """A Source and an optimizer with everything between them that the config asks for.

    Args:
      axis: as from_deepspeed's.
      between: what works on the mean right of what the config asks for, and left of the optimizer.
      stream: micro-batches come one a call, and a call with None closes the window.
      weight: as scale_loss's.
    """
    stage, k = config.value("zero_optimization.stage"), config.triad.steps
    over_time: tuple[Any, ...] = (accumulate(k, stream=stream),) if stream or k > 1 else ()
    narrow, scatter, first = dtype_name(config.value("communication_data_type")), as_born, source
    if narrow is not None and narrow not in ("float32", config.compute):  # gradients are rounded where they are sent
        alone = rounded(getattr(torch, narrow))
        if config.world.size > 1:
            scatter = cast(narrow)
        else:  # nothing travels, but DeepSpeed rounds all the same
            first, over_time = ((source, alone), over_time) if stage == 2 else (source, (*over_time, alone))
    threshold = config.value("zero_optimization.stage3_param_persistence_threshold") + 1 if stage == 3 else 0
    parts, how = (first, *on_values(config, weight), *between, optimizer), crossing(config)
    axes = how.axes if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
    if not how.nested:
        return zero(
            *parts,
            stage=stage,
            axis=axes,
            accumulate=over_time,
            threshold=threshold,
            gather=how.weights,
            scatter=scatter,
            frozen=how.frozen,
        )
    if len(axes) != 2:
        raise ConfigError(f"{config.where(HPZ)}there are nodes, but axis={axis!r}; write axis=('node', 'local')")
    return zeropp(
        *parts,
        node=axes[0],
        local=axes[1],
        weights=how.weights if how.secondary else (how.weights, how.weights),
        gradients=how.gradients,
        secondary=how.secondary,
        accumulate=over_time,
        threshold=threshold,
        frozen=how.frozen,
    )


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

        def scaled(out: Any, state: Any) -> Any:
            return out._replace(factor=out.factor * n, norm=None if out.norm is None else out.norm * n), state

        return after(g, name, g.layout, scaled)

    transform.__name__ = name
    return transform


def rounded(dtype: torch.dtype) -> Transform:
    """Gradients rounded to a dtype where a world of one sends them to nobody (DeepSpeed: communication_data_type)."""
    name = f"rounded({str(dtype).removeprefix('torch.')!r})"

    def transform(g: Grad) -> Grad:
        if g.env.exact:
            raise refuse(
                g, name, "exact sums are integers, which have no narrower form; delete communication_data_type"
            )

        def narrowed(out: Sum, state: State) -> tuple[Sum, State]:
            return out._replace(grads=out.grads.to(dtype)), state

        return after(g, name, g.layout, narrowed)

    transform.__name__ = name
    return transform
