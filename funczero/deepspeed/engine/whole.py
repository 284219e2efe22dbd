"""Stages 0 to 2: the module's own parameters are the leaves of every forward, in memory that the chain's views own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from funczero.core.exhausted import asking
from funczero.core.spans import span
from funczero.core.types import TrainState
from funczero.deepspeed.engine.graphs import differentiate
from funczero.deepspeed.engine.held import Held, named
from funczero.gradients.pullback import pullback
from funczero.layout.spec import P
from funczero.step.step import Step
from funczero.transforms.chain import Source
from funczero.world.entries import FORWARD


class WholeParameters:
    """Every parameter shares storage with the whole views; see Holder."""

    kind: type[Held] = Held

    def __init__(self, module: nn.Module) -> None:
        """module: the user's."""
        self.module = module
        self.named = named(module)
        self.params = list({id(p): p for p in self.named.values()}.values())
        self.buffers: tuple[Tensor, ...] = ()  # of the views, whose memory the parameters show
        self.versions: list[int] = []

    def source(self, batch: P, trainable: Callable[[str], bool]) -> Source:
        """Whole gradients, by name."""
        return pullback(batch, trainable=trainable)

    def start(self, threshold: int, step: Step) -> dict[str, Any]:
        """The parameters themselves."""
        once: dict[int, Tensor] = {}
        return {n: once.setdefault(id(p), p.detach()) for n, p in self.named.items()}

    def attach(self) -> None:
        """Nothing more to do."""

    def release(self) -> None:
        """Nothing was put onto the module."""

    def renew(self, step: Step, state: TrainState) -> None:
        """Parameters become the new views; where those lie in the same memory only their versions move."""
        slots = step.whole_views(state)
        by_leaf = {leaf: p for p, leaf in zip(self.named.values(), slots.where.structure.places, strict=True)}
        old = self.buffers if len(self.buffers) == len(slots.buffers) else (None,) * len(slots.buffers)
        with torch.no_grad():
            for u, (buffer, before) in enumerate(zip(slots.buffers, old, strict=True)):
                if before is None or buffer.data_ptr() != before.data_ptr() or buffer.dtype != before.dtype:
                    for i, x in zip(slots.where.structure.members[u], slots.where.views(u, buffer), strict=True):
                        by_leaf[i].data = x
        torch.autograd.graph.increment_version(self.params)
        self.buffers, self.versions = slots.buffers, [p._version for p in self.params]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        with span(FORWARD if torch.is_grad_enabled() else f"{FORWARD} under no_grad"), asking(lambda: "in the forward"):
            return self.module(*args, **kwargs)

    def inside(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """fn as it is: parameters are always open."""
        return fn(*args, **kwargs)

    def owns(self, leaf: Tensor) -> bool:
        """A parameter of the module."""
        return any(leaf is p for p in self.params)

    def pull(
        self, loss: Tensor, retain: bool, over: float, others: list[tuple[Tensor, Tensor]]
    ) -> Callable[[Tensor], Any]:
        """Gradients of the whole parameters."""

        def vjp(cotangent: Tensor) -> Any:
            wanted = [p for p in self.params if p.requires_grad]
            grads = differentiate(loss, wanted, cotangent, retain, over, others)
            found = dict(zip(map(id, wanted), grads, strict=True))
            return {n: found.get(id(p)) for n, p in self.named.items()}

        return vjp

    def refresh(self) -> None:
        """Versions are read anew."""
        self.versions = [p._version for p in self.params]

    def written(self) -> str | None:
        """By the version counters of the parameters."""
        pairs = zip(self.params, self.versions, strict=True)
        return next((p.home[1] for p, v in pairs if p._version != v), None)  # type: ignore[attr-defined]

    def stray_gradient(self) -> str | None:
        """By their .grad."""
        return next((n for n, p in self.named.items() if p.grad is not None), None)
