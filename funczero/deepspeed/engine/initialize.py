"""`deepspeed.initialize`: a module and a config become an engine, an optimizer, a loader and a scheduler."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from absl import logging
from torch import Tensor, nn

from funczero.core.types import Transform
from funczero.deepspeed.config.build import chain_of
from funczero.deepspeed.config.crossing import crossing
from funczero.deepspeed.config.key import ConfigError
from funczero.deepspeed.config.optimizers import GroupRates, of_group
from funczero.deepspeed.config.resolve import resolve
from funczero.deepspeed.config.resolved import Config
from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.engine import Engine
from funczero.deepspeed.engine.held import Closed, check_free, named, take
from funczero.deepspeed.engine.holder import Holder
from funczero.deepspeed.engine.loader import Loader
from funczero.deepspeed.engine.sharded import ShardedParameters
from funczero.deepspeed.engine.whole import WholeParameters
from funczero.deepspeed.engine.zero_init import reopen
from funczero.deepspeed.optim.clients import client_groups, client_optimizer
from funczero.deepspeed.optim.groups import (
    STILL,
    ByGroup,
    Numbers,
    config_groups,
    config_optimizer,
    group_rates,
    grouped,
    still,
)
from funczero.deepspeed.optim.optimizer import EngineOptimizer, with_numbers
from funczero.deepspeed.optim.schedulers import from_config
from funczero.layout.mesh import plan_mesh
from funczero.layout.processes import world_size
from funczero.layout.spec import P
from funczero.step.step import Step
from funczero.step.train_step import train_step

Groups = list[dict[str, Any]]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Engine, EngineOptimizer | None, Any, Any]:
    """(engine, optimizer, training_dataloader, lr_scheduler) over the chain of a config; it takes the module over.

    Without an optimizer in the config and in the call the engine evaluates: it has a forward and no backward.

    Law: the engine's run is that of `fz.from_deepspeed(config, pullback=True)`, bit for bit. All ranks start from rank
    0's parameters and buffers.

    Args:
      args: has `deepspeed_config`, unless config is given.
      model: its parameters share storage with the engine's at stages 0 to 2, and hold nothing at stage 3.
      optimizer: instead of the config's: one of torch.optim over the model's parameters, or a function of the groups
        that makes it.
      model_parameters: those to train, or groups [{"params": [...], "lr": ..., "weight_decay": ...}]; by default all
        that require a gradient.
      training_data: a map-style dataset, for a loader that deals rows by rank and goes on where a checkpoint was.
      lr_scheduler: an object with step(), which the engine calls after applied updates, or a function of the optimizer
        that makes it.
      dist_init_required: False: the world must be there already.
      config: a dict, a path, or base64 of its text; config_params is an old name of it.

    Raises:
      ConfigError, ValueError, TypeError: what cannot be honoured, by name.

    Source: DeepSpeed 0.19.8, deepspeed.initialize.
    """
    _refuse(model, mpu, mesh_param, dist_init_required)
    assert model is not None
    given = _config_of(args, config, config_params)
    ranks.init_distributed(dist_init_required=dist_init_required, distributed_port=distributed_port, verbose=False)
    _check_local_rank(args)
    resolved = resolve(given, world_size())
    if resolved.notes and ranks.get_rank() == 0:
        logging.warning("%s: %s", resolved.name, "; ".join(resolved.notes))
    _place(model, resolved.value("zero_optimization.stage") == 3)
    evaluates = optimizer is None and resolved.value("optimizer.type") is None
    groups = _groups(model, model_parameters, evaluates)
    client = optimizer if optimizer is None or isinstance(optimizer, torch.optim.Optimizer) else optimizer(groups)
    if client is not None:
        groups = [dict(g) for g in client.param_groups]
    engine, holder, numbers, rates = _engine_of(resolved, model, groups, client, lr_scheduler)
    if evaluates:
        loader = _loader(engine, training_data, collate_fn)
        _take_over(model, engine, holder)
        return engine, None, loader, None
    shown = {} if client is not None else resolved.block("optimizer.params")
    fixed, state = {name: x for name, x in shown.items() if name not in numbers[0]}, engine.state
    engine.optimizer = EngineOptimizer(engine, with_numbers(groups, numbers), client, fixed)
    engine.optimizer.pull(state)
    engine.lr_scheduler, engine.client_lr_scheduler = _scheduler(engine.optimizer, lr_scheduler, resolved, rates)
    loader = _loader(engine, training_data, collate_fn)
    _take_over(model, engine, holder)
    return engine, engine.optimizer, loader, engine.lr_scheduler


def engine_over(
    model: nn.Module, config: Config, optimizer: torch.optim.Optimizer | None = None, between: Sequence[Transform] = ()
) -> Engine:
    """An engine for a loop of another library: over a module, a resolved config and the module's own optimizer.

    Law: as initialize's. What the optimizer has and needs no gradient is not trained.

    Args:
      model: on this process's device, with rank 0's values on all ranks.
      optimizer: one of torch.optim over the model's parameters; None: the engine evaluates.
      between: transforms between the mean and the optimizer, right of those that the config asks for.
    """
    groups: Groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if optimizer is not None:
        groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in optimizer.param_groups]
    engine, holder, numbers, _ = _engine_of(config, model, groups, optimizer, None, between)
    if optimizer is not None:
        state = engine.state
        engine.optimizer = EngineOptimizer(engine, with_numbers(groups, numbers), optimizer)
        engine.optimizer.pull(state)
    _take_over(model, engine, holder)
    return engine


def _engine_of(
    config: Config, model: nn.Module, groups: Groups, client: Any, scheduler: Any, between: Sequence[Transform] = ()
) -> tuple[Engine, Holder, list[Numbers], list[GroupRates]]:
    """The engine over a placed module, which is not taken over yet; the groups' numbers and the config's rates."""
    check_free(model)
    made, holder, numbers, rates = _built(config, model, groups, client, scheduler, between)
    step = made(config)
    threshold = config.value("zero_optimization.stage3_param_persistence_threshold") + 1
    state = step.init(holder.start(threshold, step))
    return Engine(holder, config, step, state, rates, made), holder, numbers, rates


def _take_over(model: nn.Module, engine: Engine, holder: Holder) -> None:
    """The module becomes the engine's, as the last thing done: a call that ends in an error takes nothing."""
    take(model, engine, holder.kind)
    holder.attach()


def _loader(engine: Engine, data: Any, collate_fn: Any) -> Any:
    if data is not None:
        engine.training_dataloader = Loader(engine, data, collate_fn)
    return engine.training_dataloader


def _refuse(model: Any, mpu: Any, mesh_param: Any, dist_init_required: bool | None) -> None:
    if model is None:
        raise TypeError("initialize: it needs a model; write initialize(model=module, ...)")
    if not isinstance(model, nn.Module):
        raise TypeError(f"initialize: model is a {type(model).__name__}; give a torch.nn.Module")
    if isinstance(model, Engine):
        raise TypeError("initialize: this model is an engine already; give the module itself")
    if mpu is not None or mesh_param is not None:
        raise ValueError(
            f"initialize: {'mpu' if mpu is not None else 'mesh_param'}= asks for model parallelism, and there is "
            "only data parallelism here; leave it out"
        )
    if dist_init_required is False and not torch.distributed.is_initialized():
        raise RuntimeError(
            "initialize: dist_init_required=False, but no world is there; "
            "call deepspeed.init_distributed() first, or leave it out"
        )


def _place(model: nn.Module, cut: bool) -> None:
    """Rank 0's values on this process's device.

    Args:
      cut: what zero.Init has cut stays so; otherwise it becomes whole again.
    """
    closed = [p for p in model.parameters() if isinstance(p, Closed) and p.home[0] is None]
    device = plan_mesh({"data": -1}).device
    if not closed:
        model.to(device)
    for p in closed if not cut else ():
        reopen(p)
    ranks.broadcast_module(model)


def _config_of(args: Any, config: Any, config_params: Any) -> Any:
    given = {"config=": config, "config_params=": config_params}
    given |= {f"args.{n}": getattr(args, n, None) for n in ("deepspeed_config", "deepscale_config")}
    found = [n for n, x in given.items() if x is not None]
    if not found:
        raise ConfigError("initialize: no config; write config={...}, or --deepspeed_config ds_config.json")
    if len(found) > 1:
        raise ConfigError(f"initialize: {' and '.join(found)} both name a config; leave one out")
    return given[found[0]]


def _check_local_rank(args: Any) -> None:
    local, given = int(os.environ.get("LOCAL_RANK", "0")), getattr(args, "local_rank", None)
    if isinstance(given, int) and given >= 0 and given != local:
        raise ValueError(
            f"initialize: args.local_rank is {given}, but LOCAL_RANK of the environment is {local}; "
            "leave --local_rank to the launcher"
        )
    if args is not None and isinstance(given, int):
        args.local_rank = local


def _groups(model: nn.Module, given: Iterable[Any] | None, evaluates: bool) -> Groups:
    """Groups of the model's parameters that are trained."""
    if given is None:
        items: list[Any] = [p for p in model.parameters() if p.requires_grad]
    else:
        items = [given] if isinstance(given, (Tensor, dict)) else list(given)
    groups = [dict(g) for g in items] if items and isinstance(items[0], Mapping) else [{"params": items}]
    known, seen = {id(p) for p in model.parameters()}, set()
    for i, g in enumerate(groups):
        params = [g["params"]] if isinstance(g["params"], Tensor) else list(g["params"])
        params = [p[1] if isinstance(p, tuple) else p for p in params]  # model.named_parameters()
        for j, p in enumerate(params):
            name = f"model_parameters: parameter {j} of group {i}, of shape {tuple(p.shape)},"
            if id(p) not in known:
                raise ValueError(f"{name} is not one of the model's; give model.parameters()")
            if id(p) in seen:
                raise ValueError(f"{name} stands twice; name it once")
            seen.add(id(p))
        g["params"] = [p for p in params if p.requires_grad]
    if not any(g["params"] for g in groups) and not evaluates:
        raise ValueError(
            "model_parameters: none of them requires a gradient; write module.requires_grad_() before initialize"
        )
    return groups


def _built(
    config: Config, model: nn.Module, groups: Groups, client: Any, lr_scheduler: Any, between: Sequence[Transform]
) -> tuple[Callable[[Config], Step], Holder, list[Numbers], list[GroupRates]]:
    """What makes the step of a config over the module's parameters, how forwards read them, the groups' numbers and the
    config's rates.
    """
    by_id = {id(p): i for i, g in enumerate(groups) for p in g["params"]}
    trained = {n for n, p in named(model).items() if id(p) in by_id}
    name, make, numbers = _optimizer(config, model, groups, client, lr_scheduler)
    if lr_scheduler is not None and config.value("scheduler.type") is not None and ranks.get_rank() == 0:
        logging.warning("%sit is not read: the call gives lr_scheduler=", config.where("scheduler.type"))
    rates = group_rates(config, numbers) if lr_scheduler is None else []
    whole = config.value("zero_optimization.stage") < 3
    holder: Holder = WholeParameters(model) if whole else ShardedParameters(model)
    source = holder.source(P(crossing(config).axes), lambda path: path in trained)
    optimizer: Any = grouped(name, make, numbers, rates)

    def made(config: Config) -> Step:
        chain = chain_of(config, source, optimizer, stream=True, weight=config.triad.weight, between=between)
        return train_step(*chain, **config.arguments, check=10 if whole else True)

    return made, holder, numbers, rates


def _optimizer(
    config: Config, model: nn.Module, groups: Groups, client: Any, lr_scheduler: Any
) -> tuple[str, ByGroup, list[Numbers]]:
    """The call's optimizer, the config's, or none: its name, what makes it for the groups, and their numbers."""
    by_id = {id(p): i for i, g in enumerate(groups) for p in g["params"]}
    home = {n: by_id.get(id(p), 0) for n, p in named(model).items()}
    if client is not None:
        _check_client(config, model, client)
        numbers = client_groups(client)
        return type(client).__name__.lower(), client_optimizer(client, home), numbers
    if config.value("optimizer.type") is not None:
        numbers = config_groups(config, groups)
        return config.value("optimizer.type").lower(), config_optimizer(config, home), numbers
    if config.value("scheduler.type") is not None or lr_scheduler is not None:
        why = "there is a scheduler, but neither the config nor the call names an optimizer"
        raise ConfigError(f'{config.name}: {why}; add "optimizer": {{"type": "Adam"}}, or delete the scheduler')
    return "evaluation", still(), [dict(STILL) for _ in groups]


def _check_client(config: Config, model: nn.Module, client: Any) -> None:
    """Refuse an optimizer over somebody else's parameters; say that the config's is not read."""
    if config.value("optimizer.type") is not None and ranks.get_rank() == 0:
        kind = type(client).__name__
        logging.warning("%sit is not read: the call gives an optimizer, a %s", config.where("optimizer.type"), kind)
    known = {id(p) for p in model.parameters()}
    unknown = next((p for g in client.param_groups for p in g["params"] if id(p) not in known), None)
    if unknown is not None:
        raise ValueError(
            f"optimizer: its parameter of shape {tuple(unknown.shape)} is not one of the model's; "
            "make it from model.parameters()"
        )


def _scheduler(optimizer: EngineOptimizer, given: Any, config: Config, rates: list[GroupRates]) -> tuple[Any, bool]:
    """The scheduler to return, and whether the engine steps it."""
    if rates:
        kind, n = config.value("scheduler.type"), len(rates)
        options = [of_group(kind, config.block("scheduler.params"), i, n) for i in range(n)]
        return from_config(optimizer, kind, rates, options), False
    if given is None:
        return None, False
    made = given if hasattr(given, "step") else given(optimizer)
    if not callable(getattr(made, "step", None)):
        raise TypeError(
            f"lr_scheduler: a {type(made).__name__} has no step(); "
            "give a scheduler, or a function of the optimizer that returns one"
        )
    over = getattr(made, "optimizer", None)
    if isinstance(over, torch.optim.Optimizer) and over is not optimizer and over is not optimizer.client:
        raise ValueError(
            f"lr_scheduler: this {type(made).__name__} moves another optimizer than the engine's, so it would change "
            "nothing; give lr_scheduler=lambda optimizer: ..., or its optimizer as optimizer="
        )
    return made, True


__all__: Sequence[str] = ["initialize"]
