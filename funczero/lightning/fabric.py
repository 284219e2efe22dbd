"""A strategy for `lightning.fabric.Fabric`: `fabric.setup`, `fabric.backward`, `fabric.save` over engines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.precision import Precision
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn

from funczero.deepspeed.engine.zero_init import Init
from funczero.lightning.engines import Engines, broadcast_buffers
from funczero.lightning.kept import KeptPrecision
from funczero.lightning.prepare import prepared
from funczero.lightning.settings import Settings, join, named
from funczero.lightning.weights import load_module, module_state


class FabricPrecision(KeptPrecision, Precision):
    """What Fabric calls its precision plugin for."""

    def __init__(self, inner: Precision) -> None:
        """inner: Lightning's own for the precision that was asked for."""
        self.keep(inner)


class Forward(nn.Module):
    """What Fabric calls: the user's module in its own place, with its parameters open."""

    def __init__(self, module: nn.Module, engines: Engines, buffers_from_first: bool) -> None:
        """module: the user's."""
        super().__init__()
        self.module, self.engines, self.buffers_from_first = module, engines, buffers_from_first

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        if self.buffers_from_first:
            broadcast_buffers([self.module])
        return self.engines.inside(self.module, self.module, *args, **kwargs)


class NoSync:
    """Nothing to leave out: gradients are summed where the stage says, and their sum is the same."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        """Nothing."""
        return nullcontext()


class FabricStrategy(DDPStrategy):
    """ZeRO for Fabric: `Fabric(strategy=FabricStrategy(stage=3))`, or by name, "funczero_stage_3".

    Law: as FunczeroStrategy's. A module and its optimizers are set up together; `fabric.backward` reaches the engines
    of every module whose parameters a loss depends on. `fabric.clip_gradients` tells the next update, and returns
    nothing: `strategy.grad_norm(optimizer)` is the norm, after the step.

    Args:
      stage, zero, broadcast_buffers, sums: as FunczeroStrategy's.
      accelerator, parallel_devices, cluster_environment, checkpoint_io, precision, process_group_backend, timeout: as
        DDPStrategy's.
    """

    strategy_name = "funczero"

    def __init__(
        self,
        stage: int = 2,
        zero: Mapping[str, Any] | None = None,
        broadcast_buffers: bool = True,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        sums: str = "tree",
    ) -> None:
        self.settings = Settings(stage, dict(zero or {}), sums=sums).checked()
        self.buffers_from_first, self.engines = broadcast_buffers, Engines(self.settings)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision=precision,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._backward_sync_control: Any = NoSync()

    @property
    def precision(self) -> Any:
        """Lightning's own, kept inside of one that leaves casting of parameters to the chain."""
        if self._precision is None:
            self._precision = FabricPrecision(Precision())
        return self._precision

    @precision.setter
    def precision(self, plugin: Any) -> None:
        self._precision = plugin if plugin is None or isinstance(plugin, FabricPrecision) else FabricPrecision(plugin)
        if self._precision is not None:
            self.settings = self.settings._replace(
                precision=str(self._precision.precision), scaler=self._precision.scaler
            ).checked()
            self.engines.settings = self.settings

    def setup_environment(self) -> None:
        """Joins the world; what a launcher of Lightning's leaves out of the environment is written there."""
        super().setup_environment()
        join(self.root_device, self.global_rank, self.world_size)

    # --- modules and optimizers
    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """At stage 3 a module is cut while it is built, so that no rank holds it, whatever empty_init says."""
        if self.settings.stage < 3:
            return super().module_init_context(empty_init)
        stack = ExitStack()
        stack.enter_context(self.root_device)
        stack.enter_context(Init())
        return stack

    def module_to_device(self, module: nn.Module) -> None:
        """Nothing yet: setting it up places it, and what is cut stays where it is."""

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Any], scheduler: Any = None
    ) -> tuple[nn.Module, list[Any], Any]:
        """Engines over the module, one for each optimizer."""
        _check_attached(scheduler, optimizers)
        prepared(module, self.root_device, self.settings.stage, self.precision.buffers())
        faces = self.engines.add(module, optimizers)
        return Forward(module, self.engines, self.buffers_from_first), list(faces), scheduler

    def setup_module(self, module: nn.Module) -> Any:
        """A module that is only evaluated."""
        prepared(module, self.root_device, self.settings.stage, self.precision.buffers())
        if self.settings.stage == 3:
            self.engines.add(module, [])
        return Forward(module, self.engines, self.buffers_from_first)

    def setup_optimizer(self, optimizer: Any) -> Any:
        """Refused: an engine is over a module and its optimizer.

        Raises:
          NotImplementedError: always.
        """
        raise NotImplementedError(
            "FabricStrategy: an engine is over a module and its optimizers, so they are set up together; write"
            " model, optimizer = fabric.setup(model, optimizer)"
        )

    # --- the three moments
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Into the engines that the loss reaches."""
        retain = kwargs.pop("retain_graph", None)
        if args or kwargs:
            named = ", ".join(kwargs) or "a gradient"
            raise TypeError(
                f"fabric.backward: the gradient of a loss is all that an engine takes, and {named} was given; multiply"
                " the loss instead, or leave it out"
            )
        self.engines.backward(tensor, bool(retain))

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """The closure, where there is one, and the update."""
        closure = kwargs.pop("closure", None)
        if kwargs:
            raise TypeError(f"optimizer.step: {', '.join(kwargs)} is nothing that an engine takes; leave it out")
        result = None if closure is None else closure()
        self.engines.of(optimizer).step()
        return result

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Any,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Any:
        """The next update of this optimizer is clipped; None, because the norm is known after it."""
        if float(norm_type) != 2.0:
            why = "a chain knows the Euclidean norm alone"
            raise ValueError(f"fabric.clip_gradients: norm_type={norm_type!r}: {why}; write norm_type=2.0")
        one = self.engines.of(optimizer)
        one.clip(norm=float(max_norm))
        one.strict = bool(error_if_nonfinite)

    def clip_gradients_value(self, module: nn.Module, optimizer: Any, clip_val: float) -> None:
        """The next update of this optimizer is clipped value by value."""
        self.engines.of(optimizer).clip(value=float(clip_val))

    def grad_norm(self, optimizer: Any) -> float | None:
        """Of an optimizer's last update: the norm of the mean gradient before a clip; None before the first."""
        return self.engines.of(optimizer).engine.get_global_grad_norm()

    # --- checkpoints
    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Whole weights on rank 0, shapes elsewhere; all ranks call it."""
        return module_state(_inner(module), self.engines)

    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Whole weights into what each rank keeps of them."""
        load_module(_inner(module), self.engines, state_dict, strict)

    def get_optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """In torch's form, whole, on rank 0; all ranks call it."""
        return self.engines.of(optimizer).engine.optimizer.state_dict()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """ "funczero", at stage 2, and "funczero_stage_0" to "funczero_stage_3"."""
        named(cls, cls.strategy_name, strategy_registry)


def _inner(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, Forward) else module


def _check_attached(scheduler: Any, optimizers: list[Any]) -> None:
    over = getattr(scheduler, "optimizer", None)
    if over is not None and not any(over is o for o in optimizers):
        raise ValueError(
            f"fabric.setup: this {type(scheduler).__name__} moves an optimizer that is not set up with it, so it would"
            " change nothing; make it over the optimizer that is"
        )
