"""What user code asks an engine about its config and its run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from funczero.deepspeed.config.triad import NAMES, Triad
from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.loader import Loader
from funczero.deepspeed.engine.loop import Loop
from funczero.step.train_step import donate
from funczero.transforms.loss_scale import ScaleLoss


class Facts(Loop):
    """An engine's answers."""

    # --- of the config
    def get_batch_info(self) -> tuple[int, int, int]:
        """Rows of an update, rows of a micro-batch on a rank, micro-batches of an update."""
        return tuple(self.config_.triad)  # type: ignore[return-value]

    @property
    def config(self) -> dict[str, Any]:
        """Every resolved value in blocks, as the file has them: a copy."""
        return self.config_.nested()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Another number of micro-batches an update, from the next window on.

        Raises:
          ValueError: the rows do not divide by those of a micro-batch on all ranks.
          RuntimeError: a window is open.

        Source: DeepSpeed 0.19.8, set_train_batch_size.
        """
        micro, world = self.config_.triad.micro, self.config_.world.size
        if not isinstance(train_batch_size, int) or train_batch_size < 1 or train_batch_size % (micro * world):
            what = f"{train_batch_size} rows do not divide by {micro} rows a micro-batch on {world} ranks"
            raise ValueError(f"engine.set_train_batch_size: {what}; write a multiple of {micro * world}")
        self._set_triad("set_train_batch_size", Triad(train_batch_size, micro, train_batch_size // (micro * world)))

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Other rows in a micro-batch; as many micro-batches an update as before.

        Source: DeepSpeed 0.19.8, set_train_micro_batch_size.
        """
        if not isinstance(micro_batch_size, int) or micro_batch_size < 1:
            raise ValueError(
                f"engine.set_train_micro_batch_size: {micro_batch_size} is no number of rows; write 1 or more"
            )
        if self.training_dataloader is not None:
            why = "the loader of initialize(training_data=...) deals the rows of the config"
            raise RuntimeError(f"engine.set_train_micro_batch_size: {why}; write it into the config")
        steps = self.config_.triad.steps
        triad = Triad(micro_batch_size * steps * self.config_.world.size, micro_batch_size, steps)
        self._set_triad("set_train_micro_batch_size", triad)

    def _set_triad(self, call: str, triad: Triad) -> None:
        self.check_whole(f"engine.{call}")
        if self.window_length() or self._backwards:
            why = "the window of micro-batches is open; call it right after an update"
            raise RuntimeError(f"engine.{call}: {why}")
        values = {name: self.config_.values[name]._replace(value=x) for name, x in zip(NAMES, triad, strict=True)}
        config = self.config_._replace(triad=triad, values={**self.config_.values, **values})
        if triad.steps != self._k and self._made is not None:
            step, state = self._made(config), self._state
            scale = step.state_of(state, ScaleLoss)
            if scale is not None:
                state = step.with_state(state, scale._replace(weight=torch.full_like(scale.weight, triad.weight)))
            donating = donate(step)
            self._left = f"engine.{call}"
            self.train_step, self._step, self._k = step, donating, triad.steps
            self.state = state
            self._left = ""
        self.config_ = config

    def train_batch_size(self) -> int:
        """Rows of an update."""
        return self.config_.triad.batch

    def train_micro_batch_size_per_gpu(self) -> int:
        """Rows of a micro-batch on a rank."""
        return self.config_.triad.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of an update."""
        return self.config_.triad.steps

    def gradient_clipping(self) -> float:
        """Largest norm of a mean gradient; 0: off."""
        return self.config_.value("gradient_clipping")

    def zero_optimization_stage(self) -> int:
        """0 to 3."""
        return self.config_.value("zero_optimization.stage")

    def zero_optimization(self) -> bool:
        """Is anything sharded?"""
        return self.zero_optimization_stage() > 0

    def loss_scale(self) -> float:
        """The config's static scale; 0 for a dynamic one, which is optimizer.cur_scale."""
        return self.config_.value("fp16.loss_scale") if self.fp16_enabled() else 1.0

    def dynamic_loss_scale(self) -> bool:
        """Does the scale move?"""
        return self.fp16_enabled() and not self.config_.value("fp16.loss_scale")

    def fp16_enabled(self) -> bool:
        """Are forward and backward in float16?"""
        return self.config_.value("fp16.enabled")

    def bfloat16_enabled(self) -> bool:
        """In bfloat16?"""
        return self.config_.value("bf16.enabled")

    def wall_clock_breakdown(self) -> bool:
        """Are forward, backward and step timed and printed?"""
        return self._breakdown.times

    def steps_per_print(self) -> int | None:
        """Updates between two printed lines."""
        return self.config_.value("steps_per_print")

    def get_data_parallel_rank(self) -> int:
        """This rank among those that share the batch: all of them."""
        return ranks.get_rank()

    def get_tensor_parallel_rank(self) -> int:
        """There is no tensor parallelism here."""
        return 0

    # --- of the run
    @property
    def skipped_steps(self) -> int:
        """Of these, the updates that were skipped."""
        return self.global_steps - int(self._state.updates)

    def was_step_applied(self) -> bool:
        """Did the last step() apply an update?"""
        return self._updated

    def get_global_grad_norm(self) -> float | None:
        """Of the last update's mean gradient, before the clip; inf when it was skipped for an overflow."""
        return None if self.metrics is None else float(self.metrics.grad_norm)

    def get_lr(self) -> list[float]:
        """By group."""
        self._check_trains("get_lr")
        return [g["lr"] for g in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """By group: betas, or momentum."""
        self._check_trains("get_mom")
        return [g.get("betas", g.get("momentum")) for g in self.optimizer.param_groups]

    # --- of the module
    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's, under "module."; at stage 3 they have shapes and no values."""
        return self.module.named_parameters(f"{prefix}.module" if prefix else "module", recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The module's, under "module."."""
        return self.module.named_buffers(f"{prefix}.module" if prefix else "module", recurse, remove_duplicate)

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Any = None,
        num_local_io_workers: int | None = None,
    ) -> Any:
        """A loader as initialize(training_data=...) gives, dealt by rank, with the engine's position.

        Args:
          batch_size, data_sampler: with one of them torch's own loader.
        """
        workers = num_local_io_workers or 0
        if batch_size is None and data_sampler is None and route == "train":
            return Loader(self, dataset, collate_fn, num_workers=workers)
        shuffle, rows = route == "train", batch_size or self.train_micro_batch_size_per_gpu()
        sampler = data_sampler or DistributedSampler(dataset, ranks.get_world_size(), ranks.get_rank(), shuffle=shuffle)
        return DataLoader(dataset, rows, sampler=sampler, collate_fn=collate_fn, num_workers=workers)

    def destroy(self) -> None:
        """The module's own forwards again; memory goes with the engine."""
        self._holder.release()

    def empty_partition_cache(self) -> None:
        """Nothing: what is gathered is dropped after its use."""

    def collect_python_gc(self) -> None:
        """Nothing: the collector is never switched off."""
