"""The open window of a streamed chain: more losses for a micro-batch that is already in it, and its gradient so far."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funczero.comm.collectives import all_gather, all_reduce
from funczero.comm.edge import Edge
from funczero.core.types import Sum, TrainState
from funczero.layout.slots import Slots
from funczero.step.step import Step
from funczero.transforms.accumulate import Accumulate

KEY = "accumulate"


def taken(state: TrainState) -> int:
    """Micro-batches in the window."""
    return int(state.chain[KEY].count)


def amended(step: Step, state: TrainState, micro: Any) -> TrainState:
    """The state with one more (pull, loss, weight) added to the last micro-batch of the window: sums are linear."""
    own: Accumulate = state.chain[KEY]
    empty = Accumulate(torch.zeros_like(own.count), ())
    new, _ = step(state._replace(chain={**state.chain, KEY: empty}), micro)
    more, last, wide = new.chain[KEY].partial[0], own.partial[-1], step.grad.env.policy.accumulate
    grads = last.grads.map(lambda a, b: a.to(wide) + b.to(wide), more.grads)
    bad = None if last.bad is None or more.bad is None else last.bad + more.bad
    both = Sum(_ended(last.loss, more.loss), _ended(last.weight, more.weight), None, grads, bad=bad)
    return new._replace(chain={**new.chain, KEY: Accumulate(own.count, (*own.partial[:-1], both))})


def _ended(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a[:-1], a[-1:] + b])


def filled(state: TrainState, k: int) -> TrainState:
    """The state whose window weighs k micro-batches, whatever it holds: DeepSpeed divides by k at every backward."""
    own: Accumulate = state.chain[KEY]
    lacking = k - int(own.count)
    if lacking <= 0 or not own.partial:
        return state
    last = own.partial[-1]
    weight = torch.cat([last.weight[:-1], last.weight[-1:] + lacking])
    return state._replace(chain={**state.chain, KEY: own._replace(partial=(*own.partial[:-1], last._replace(weight=weight)))})


def multiplied(pull: Callable[..., Any], times: int) -> Callable[..., Any]:
    """The vector-Jacobian product of `times` losses: it rides on the cotangent."""
    if times == 1:
        return pull

    def vjp(cotangent: Tensor, *how: Any) -> Any:
        return pull(cotangent * times, *how)

    vjp.scatters = getattr(pull, "scatters", False)  # type: ignore[attr-defined]
    return vjp


def mean_gradient(step: Step, state: TrainState, k: int) -> Slots | None:
    """The window's gradients so far over its k micro-batches, whole, unscaled and before any clip; None without a micro-batch. A collective."""
    own: Accumulate = state.chain[KEY]
    if not own.partial:
        return None
    g = step.running()
    mesh, wide = g.env.mesh, g.env.policy.accumulate
    out = own.total(wide)
    grads = out.grads.to(wide)
    open_axes = [a for a in g.layout.batch if a not in grads.where.axes]
    for a in open_axes:
        grads = all_reduce(grads, Edge(a, adds=wide), mesh)  # read, not trained with: exact under every wire
    for a in reversed(grads.where.axes):
        grads = all_gather(grads, a, mesh)
    scale = state.chain.get("scale_loss")
    factor = 1.0 if scale is None else float(scale.weight / scale.scale)
    size = 1
    for a in g.layout.batch:
        size *= mesh.axes[a].size
    weight = k * size  # every rank's window weighs alike
    return grads.map(lambda b: b * (factor / weight))
