"""What programs tell DeepSpeed about their modules so that it gathers in time; here it follows from the units."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Nothing: a parameter outside of the units is open in the whole forward, and one inside of another unit refuses by
    name when it is read.
    """


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Nothing, as register_external_parameter."""


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: Sequence[type | str]) -> list[nn.Module]:
    """The modules of these classes. There is nothing to set: a unit is gathered whole, with all modules in it.

    Args:
      leaf_module_classes: classes, or their names.

    Raises:
      ValueError: the model has none of them.

    Source: DeepSpeed 0.19.8, set_z3_leaf_modules.
    """
    names = {c if isinstance(c, str) else c.__name__ for c in leaf_module_classes}
    found = [
        m for m in model.modules() if type(m).__name__ in names or f"{type(m).__module__}.{type(m).__name__}" in names
    ]
    if not found:
        raise ValueError(f"set_z3_leaf_modules: the model has no module of {sorted(names)}; name a class that it has")
    return found


def unset_z3_leaf_modules(model: nn.Module, leaf_module_classes: Sequence[type | str]) -> list[nn.Module]:
    """The modules of these classes; there was nothing set."""
    return set_z3_leaf_modules(model, leaf_module_classes)
