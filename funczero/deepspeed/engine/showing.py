"""Other values in the places of a module's parameters: what a state_dict says of them, what a load writes into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from funczero.deepspeed.engine.held import named
from funczero.deepspeed.engine.instances import Method, bind, spots_of


def own_method(module: nn.Module, name: str) -> Callable[..., Any]:
    """A method of the user's module as it was before an engine put one of its own over it."""
    found = module.__dict__.get(name)
    return found.__wrapped__ if isinstance(found, Method) else getattr(module, name)


@contextmanager
def shown(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Values stand where a module's parameters of these names stand; its other parameters are left alone."""
    first = {id(p): n for n, p in reversed(named(module).items())}
    found = [s for path, m in module.named_modules() for s in spots_of(m, path, first) if s.name in values]
    bind(found, dict(values))
    try:
        yield
    finally:
        for s in found:
            s.put(s.closed)


class Sink(Tensor):
    """In a parameter's place while load_state_dict runs: it has the parameter's shape, and keeps what is copied in."""

    taken: Tensor | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """copy_ keeps its source; everything else sees a tensor without values of its own."""
        if func is Tensor.copy_ and isinstance(args[0], Sink):
            args[0].taken = args[1].detach()
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _sink(p: Tensor) -> Sink:
    out = torch.zeros((), dtype=p.dtype).expand(p.shape).as_subclass(Sink)
    out.taken = None
    return out


def loaded(module: nn.Module, state_dict: Mapping[str, Any], strict: bool, names: set[str]) -> dict[str, Tensor]:
    """What the module's own load_state_dict would write into the parameters of these names; the rest it loads.

    Raises:
      RuntimeError: names or shapes differ, in torch's words.
    """
    params = {n: p for n, p in named(module).items() if n in names}
    once: dict[int, Sink] = {}
    sinks = {n: once.setdefault(id(p), _sink(p)) for n, p in params.items()}
    with shown(module, sinks):
        own_method(module, "load_state_dict")(state_dict, strict=strict)
    return {n: x.taken for n, x in sinks.items() if x.taken is not None}
