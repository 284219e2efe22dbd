"""The open window of a streamed chain: more losses for a micro-batch that is already in it, and its gradient so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funczero.comm.collectives import all_gather, all_reduce
from funczero.comm.edge import Edge
from funczero.core.types import Seed, TrainState
from funczero.layout.slots import Slots
from funczero.step.step import Step
from funczero.transforms import exact
from funczero.transforms.accumulate import Accumulate
from funczero.transforms.loss_scale import ScaleLoss


def window_of(step: Step, state: TrainState) -> Accumulate:
    """The state of the chain's streamed accumulate."""
    own = step.state_of(state, Accumulate)
    assert own is not None
    return own


def taken(step: Step, state: TrainState) -> int:
    """Micro-batches in the window."""
    return int(window_of(step, state).count)


def amended(step: Step, state: TrainState, micro: Any) -> TrainState:
    """The state with one more (pull, loss, weight) added to the last micro-batch of the window: sums are linear."""
    own = window_of(step, state)
    new, _ = step(emptied(step, state), micro)
    more, last, wide = window_of(step, new).partial[0], own.partial[-1], step.policy.accumulate
    if last.tops is None:
        both = last._replace(grads=last.grads.map(lambda a, b: a.to(wide) + b.to(wide), more.grads))
    else:
        both = exact.summed(last, more)
    bad = None if last.bad is None or more.bad is None else last.bad + more.bad
    loss, weight = _added_to_last(last.loss, more.loss), _added_to_last(last.weight, more.weight)
    both = both._replace(loss=loss, weight=weight, aux=None, bad=bad)
    return step.with_state(new, Accumulate(own.count, (*own.partial[:-1], both)))


def _added_to_last(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a[:-1], a[-1:] + b])


def emptied(step: Step, state: TrainState) -> TrainState:
    """The state with a window that holds nothing."""
    own = window_of(step, state)
    return step.with_state(state, Accumulate(torch.zeros_like(own.count), ()))


def filled(step: Step, state: TrainState, k: int) -> TrainState:
    """The state whose window weighs k micro-batches, whatever it holds: DeepSpeed divides by k at every backward."""
    own = window_of(step, state)
    lacking = k - int(own.count)
    if lacking <= 0 or not own.partial:
        return state
    last = own.partial[-1]
    whole = last._replace(weight=torch.cat([last.weight[:-1], last.weight[-1:] + lacking]))
    return step.with_state(state, own._replace(partial=(*own.partial[:-1], whole)))


def multiplied(pull: Callable[..., Any], times: int) -> Callable[..., Any]:
    """The vector-Jacobian product of `times` losses: it rides on the cotangent."""
    if times == 1:
        return pull

    def vjp(cotangent: Tensor, *how: Any) -> Any:
        return pull(cotangent * times, *how)

    vjp.scatters = getattr(pull, "scatters", False)  # type: ignore[attr-defined]
    return vjp


def mean_gradient(step: Step, state: TrainState, k: int) -> Slots | None:
    """The window's gradients so far over its k micro-batches, whole, unscaled and before any clip. A collective.

    None without a micro-batch.
    """
    own = window_of(step, state)
    if not own.partial:
        return None
    mesh, wide, axes = step.live_mesh, step.policy.accumulate, step.grad.layout.batch
    scale = step.state_of(state, ScaleLoss)
    factor = 1.0 if scale is None else float(scale.weight / scale.scale)
    total = own.total(wide)
    if total.tops is None:
        grads = total.grads.to(wide)
    else:
        env = step.running().env
        seed = Seed(torch.tensor(1 / factor, dtype=torch.float64), 0)
        grid = exact.grid_of({**state.chain, "params": state.params}, seed, env)
        assert grid is not None
        grads = exact.so_far(total, grid, env)
    for axis in axes:
        if axis not in grads.where.axes:
            grads, _ = all_reduce(grads, Edge(axis, adds=wide), mesh)  # read, not trained with: exact under every wire
    for axis in reversed(grads.where.axes):
        grads = all_gather(grads, axis, mesh)
    weight = k * mesh.rank(axes)[1]  # every rank's window weighs alike
    return grads.map(lambda b: b * (factor / weight))
