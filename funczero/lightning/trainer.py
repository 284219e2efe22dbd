"""A strategy for `lightning.pytorch.Trainer`: the user's LightningModule in its own place, under engines of a chain."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.zero_init import Init
from funczero.lightning.engines import Engines, broadcast_buffers
from funczero.lightning.kept import KeptPrecision
from funczero.lightning.prepare import prepared
from funczero.lightning.refusals import check_optimizers, check_trainer, clip_of
from funczero.lightning.settings import Settings, join, named
from funczero.lightning.weights import load_module, module_state

NAMES = {"validate": "val"}  # of the arguments limit_*_batches


class TrainerPrecision(KeptPrecision, Precision):
    """What the Trainer calls its precision plugin for, over engines."""

    engines: Engines | None = None

    def __init__(self, inner: Precision) -> None:
        """inner: Lightning's own for the precision that was asked for."""
        self.keep(inner)

    def _there(self) -> Engines:
        assert self.engines is not None
        return self.engines

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """The gradient goes to the engines."""
        retain = kwargs.pop("retain_graph", None)
        if args or kwargs:
            named = ", ".join(kwargs) or "a gradient"
            raise TypeError(
                f"backward: the gradient of a loss is all that an engine takes, and {named} was given; multiply the"
                " loss instead, or leave it out"
            )
        self._there().backward(tensor, bool(retain))

    def optimizer_step(  # type: ignore[override]  # as Lightning's own over Fabric's
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """The closure, the hooks before a step, and the update."""
        if kwargs:
            raise TypeError(f"optimizer.step: {', '.join(kwargs)} is nothing that an engine takes; leave it out")
        result = closure()
        self._after_closure(model, optimizer)
        self._there().of(optimizer).step()
        return result

    def clip_gradients(self, optimizer: Any, clip_val: Any = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
        """The next update of this optimizer is clipped."""
        limits = clip_of(clip_val, gradient_clip_algorithm)
        if limits:
            self._there().of(optimizer).clip(**limits)


class FunczeroStrategy(DDPStrategy):
    """ZeRO for the Trainer: `Trainer(strategy=FunczeroStrategy(stage=3))`, or by name, "funczero_stage_3".

    Law: losses and weights are those of Lightning's DDPStrategy on the same rows, up to the order of sums, at every
    stage. A gradient is the sum over the backwards since the last update, and the mean over ranks. Checkpoints are
    Lightning's own files with whole weights and whole moments, which any stage, any number of processes and plain
    Lightning go on from.

    Args:
      stage: 0 nothing is sharded; 1 optimizer state; 2 and gradients; 3 and parameters.
      zero: more keys of DeepSpeed's zero_optimization block, as {"stage3_param_persistence_threshold": 0}.
      broadcast_buffers: rank 0's buffers count before every forward, as with DistributedDataParallel.
      accelerator, parallel_devices, cluster_environment, checkpoint_io: as DDPStrategy's.
      precision_plugin, process_group_backend, timeout: as DDPStrategy's.
      sums: how gradients add: "tree", "exact" or "backend", as fz.train_step's. With "exact" weights have the same bits
        on any number of processes that are dealt the same micro-batches, 2, 4, 8, ... of them an update, for Lightning
        divides each loss by the number that its process has.

    Raises:
      ValueError, TypeError, RuntimeError: what cannot be right at this stage, by name, when training is set up.
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
        precision_plugin: Any = None,
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
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @property
    def precision_plugin(self) -> Any:
        """Lightning's own, kept inside of one that hands gradients to engines."""
        if self._precision_plugin is None:
            self._precision_plugin = TrainerPrecision(Precision())
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        kept = plugin if plugin is None or isinstance(plugin, TrainerPrecision) else TrainerPrecision(plugin)
        self._precision_plugin = kept
        if kept is not None:
            self.settings = self.settings._replace(precision=str(kept.precision), scaler=kept.scaler).checked()

    # --- setting up
    def setup_environment(self) -> None:
        """Joins the world; what a launcher of Lightning's leaves out of the environment is written there."""
        super().setup_environment()
        join(self.root_device, self.global_rank, self.world_size)

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """At stage 3 what configure_model builds is cut while it is built, so that no rank holds the model."""
        with Init(enabled=self.settings.stage == 3):
            yield

    def setup(self, trainer: Any) -> None:
        """The module on its device, its optimizers, and their engines."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module, fits, stage = self._there(), trainer.state.fn == TrainerFn.FITTING, self.settings.stage
        check_trainer(trainer, module, self, fits)
        self.model = module
        if fits or not self.engines.hold(module):
            prepared(module, self.root_device, stage, self.precision_plugin.buffers())
            self.engines = Engines(self.settings)
            if fits:
                self.setup_optimizers(trainer)
                check_optimizers(self.optimizers)
                self.optimizers = [*self.engines.add(module, self.optimizers)]
            elif stage == 3:
                self.engines.add(module, [])
        else:
            broadcast_buffers([module])
        self.precision_plugin.engines = self.engines
        self.setup_precision_plugin()

    def _there(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    # --- steps
    def _under(self, context: Any, name: str, *args: Any, inside: bool = True, **kwargs: Any) -> Any:
        module = self._there()
        if self.buffers_from_first and module.trainer.state.fn == TrainerFn.FITTING:
            broadcast_buffers([module])
        with context:
            step = getattr(module, name)
            return self.engines.inside(module, step, *args, **kwargs) if inside else step(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's, in which parameters can be read; with manual optimization in the modules' own forwards alone."""
        inside = self._there().automatic_optimization
        return self._under(self.precision_plugin.train_step_context(), "training_step", *args, inside=inside, **kwargs)

    def _evaluated(self, context: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.settings.stage < 3:
            return self._under(context, name, *args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():  # inference tensors have no version counters
            return self._under(context, name, *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's."""
        return self._evaluated(self.precision_plugin.val_step_context(), "validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's."""
        return self._evaluated(self.precision_plugin.test_step_context(), "test_step", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's."""
        return self._evaluated(self.precision_plugin.predict_step_context(), "predict_step", *args, **kwargs)

    # --- where a loop starts
    def on_train_start(self) -> None:
        """Refuse ranks with unlike numbers of batches: every update sends."""
        self._check_even("train", self._there().trainer.fit_loop.max_batches)

    def on_validation_start(self) -> None:
        """Refuse them where a forward sends."""
        trainer = self._there().trainer
        fits = trainer.state.fn == TrainerFn.FITTING
        loop = trainer.fit_loop.epoch_loop.val_loop if fits else trainer.validate_loop
        if self.settings.stage == 3 or fits and self.buffers_from_first:
            self._check_even("validate", loop.max_batches)

    def on_test_start(self) -> None:
        """Refuse them where a forward sends."""
        if self.settings.stage == 3:
            self._check_even("test", self._there().trainer.test_loop.max_batches)

    def on_predict_start(self) -> None:
        """Refuse them where a forward sends."""
        if self.settings.stage == 3:
            self._check_even("predict", self._there().trainer.predict_loop.max_batches)

    def _check_even(self, loop: str, batches: Any) -> None:
        said = ranks.gather_texts(str(batches))
        odd = next((r for r, other in enumerate(said) if other != said[0]), None)
        if odd is not None:
            raise ValueError(
                f"FunczeroStrategy: {loop}: rank 0 has {said[0]} batches and rank {odd} has {said[odd]}, but all ranks"
                f" compute together (stage {self.settings.stage}); deal as many to each, as with drop_last, or"
                f" limit_{NAMES.get(loop, loop)}_batches"
            )

    def grad_norm(self, optimizer: Any = None) -> float | None:
        """Of an optimizer's last update: the norm of the mean gradient before a clip; None before the first."""
        one = self.engines.of(self.optimizers[0] if optimizer is None else optimizer)
        return one.engine.get_global_grad_norm()

    # --- checkpoints
    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: weights go into the masters."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on rank 0, shapes elsewhere; all ranks call it."""
        return module_state(self._there(), self.engines)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Whole weights into what each rank keeps of them."""
        load_module(self._there(), self.engines, checkpoint["state_dict"], strict)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """In torch's form, whole, on rank 0; all ranks call it."""
        return self.engines.of(optimizer).engine.optimizer.state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """From this strategy's checkpoint or from plain Lightning's."""
        saved = checkpoint["optimizer_states"]
        if len(saved) != len(self.optimizers):
            raise ValueError(
                f"load_checkpoint: the checkpoint has {len(saved)} optimizers, and the module {len(self.optimizers)};"
                " return as many from configure_optimizers as it was saved with"
            )
        for optimizer, state in zip(self.optimizers, saved, strict=True):
            optimizer.load_state_dict(state)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The file; one on this host is mapped, so that its ranks do not each read all of it into memory."""
        here = isinstance(checkpoint_path, str | Path) and Path(checkpoint_path).is_file()
        if here and type(self.checkpoint_io) is TorchCheckpointIO:
            return torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def teardown(self) -> None:
        """Plugins end. The module stays with its engines, so that a checkpoint can still be saved and tests run."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """ "funczero", at stage 2, and "funczero_stage_0" to "funczero_stage_3"."""
        named(cls, cls.strategy_name, strategy_registry)
