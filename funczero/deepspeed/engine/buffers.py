"""A module's buffers out of a checkpoint: every name and shape is compared before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from absl import logging
from torch import Tensor, nn

from funczero.checkpoint import CheckpointError
from funczero.deepspeed.engine import ranks


def lasting(module: nn.Module) -> set[str]:
    """Names of the buffers that a state_dict has."""
    found = (
        (f"{path}.{n}".lstrip("."), n in m._non_persistent_buffers_set)
        for path, m in module.named_modules(remove_duplicate=False)
        for n, b in m._buffers.items()
        if b is not None
    )
    return {name for name, passing in found if not passing}


def fitting(module: nn.Module, beside: Mapping[str, Any], strict: bool) -> dict[str, Tensor]:
    """The buffers of a checkpoint that a module has, by name.

    Args:
      beside: what an engine saved beside its state; of a plain chain nothing.
      strict: as of load_state_dict; False: names that only one side has are warned of.

    Raises:
      CheckpointError: a shape differs, or with strict a name.
    """
    own = dict(module.named_buffers(remove_duplicate=False))
    saved: dict[str, Tensor] = beside.get("buffers", {})
    for name, x in saved.items():
        if name in own and own[name].shape != x.shape:
            raise CheckpointError(
                f"load_checkpoint: buffer {name!r} has shape {tuple(x.shape)} in the checkpoint, and "
                f"{tuple(own[name].shape)} in the module; build the module as it was"
            )
    lacking = sorted(lasting(module) - set(saved))
    odd = sorted(n for n in beside.get("persistent", saved) if n not in own)
    if "buffers" in beside and strict and (lacking or odd):
        side = f"lacks buffer {lacking[0]!r}" if lacking else f"holds buffer {odd[0]!r}, which the module lacks"
        raise CheckpointError(
            f"load_checkpoint: the checkpoint {side}; build the module as it was, or write load_module_strict=False"
        )
    if (lacking or odd) and ranks.get_rank() == 0:
        logging.warning(
            "load_checkpoint: buffers stay as the module has them: %s; buffers that nobody takes: %s",
            ", ".join(lacking) or "none",
            ", ".join(odd) or "none",
        )
    return {n: x for n, x in saved.items() if n in own}
