"""What a strategy is told: a stage, keys of DeepSpeed's zero_optimization block, a precision by Lightning's name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from funczero.core.types import Transform
from funczero.deepspeed.config.resolve import resolve
from funczero.deepspeed.config.resolved import Config
from funczero.layout.processes import default_device, world_size
from funczero.lightning.clip import asked_clip
from funczero.transforms.loss_scale import scale_loss

FLOOR = 2.0**-24  # of a loss scale; torch.amp.GradScaler has none
HALF: dict[str, dict[str, Any]] = {
    "bf16-true": {"bf16": {"enabled": True}},
    "16-true": {"fp16": {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}},
}
SUMS = "tree", "exact", "backend"
KNOWN = "32-true", "bf16-mixed", "16-mixed", *HALF


class Settings(NamedTuple):
    """Of one strategy."""

    stage: int
    zero: Mapping[str, Any]
    precision: str = "32-true"
    scaler: tuple[float, int] | None = None  # of mixed precision in float16: first scale, updates until it doubles
    sums: str = "tree"  # how gradients add, as train_step's

    def checked(self) -> Settings:
        """Refuse what does not exist.

        Raises:
          ValueError, TypeError: by name.
        """
        if isinstance(self.stage, bool) or self.stage not in (0, 1, 2, 3):
            raise ValueError(f"FunczeroStrategy: stage={self.stage!r} does not exist; write 0, 1, 2 or 3")
        if "stage" in self.zero:
            raise ValueError("FunczeroStrategy: zero= names the stage, too; write stage= alone")
        if self.sums not in SUMS:
            raise ValueError(f"FunczeroStrategy: sums={self.sums!r} is none of {', '.join(SUMS)}; write one of them")
        check_precision(self.precision)
        return self

    def config(self) -> Config:
        """As an engine reads it: one window holds whatever backwards came since the last update."""
        page = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0,
            "steps_per_print": float("inf"),
            "zero_optimization": {**self.zero, "stage": self.stage},
            "funczero": {"sums": self.sums},
            **HALF.get(self.precision, {}),
        }
        return resolve(page, world_size())

    def between(self) -> tuple[Transform, ...]:
        """What stands between the mean and the optimizer."""
        if self.scaler is not None:
            first, window = self.scaler
            return scale_loss(first, 1.0, True, window, 1, FLOOR), asked_clip()
        return (asked_clip(),)


def named(strategy: type, name: str, registry: Any) -> None:
    """A strategy in a registry of Lightning's, by its name at stage 2, and by one for each stage."""
    registry.register(name, strategy, description="ZeRO-2 as a chain of funczero", override=True)
    for stage in range(4):
        what = f"ZeRO-{stage} as a chain of funczero"
        registry.register(f"{name}_stage_{stage}", strategy, description=what, stage=stage, override=True)


def check_precision(precision: str) -> None:
    """Refuse a precision that no chain has.

    Raises:
      ValueError: with what to write.
    """
    if precision not in KNOWN:
        why = "masters are float32 here" if precision.startswith("64") else "no chain has it"
        raise ValueError(f"FunczeroStrategy: precision={precision!r}: {why}; write one of {', '.join(KNOWN)}")


def join(device: torch.device, rank: int, size: int) -> None:
    """What Lightning's own launcher leaves out of the environment is written there; the device must be this process's.

    Raises:
      ValueError: see check_device.
    """
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(size))
    check_device(device)


def check_device(device: torch.device) -> None:
    """Refuse a device of the loop that is not this process's.

    Raises:
      ValueError: they differ.
    """
    own = default_device()
    if own != device:
        raise ValueError(
            f"FunczeroStrategy: the loop runs on {device}, but this process's own device is {own}, where the chain"
            " keeps its state; choose the accelerator that is there, and devices by their number, or hide the others"
            " (CUDA_VISIBLE_DEVICES)"
        )
