"""The chain of a Trainer: from its model, its TrainingArguments and a Zero or a ds_config to a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from absl import logging

from funczero.core.policy import Policy
from funczero.deepspeed.config.build import CLIP_EPS, chain_of
from funczero.deepspeed.config.crossing import crossing
from funczero.deepspeed.config.optimizers import GroupRates, optimizer_of, rates_of
from funczero.deepspeed.config.resolved import Config
from funczero.gradients.gradient import value_and_grad
from funczero.gradients.stateless import stateless
from funczero.hf.auto import config_of
from funczero.hf.items import training_loss
from funczero.hf.optimizers import face_of, of_torch, rate_of
from funczero.hf.refusals import check_config_optimizer, check_rate
from funczero.hf.run import Built
from funczero.hf.zero import Zero
from funczero.layout.spec import P
from funczero.step.train_step import train_step
from funczero.transforms.accumulate import accumulate
from funczero.transforms.average import ema
from funczero.transforms.clip import clip_by_global_norm
from funczero.transforms.loss_scale import scale_loss

FLOOR = 2.0**-24  # of a loss scale; torch.amp.GradScaler, whose first scale and window these are, has none
SCALE, WINDOW = 2.0**16, 2000


def built(trainer: Any, updates: int) -> Built:
    """The step of a Trainer, and what callbacks are shown as its optimizer and schedule.

    Args:
      updates: of the whole training.

    Raises:
      ValueError, TypeError, ChainError, ConfigError: what cannot be right, by name.
    """
    if isinstance(trainer.zero, Zero):
        return _by_arguments(trainer, trainer.zero, updates)
    return _by_config(trainer, config_of(trainer.zero, trainer.args, trainer.model, updates), updates)


def _by_arguments(trainer: Any, zero: Zero, updates: int) -> Built:
    args, model = trainer.args, trainer.model
    policy = zero.policy or policy_of(args, model)
    if zero.optimizer is None:
        tx = _of_the_call(trainer, updates)
    else:
        trainer.optimizer = face_of(model, args.learning_rate)
        trainer.create_scheduler(updates)
        tx = zero.optimizer(rate_of(trainer.lr_scheduler))
    half = Policy.parse(policy).compute == torch.float16
    transforms: list[Any] = [scale_loss(SCALE, _weight(args), True, WINDOW, 1, FLOOR)] if half else []
    if args.max_grad_norm > 0:
        transforms.append(clip_by_global_norm(args.max_grad_norm, eps=CLIP_EPS))
    transforms += [tx, *([] if zero.ema is None else [ema(zero.ema)])]
    grad, params, dtype = _source(trainer, zero.axes, policy, zero.units, zero.conditional)
    parts = zero.parts(grad, transforms, (accumulate(args.gradient_accumulation_steps, stream=True),))
    return Built(_step(trainer, parts, zero.sizes(args.world_size), policy, zero.sums), params, dtype)


def _by_config(trainer: Any, config: Config, updates: int) -> Built:
    args, model = trainer.args, trainer.model
    rates = None
    if config.value("optimizer.type") is None:
        tx = _of_the_call(trainer, updates)
    elif config.value("scheduler.type") is None:
        check_config_optimizer(trainer)
        trainer.optimizer = face_of(model, config.value("optimizer.params.lr"))
        trainer.create_scheduler(updates)
        rates = GroupRates(rate_of(trainer.lr_scheduler))
        tx = optimizer_of(config, rates=rates)
    else:
        check_config_optimizer(trainer)
        rates = rates_of(config)
        trainer.optimizer = face_of(model, 1.0)
        lr = rates.lr
        shown = lambda n: float(lr(torch.tensor(n))) if callable(lr) else float(lr)  # type: ignore[arg-type]
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, shown)
        tx = optimizer_of(config, rates=rates)
    grad, params, dtype = _source(trainer, crossing(config).axes, config.policy, None, None)
    parts = chain_of(config, grad, tx, stream=True, weight=_weight(args))
    arguments = config.arguments
    return Built(_step(trainer, parts, arguments["mesh"], config.policy, arguments["sums"]), params, dtype)


def _of_the_call(trainer: Any, updates: int) -> Any:
    """The optimizer and the schedule that the Trainer was given, or that its arguments name."""
    trainer.create_optimizer()
    check_rate(trainer.optimizer)
    trainer.create_scheduler(updates)
    return of_torch(trainer.model, trainer.optimizer, trainer.lr_scheduler)


def _source(trainer: Any, axes: tuple[str, ...], policy: str, units: Any, conditional: Any) -> Any:
    dtype = Policy.parse(policy).compute
    loss_fn: Any
    loss_fn, params = stateless(
        trainer.model.train(), training_loss(trainer, dtype), units=units, conditional=conditional
    )
    moved, args = [*getattr(loss_fn, "state", ())], trainer.args
    if moved and args.process_index == 0 and args.gradient_accumulation_steps * args.world_size > 1:
        how = "move once an update, to the mean over its micro-batches, where the stock Trainer moves them at each"
        logging.warning("hf.Trainer: buffers (%s) %s", ", ".join(moved[:2]) + ", ..." * (len(moved) > 2), how)
    grad = value_and_grad(loss_fn, P(axes), rng=True, trainable=loss_fn.trainable, unused="keep")
    return grad, params, dtype


def _step(trainer: Any, parts: tuple[Any, ...], mesh: Any, policy: str, sums: str) -> Any:
    args = trainer.args
    step = train_step(*parts, mesh=mesh, policy=policy, sums=sums)
    places = step.grad.layout.stride
    want = args.gradient_accumulation_steps * args.world_size
    times = [n for name, n in step.grad.layout.order if name == "accumulate"]
    if places != want or times != [args.gradient_accumulation_steps]:
        why = f"the chain adds {places} micro-batches an update, but the arguments say {want}"
        raise ValueError(f"hf.Trainer: {why}; put accumulate= into the chain once, and every rank on an axis of rows")
    return step


def _weight(args: Any) -> float:
    """A power of two near the weight of an update, which is its number of micro-batches."""
    return 2.0 ** round(math.log2(args.gradient_accumulation_steps * args.world_size))


def policy_of(args: Any, model: Any) -> str:
    """Masters and compute as TrainingArguments and the model say: float32 masters under bf16 and fp16, else the model's
    own dtype.

    Raises:
      ValueError: a model of several dtypes, or one in float16.
    """
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    if args.bf16 or args.fp16:
        return f"params=float32,compute={'bfloat16' if args.bf16 else 'float16'},accumulate=float32"
    if len(dtypes) > 1:
        have, write = " and ".join(sorted(dtypes)), "params=float32,compute=bfloat16,accumulate=float32"
        raise ValueError(f"hf.Trainer: the model has parameters in {have}; write bf16=True, or Zero(policy={write!r})")
    own = dtypes.pop()
    if own == "float16":
        raise ValueError("hf.Trainer: the model is in float16, which trains with a loss scale; write fp16=True")
    return f"params={own},compute={own},accumulate={'float64' if own == 'float64' else 'float32'}"
