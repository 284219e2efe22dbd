"""What a Trainer may not be asked for: each by name, before anything is trained."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from funczero.layout.processes import world_size

WHO = "hf.Trainer"
TRIED = "5.24.0"  # of transformers
NEEDED = (
    "_build_accelerator_args", "_finalize_training", "_get_dataloader", "_get_learning_rate",
    "_load_best_model", "_load_from_checkpoint", "_load_rng_state", "_maybe_log_save_evaluate",
    "_move_model_to_device", "_prepare_for_training", "_run_epoch", "_save_optimizer_and_scheduler",
    "_track_num_input_tokens", "_wrap_model",
    "compute_loss", "create_optimizer", "create_scheduler", "evaluation_loop", "floating_point_ops", "prediction_step",
    "save_model", "set_initial_training_values",
)  # fmt: skip
OWN = {  # methods of the stock loop that are not called here, and what to write in their place
    "training_step": "override compute_loss, or use a callback",
    "get_batch_samples": "override compute_loss, or _get_train_sampler",
    "_get_num_items_in_batch": "override compute_loss, and set loss_is_scaled_for_ga = False where it returns a mean",
    "_clip_grad_norm": "write max_grad_norm, or Zero(chain=...)",
    "_get_grad_norm": "read grad_norm in the log",
    "create_optimizer_and_scheduler": "override create_optimizer and create_scheduler",
    "autocast_smart_context_manager": "write bf16=True, or Zero(policy=...)",
    "compute_loss_context_manager": "write bf16=True, or Zero(policy=...)",
    "_load_optimizer_and_scheduler": "resume_from_checkpoint reads the sharded state",
}
ARGUMENTS = {  # flags that are off by themselves
    "deepspeed": "it makes Accelerate build an engine; give the config as zero=..., or use the stock Trainer",
    "fsdp": "it wraps the model in torch's FSDP; write zero=Zero(stage=3)",
    "torch_compile": "a compiled model would be a graph of its first parameters; compile blocks of it",
    "auto_find_batch_size": "another batch size is another training; write one that fits",
    "parallelism_config": "there is one kind of parallelism here, of data; leave it out",
    "use_liger_kernel": "it has not been tried here; leave it out",
    "batch_eval_metrics": "metrics are computed once, of all rows; leave it out",
    "eval_use_gather_object": "predictions are gathered as tensors; leave it out",
    "enable_jit_checkpoint": "it saves from a signal handler, where ranks do not meet; use fz.Notice in a callback",
    "debug": "its hooks look at gradients and whole weights, which no module has here; leave it out",
}
ACCELERATOR = {
    "split_batches": "per_device_train_batch_size is what one rank computes; leave it out",
    "dispatch_batches": "every rank loads its own rows; leave it out",
    "gradient_accumulation_kwargs": "write gradient_accumulation_steps",
}


def check_version(trainer: type) -> None:
    """Refuse a transformers whose loop is another one.

    Raises:
      RuntimeError: it names what is missing.
    """
    missing = [name for name in NEEDED if not callable(getattr(trainer, name, None))]
    if missing:
        raise RuntimeError(
            f"{WHO}: transformers {transformers.__version__} has no Trainer.{missing[0]}, which this class builds on;"
            f" install transformers=={TRIED}, the version that was tried"
        )


def check_arguments(args: Any) -> None:
    """Refuse what the arguments ask for.

    Raises:
      ValueError: by name.
    """
    for name, why in ARGUMENTS.items():
        if getattr(args, name, None):
            raise ValueError(f"{WHO}: TrainingArguments({name}={getattr(args, name)!r}): {why}")
    for name, why in ACCELERATOR.items():
        if getattr(args.accelerator_config, name, None):
            raise ValueError(f"{WHO}: accelerator_config: {name}: {why}")
    if args.train_sampling_strategy == "batch_rebalance":
        why = "it deals rows among ranks by itself"
        raise ValueError(f"{WHO}: train_sampling_strategy='batch_rebalance': {why}; write 'group_by_length'")
    if args.n_gpu > 1:
        why = f"one process sees {args.n_gpu} accelerators, which the stock Trainer would use by nn.DataParallel"
        raise ValueError(f"{WHO}: {why}; start one process for each, as with torchrun")
    if not args.average_tokens_across_devices and args.world_size > 1:
        why = "the loss of an update is a mean over the items of all ranks"
        raise ValueError(f"{WHO}: average_tokens_across_devices=False: {why}; leave it out")
    there = world_size()
    if there != args.world_size:
        why = f"there are {there} processes, but TrainingArguments found {args.world_size}"
        raise ValueError(f"{WHO}: {why}, as it does without an accelerator; write use_cpu=True")


def check_model(trainer: Any) -> None:
    """Refuse what somebody else has sharded, or will, and values that no gradient moves.

    Raises:
      ValueError: by name.
    """
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        if getattr(trainer, name, False):
            what = name.split("_")[1]
            why = f"the environment asks Accelerate for {what} (ACCELERATE_USE_{what.upper()})"
            raise ValueError(f"{WHO}: {why}, which would shard the model again; start it with torchrun, or unset it")
    if getattr(trainer, "is_distributed_loading_by_transformers", False) or trainer.is_model_parallel:
        why = "the model is spread over devices already"
        raise ValueError(f"{WHO}: {why}; load it without device_map and distributed_config")
    odd = next((n for n, p in trainer.model.named_parameters() if not p.is_floating_point()), None)
    if odd is not None:
        why = f"parameter {odd!r} is {trainer.model.get_parameter(odd).dtype}, as of a quantised model"
        raise ValueError(f"{WHO}: {why}, which no chain holds; load it without quantization_config")


def check_methods(trainer: Any, stock: type, own: type) -> None:
    """Refuse overridden methods that this loop does not call.

    Args:
      stock: transformers' Trainer; own: this package's.

    Raises:
      TypeError: by name.
    """
    for name, remedy in OWN.items():
        found = getattr(type(trainer), name, None)
        if found is not None and found not in (getattr(stock, name, None), getattr(own, name, None)):
            who = next(c.__name__ for c in type(trainer).__mro__ if name in c.__dict__)
            raise TypeError(f"{WHO}: {who}.{name} is overridden, but this loop does not call it; {remedy}")


def check_device(asked: torch.device, own: torch.device) -> None:
    """Refuse a device that is not this process's.

    Raises:
      ValueError: they differ.
    """
    if asked.type != own.type or asked.type != "cpu" and (asked.index or 0) != (own.index or 0):
        why = f"TrainingArguments say {asked}, but this process's device, where the chain keeps its state, is {own}"
        raise ValueError(f"{WHO}: {why}; write use_cpu=True for a CPU, or hide the other accelerators")


def check_given(args: Any, give_back: bool) -> None:
    """Refuse what needs the module's own weights after training, where it has none.

    Raises:
      ValueError: by name.
    """
    for name in ("load_best_model_at_end", "bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name, False) and not give_back:
            why = "it is about weights in the module, which has none"
            raise ValueError(f"{WHO}: {name} with Zero(give_back=False): {why}; leave out one of them")


def check_one_optimizer(zero: Any) -> None:
    """Refuse an optimizer of the call beside one of the chain.

    Raises:
      ValueError: there would be two.
    """
    if getattr(zero, "optimizer", None) is not None:
        why = "there is an optimizer of the call, and one of Zero(optimizer=...)"
        raise ValueError(f"{WHO}: {why}; leave out one of them")


def check_rate(optimizer: Any) -> None:
    """Refuse an optimizer without a rate, as Adafactor is by default: no schedule could move it.

    Raises:
      ValueError: by its name.
    """
    if any(group.get("lr") is None for group in optimizer.param_groups):
        why = "has no learning rate (lr=None), so it makes one of its own, and a schedule has nothing to move"
        raise ValueError(f"{WHO}: the {type(optimizer).__name__} {why}; give lr=, or write Zero(optimizer=...)")


def check_config_optimizer(trainer: Any) -> None:
    """Refuse an optimizer or a schedule of the call beside one of a ds_config.

    Raises:
      ValueError: there would be two.
    """
    if (
        trainer.optimizer is not None
        or trainer.optimizer_cls_and_kwargs is not None
        or trainer.lr_scheduler is not None
    ):
        why = "there is an optimizer or a schedule of the call, and one of the ds_config"
        raise ValueError(f"{WHO}: {why}; leave out one of them")
