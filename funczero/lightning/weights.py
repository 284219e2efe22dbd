"""A module's weights, whole and in its user's own form, out of engines and into them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from funczero.deepspeed.engine.engine import Engine
from funczero.deepspeed.engine.showing import loaded, own_method, shown
from funczero.lightning.engines import Engines


def module_state(root: nn.Module, engines: Engines) -> dict[str, Any]:
    """The module's own state_dict over the masters: values on rank 0's CPU, shapes elsewhere. A collective.

    Masters come leaf after leaf, so that no rank but 0 ever holds more than one whole leaf.
    """
    with ExitStack() as stack:
        for one, part in zip(engines.each, engines.roots, strict=True):
            stack.enter_context(shown(part, _values(one.engine)))
        return own_method(root, "state_dict")()


def _values(engine: Engine) -> dict[str, Tensor]:
    keep = (lambda x: x.cpu()) if engine.global_rank == 0 else (lambda x: torch.empty_like(x, device="meta"))
    return engine.names_of({name: keep(x) for name, x in engine.masters()})


def load_module(root: nn.Module, engines: Engines, state_dict: Mapping[str, Any], strict: bool) -> None:
    """What the module's own load_state_dict makes of a whole state_dict, into the masters; all ranks give the same.

    Raises:
      RuntimeError: names or shapes differ, in torch's words.
    """
    homes = {
        id(p): (one.engine, n) for one, part in zip(engines.each, engines.roots, strict=True) for n, p in _named(part)
    }
    names = {n: homes[id(p)] for n, p in _named(root) if id(p) in homes}
    taken = loaded(root, state_dict, strict, set(names))
    written: dict[int, tuple[Engine, dict[str, Tensor]]] = {}
    for n, x in taken.items():
        engine, own = names[n]
        written.setdefault(id(engine), (engine, {}))[1][own] = x
    for engine, values in written.values():
        engine.write_parameters(values)


def _named(m: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(m.named_parameters(remove_duplicate=False))
