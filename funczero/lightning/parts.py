"""What belongs to which optimizer: each of several optimizers gets an engine over its own part of a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from funczero.deepspeed.engine.held import named


class Part(nn.Module):
    """Some submodules of a module under the names that they have there; they are not copied."""


def parts_of(root: nn.Module, optimizers: Sequence[Any], stage: int) -> list[nn.Module]:
    """For each optimizer the module that its engine runs: all of it for one, of several each one's own part.

    Raises:
      ValueError: an optimizer's parameter is none of the module's, or is another optimizer's too; at stage 3, one owns
        a part of a submodule alone.
    """
    names = {id(p): n for n, p in reversed(named(root).items())}
    owner: dict[int, int] = {}
    for i, o in enumerate(optimizers):
        for p in (p for g in o.param_groups for p in g["params"]):
            if id(p) not in names:
                raise ValueError(
                    f"optimizer {i} ({type(o).__name__}): its parameter of shape {tuple(p.shape)} is not one of the"
                    " module's, so nothing would train it; make the optimizer from the module's parameters"
                )
            if owner.setdefault(id(p), i) != i:
                raise ValueError(
                    f"optimizers {owner[id(p)]} and {i} both have parameter {names[id(p)]!r}, and its gradient can only"
                    " be one optimizer's here; give it to one of them"
                )
    if len(optimizers) == 1:
        return [root]
    return [_part(root, {p for p, owning in owner.items() if owning == i}, i, stage) for i in range(len(optimizers))]


def _part(root: nn.Module, own: set[int], i: int, stage: int) -> nn.Module:
    part = Part()
    todo: list[tuple[str, nn.Module]] = [("", root)]
    while todo:
        path, m = todo.pop(0)
        inside = {id(p) for p in m.parameters()}
        if path and inside and inside <= own:
            above, last = _above(part, path)
            above.add_module(last, m)
        elif inside & own:
            for k, p in m._parameters.items():
                if p is not None and id(p) in own:
                    if stage == 3:
                        raise ValueError(
                            f"optimizer {i} has {f'{path}.{k}'.lstrip('.')!r} but not all parameters of"
                            f" {path or 'the module'!r}, and at stage 3 a submodule is opened by one engine; write one"
                            " optimizer with parameter groups, or stage 2"
                        )
                    above, last = _above(part, f"{path}.{k}".lstrip("."))
                    above.register_parameter(last, p)
            todo += [(f"{path}.{k}".lstrip("."), child) for k, child in m.named_children()]
    return part


def _above(part: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Where a name of the whole module goes: empty modules on the way are made."""
    *way, last = path.split(".")
    for name in way:
        if name not in part._modules:
            part.add_module(name, Part())
        part = part.get_submodule(name)
    return part, last
