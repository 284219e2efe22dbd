"""Whole parameters by name, from the masters, as a module's state_dict shows them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from funczero.core.types import TrainState
from funczero.step.step import Step


def whole_values(step: Step, state: TrainState, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Whole parameters from the masters, in the compute dtype unless another is given. A collective."""
    dtype, whole, once = dtype or step.policy.compute, step.params(state), dict[int, Tensor]()
    return {n: once.setdefault(id(x), x.to(dtype)) for n, x in whole.items()}


def module_state(
    step: Step, state: TrainState, module: nn.Module, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A module's state_dict in its own order: whole parameters from the masters, copies of buffers. A collective."""
    whole, dtype = step.params(state), dtype or step.policy.compute
    out: dict[str, Tensor] = {}
    for path, m in module.named_modules(remove_duplicate=False):
        at = f"{path}." if path else ""
        out.update({at + n: whole[at + n].to(dtype) for n, p in m._parameters.items() if p is not None})
        lasting = ((n, b) for n, b in m._buffers.items() if n not in m._non_persistent_buffers_set)
        out.update({at + n: b.detach().clone() for n, b in lasting if b is not None})
    return out
