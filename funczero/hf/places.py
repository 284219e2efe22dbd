"""A module without its values: while a chain has the parameters, none stand in the module, and whoever reads one is
told by torch instead of getting an old value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from funczero.deepspeed.engine.held import named
from funczero.deepspeed.engine.instances import Spot, spots_of


class Places:
    """The places of a module's parameters. Built, it changes nothing.

    Law: `back` leaves the very parameters that stood there, tied as they were, with the values it is given; for those
    that lay on meta, new ones.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        first = {id(p): n for n, p in reversed(named(module).items())}
        self.spots: list[Spot] = [s for path, m in module.named_modules() for s in spots_of(m, path, first)]
        self.owners = {f"{path}.{k}".lstrip("."): (m, k) for path, m in module.named_modules() for k in m._buffers}

    def release(self) -> None:
        """Parameters of the same shapes on the meta device; the memory of the others is let go."""
        once: dict[int, nn.Parameter] = {}
        for s in self.spots:
            meta = nn.Parameter(torch.empty_like(s.closed, device="meta"), s.closed.requires_grad)
            s.put(once.setdefault(id(s.closed), meta))
        for s in self.spots:
            s.closed.data = s.closed.data.new_empty(0)
            s.closed.grad = None

    @contextmanager
    def showing(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """Whole values in their places, by all their names, and then what stood there."""
        before = [s.now() for s in self.spots]
        kept = {n: self.owners[n][0]._buffers[self.owners[n][1]] for n in buffers if n in self.owners}
        once: dict[int, nn.Parameter] = {}
        try:
            for s in self.spots:
                x = params[s.name]
                s.put(once.setdefault(id(x), nn.Parameter(x, requires_grad=False)))
            self._buffers(buffers)
            yield
        finally:
            for s, x in zip(self.spots, before, strict=True):
                s.put(x)
            self._buffers(kept)

    def back(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """The module's own parameters in their places, with whole values, by all their names."""
        once: dict[int, nn.Parameter] = {}
        for s in self.spots:
            if s.closed.is_meta:
                made = nn.Parameter(params[s.name].detach().to(s.closed.dtype), s.closed.requires_grad)
                s.put(once.setdefault(id(s.closed), made))
                continue
            if not s.closed.numel() or s.closed.shape != params[s.name].shape:
                s.closed.data = params[s.name].detach().to(s.closed.dtype)
            s.put(s.closed)
        self._buffers(buffers)

    def _buffers(self, values: Mapping[str, Any]) -> None:
        for n, x in values.items():
            if n in self.owners:
                m, k = self.owners[n]
                m._buffers[k] = x
