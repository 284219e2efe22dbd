"""`deepspeed.runtime.zero.partition_parameters`: names that programs read while a model is built under zero.Init.

zero.Init replaces no constructor of torch, so a tensor keeps the dtype that the model asks for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funczero.deepspeed.engine.device import get_accelerator as get_accelerator
from funczero.deepspeed.zero import GatheredParameters as GatheredParameters
from funczero.deepspeed.zero import Init as Init
from funczero.deepspeed.zero import ZeroParamStatus as ZeroParamStatus
from funczero.deepspeed.zero import register_external_parameter as register_external_parameter

_orig_torch_arange = torch.arange


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., Tensor], target_fp_dtype: torch.dtype, target_device: torch.device | str | None = None
) -> Callable[..., Tensor]:
    """A constructor whose floating tensors are of a dtype and, where none is asked for, on a device."""

    def made(*args: object, **kwargs: object) -> Tensor:
        if kwargs.get("device") is None and target_device is not None:
            kwargs["device"] = target_device
        out = fn(*args, **kwargs)
        if out.is_floating_point():
            out.data = out.data.to(target_fp_dtype)  # it stays a leaf
        return out

    return made
