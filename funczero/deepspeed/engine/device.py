"""`deepspeed.accelerator`: what user code asks about its device."""

from __future__ import annotations

from typing import Any

import torch

from funczero.layout.processes import default_device


class Accelerator:
    """The device of this process by torch's own names; what is not here is torch.cuda's, torch.xpu's, ..."""

    def device_name(self, device_index: int | None = None) -> str:
        """ "cpu", or "cuda" or "cuda:1"."""
        kind = default_device().type
        return kind if device_index is None or kind == "cpu" else f"{kind}:{device_index}"

    def current_device(self) -> Any:
        """Its index; the CPU's is 0."""
        return default_device().index or 0

    def current_device_name(self) -> str:
        """With its index."""
        return str(default_device())

    def device_count(self) -> int:
        """Accelerators here; 1 on a machine with a CPU alone."""
        return torch.accelerator.device_count() or 1

    def is_available(self) -> bool:
        """Always: a CPU will do."""
        return True

    def is_bf16_supported(self) -> bool:
        """Everywhere, if not fast."""
        return True

    is_fp16_supported = is_bf16_supported

    def communication_backend_name(self) -> str:
        """gloo, nccl, ..."""
        return torch.distributed.get_default_backend_for_device(default_device().type)

    def synchronize(self, device_index: int | None = None) -> None:
        """Until the device has done what it was asked."""
        if default_device().type != "cpu":
            torch.accelerator.synchronize()

    def set_device(self, device_index: int) -> None:
        """Of this process."""
        if default_device().type != "cpu":
            torch.accelerator.set_device_index(device_index)

    def empty_cache(self) -> None:
        """Give unused memory back."""
        if default_device().type != "cpu":
            self._backend().empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes on the device; 0 on a CPU."""
        return 0 if default_device().type == "cpu" else self._backend().memory_allocated(device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The most so far; 0 on a CPU."""
        return 0 if default_device().type == "cpu" else self._backend().max_memory_allocated(device_index)

    def manual_seed_all(self, seed: int) -> None:
        """Of all generators."""
        torch.manual_seed(seed)

    def _backend(self) -> Any:
        return getattr(torch, default_device().type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(self._backend(), name):
            raise AttributeError(f"get_accelerator().{name}: torch.{default_device().type} has nothing of that name")
        return getattr(self._backend(), name)


def get_accelerator() -> Accelerator:
    """The accelerator of this process, or its CPU."""
    return Accelerator()
