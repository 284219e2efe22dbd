"""`deepspeed.checkpoint.utils`: tensors that are saved alone, without the buffer that they are views of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def clone_tensors_for_torch_save(item: Any, device: Any = torch.device("cpu")) -> Any:  # noqa: B008
    """A value with its tensors cloned on a device, whatever lists, tuples and dicts they are in."""
    if isinstance(item, Tensor):
        return item.detach().clone() if item.device == torch.device(device) else item.detach().to(device)
    if isinstance(item, dict):
        return type(item)({k: clone_tensors_for_torch_save(v, device) for k, v in item.items()})
    if isinstance(item, (list, tuple)):
        parts = [clone_tensors_for_torch_save(v, device) for v in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    return item
