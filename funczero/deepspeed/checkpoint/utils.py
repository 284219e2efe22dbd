"""`deepspeed.checkpoint.utils`: tensors that are saved alone, without the buffer that they are views of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def clone_tensors_for_torch_save(item: Any, device: Any = torch.device("cpu")) -> Any:  # noqa: B008
    """A value with its tensors cloned on a device, whatever lists, tuples and dicts they are in.

    Tensors that are one stay one, so that tied weights are still found by who saves them.
    """
    return _cloned(item, torch.device(device), {})


def _cloned(item: Any, device: torch.device, seen: dict[Any, Tensor]) -> Any:
    if isinstance(item, Tensor):
        key = item.data_ptr(), item.dtype, item.shape, item.stride(), item.device, item.is_conj(), item.is_neg()
        if key not in seen or not item.numel():
            seen[key] = item.detach().to(device, copy=True)
        return seen[key]
    if isinstance(item, dict):
        return type(item)({k: _cloned(v, device, seen) for k, v in item.items()})
    if isinstance(item, (list, tuple)):
        parts = [_cloned(v, device, seen) for v in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    return item
