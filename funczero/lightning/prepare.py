"""A module before its engines: what lies on meta gets values, and all ranks have rank 0's, on their device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from funczero.comm.launch import broadcast
from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.held import Closed, named
from funczero.deepspeed.engine.zero_init import close, reopen

KEPT = "funczero_engines"  # in a module's __dict__


def prepared(root: nn.Module, device: torch.device, stage: int, dtype: torch.dtype | None = None) -> None:
    """Rank 0's values on this process's device; what earlier engines hold is given back to the module before.

    Args:
      stage: at 3, parameters that lie on meta are cut as soon as they have values.
      dtype: of floating buffers; None: as they are.
    """
    given_back(root, stage == 3)
    _materialised(root, device, stage == 3)
    closed = [p for p in named(root).values() if isinstance(p, Closed)]
    if stage < 3:
        for p in dict.fromkeys(closed):
            reopen(p)
    if not closed or stage < 3:
        root.to(device)
    for b in root.buffers():
        b.data = b.data.to(device, dtype if dtype is not None and b.is_floating_point() else b.dtype)
    ranks.broadcast_module(root)


def given_back(root: nn.Module, cut: bool) -> None:
    """Engines of an earlier loop let go of the module's parameters.

    Raises:
      RuntimeError: the engine of a sharded parameter is gone, and its values with it.
    """
    engines: dict[int, Any] = {}
    for name, p in named(root).items():
        home = getattr(p, "home", None)
        if home is None or home[0] is None:
            continue
        engine = home[0]()
        if engine is not None:
            engines[id(engine)] = engine
        elif isinstance(p, Closed):
            why = "belonged to a loop at stage 3 that is gone, and its values with it"
            raise RuntimeError(f"parameter {name!r} {why}; keep the Trainer, or load a checkpoint into a new module")
        else:
            p.__class__ = nn.Parameter
            del p.home  # type: ignore[attr-defined]
    for engine in engines.values():
        engine.give_back(cut)
    root.__dict__.pop(KEPT, None)


class Kept:
    """Engines that live as long as a module whose values they have; a copy of the module has none."""

    def __init__(self, engines: Sequence[Any] = ()) -> None:
        """engines: over the module's parts."""
        self.engines = tuple(engines)

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


def keep(root: nn.Module, engines: Sequence[Any]) -> None:
    """The module keeps its engines alive until another loop takes it over."""
    before = root.__dict__.get(KEPT, Kept()).engines
    root.__dict__[KEPT] = Kept((*before, *engines))


def _materialised(root: nn.Module, device: torch.device, sharded: bool) -> None:
    """Values for what lies on meta, by each module's own reset_parameters, children first; ties stay tied."""
    named_modules = list(root.named_modules())
    owners = Counter(id(p) for _, m in named_modules for p in m._parameters.values() if p is not None)
    new: dict[int, Any] = {}
    for path, m in reversed(named_modules):
        params = {k: p for k, p in m._parameters.items() if p is not None and p.is_meta and not isinstance(p, Closed)}
        buffers = {k: b for k, b in m._buffers.items() if b is not None and b.is_meta}
        if not params and not buffers:
            continue
        for k, p in params.items():
            made = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
            m._parameters[k] = new.setdefault(id(p), made)
        for k, b in buffers.items():
            m._buffers[k] = new.setdefault(id(b), torch.empty_like(b, device=device))
        _reset(m, path, next(iter({**params, **buffers})))
        for k, p in params.items():
            owners[id(p)] -= 1
            if sharded and not owners[id(p)]:  # whoever shares it has given it values, too
                _cut(m._parameters[k], f"{path}.{k}".lstrip("."))


def _reset(m: nn.Module, path: str, name: str) -> None:
    reset = getattr(m, "reset_parameters", None)
    if not callable(reset):
        raise TypeError(
            f"{f'{path}.{name}'.lstrip('.')!r} lies on meta, and {type(m).__name__} has no reset_parameters() that"
            " could give it values; write one, or build the module without torch.device('meta')"
        )
    reset()


def _cut(p: Any, name: str) -> None:
    with ranks.called(f"the values of {name!r}") as mesh:
        close(p, name, broadcast(p.detach(), 0, mesh))
