"""What user code asks an engine about its config."""
from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from funczero.deepspeed.config.resolve import Config
from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.loader import Loader


class Facts:
    """An engine's answers, from its resolved config."""

    config_: Config
    _leaves: Any

    def get_batch_info(self) -> tuple[int, int, int]:
        """Rows of an update, rows of a micro-batch on a rank, micro-batches of an update."""
        return tuple(self.config_.triad)  # type: ignore[return-value]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved values by their dotted keys."""
        return {path: v.value for path, v in self.config_.values.items()}

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

    def steps_per_print(self) -> int | None:
        """Updates between two printed lines."""
        return self.config_.value("steps_per_print")

    def get_data_parallel_rank(self) -> int:
        """This rank among those that share the batch: all of them."""
        return ranks.get_rank()

    def get_tensor_parallel_rank(self) -> int:
        """There is no tensor parallelism here."""
        return 0

    def deepspeed_io(
        self: Any, dataset: Any, batch_size: int | None = None, route: str = "train", pin_memory: bool = True, data_sampler: Any = None, collate_fn: Any = None,
        num_local_io_workers: int | None = None,
    ) -> Any:  # fmt: skip
        """A loader as initialize(training_data=...) gives: dealt by rank, with the engine's position; with batch_size or a sampler torch's own."""
        workers = num_local_io_workers or 0
        if batch_size is None and data_sampler is None and route == "train":
            return Loader(self, dataset, collate_fn, num_workers=workers)
        sampler = data_sampler or DistributedSampler(dataset, ranks.get_world_size(), ranks.get_rank(), shuffle=route == "train")
        return DataLoader(dataset, batch_size or self.train_micro_batch_size_per_gpu(), sampler=sampler, collate_fn=collate_fn, num_workers=workers)

    def destroy(self) -> None:
        """The module's own forwards again; memory goes with the engine."""
        self._leaves.release()

    def empty_partition_cache(self) -> None:
        """Nothing: what is gathered is dropped after its use."""

    def collect_python_gc(self) -> None:
        """Nothing: the collector is never switched off."""
