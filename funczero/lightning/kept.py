"""What stays of one of Lightning's precision plugins: its autocast, its default dtype, how it casts a batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from funczero.lightning.settings import check_precision

BUFFERS = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
PLAIN = "Precision", "MixedPrecision", "HalfPrecision"


class KeptPrecision:
    """A precision plugin around another: forwards run under that one, masters stay float32, and the chain scales.

    16-mixed and bf16-mixed are torch's autocast over float32 parameters. 16-true and bf16-true compute in parameters of
    that dtype, which the chain casts from float32 masters at every update.
    """

    inner: Any
    precision: Any
    scaler: tuple[float, int] | None

    def keep(self, inner: Any) -> None:
        """inner: one of Lightning's.

        Raises:
          ValueError, TypeError: no chain has it.
        """
        check_precision(str(inner.precision))
        if type(inner).__name__ not in PLAIN:
            raise TypeError(
                f"FunczeroStrategy: the precision plugin {type(inner).__name__} does more than a chain knows of; write"
                " precision= with one of Lightning's names"
            )
        self.inner, self.precision, self.scaler = inner, inner.precision, scaler_of(getattr(inner, "scaler", None))

    def convert_module(self, module: nn.Module) -> nn.Module:
        """As it is: the engine casts, from masters that have lost nothing."""
        return module

    def buffers(self) -> torch.dtype | None:
        """The dtype that Lightning would give to floating buffers; None: as they are."""
        return BUFFERS.get(str(self.precision))

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Parameters are born in float32."""
        return nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Parameters are born in float32."""
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """The inner one's."""
        return self.inner.forward_context()

    def convert_input(self, data: Any) -> Any:
        """The inner one's."""
        return self.inner.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        """The inner one's."""
        return self.inner.convert_output(data)


def scaler_of(scaler: Any) -> tuple[float, int] | None:
    """What a chain needs of a torch.amp.GradScaler: its first scale, and the updates until it doubles.

    Raises:
      ValueError: it grows or falls by another factor than two.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    factors = scaler.get_growth_factor(), scaler.get_backoff_factor()
    if factors != (2.0, 0.5):
        why = f"it grows by {factors[0]} and falls by {factors[1]}, and a chain's scale doubles and halves"
        raise ValueError(f"FunczeroStrategy: GradScaler: {why}; leave growth_factor and backoff_factor out")
    return float(scaler.get_scale()), int(scaler.get_growth_interval())
