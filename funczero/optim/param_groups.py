"""torch's param groups as a partition of optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from funczero.core.number import kind
from funczero.transforms.partition import Partition, partition


def param_groups(module: nn.Module, groups: Sequence[Mapping[str, Any]], make: Callable[..., Any]) -> Partition:
    """A partition with one optimizer for each of torch's param groups, `make(**options)` of the options of each.

    Args:
      module: whose parameters they are, by the names that fz.stateless gives them.
      groups: as torch's classes take them, or an optimizer's own `param_groups`: {"params": [parameters], options}.
      make: the options of a group -> its optimizer, as `lambda lr, betas, **_: fz.adamw(lr, *betas)`.

    Raises:
      TypeError: a group is none.
      ValueError: a parameter is not the module's, or in two groups; by its group's number.

    Source: torch.optim.Optimizer(params).

    >>> import funczero as fz
    >>> model = nn.Linear(2, 1)
    >>> groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
    >>> both = fz.param_groups(model, groups, lambda weight_decay: fz.adamw(1e-3, weight_decay=weight_decay))
    >>> [str(part) for part in both.parts]
    ['adamw(group 0)', 'adamw(group 1)']
    """
    names: dict[int, set[str]] = {}
    for name, own in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(own), set()).add(name)
    seen: dict[int, int] = {}
    parts = []
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(
                f"param_groups: group {i} is {kind(group)}, not a dict with 'params'; write it as torch has it"
            )
        given = group["params"]
        mine = [given] if isinstance(given, Tensor) else [*given]
        for p in mine:
            if id(p) not in names:
                raise ValueError(
                    f"param_groups: group {i} has {kind(p)} that is no parameter of the module; leave it out"
                )
            if seen.setdefault(id(p), i) != i:
                which = sorted(names[id(p)])[0]
                raise ValueError(f"param_groups: {which!r} is in groups {seen[id(p)]} and {i}; leave it in one")
        options = {k: x for k, x in group.items() if k not in ("params", "param_names")}
        parts.append((_among(set().union(*(names[id(p)] for p in mine)), i), make(**options)))
    return partition(parts)


def _among(names: set[str], i: int) -> Callable[[str], bool]:
    taken = lambda path: path in names
    taken.__name__ = f"group {i}"
    return taken
