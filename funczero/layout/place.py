"""A place: which memory a part lies in. The device is the one that exists, host memory and disk will be others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Place(Protocol):
    """A kind of memory, as a frozen dataclass: the same value on every rank, whichever device a rank has."""

    def empty(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """New memory for n elements here.

        Args:
          device: the rank's own, which computes with what lies here; meta for a form without memory.
        """


@dataclass(frozen=True)
class Device:
    """Memory of the mesh's device, where forwards, backwards and updates read it."""

    def empty(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of the device itself.

        >>> DEVICE.empty(3, torch.float32, torch.device("meta")).shape
        torch.Size([3])
        """
        return torch.empty(n, dtype=dtype, device=device)


DEVICE = Device()
