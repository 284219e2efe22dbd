"""`deepspeed.moe.utils`: questions about experts that are spread over ranks, of which there are none."""

from __future__ import annotations

from typing import Any

from torch import nn


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """(False, 0): no module here spreads its experts."""
    return False, 0


def is_moe_param(param: Any) -> bool:
    """False: every parameter is replicated over ranks, or sharded over all of them."""
    return False


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | tuple[dict[str, Any], ...] | list[dict[str, Any]], max_group_size: float = 178956971
) -> list[dict[str, Any]]:
    """The groups as they are: there is nothing to split off."""
    return [param_groups] if isinstance(param_groups, dict) else list(param_groups)
