"""A running average of the parameters, as a leaf of the state beside them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from funczero.core.number import flag, number
from funczero.core.transform import after, beside_update, slot_name
from funczero.core.types import Grad, State, TrainState, Transform, Updated
from funczero.layout.lazy import Lazy
from funczero.layout.slots import Slots


class Ema(NamedTuple):
    """The average of the masters, where they lie, in their dtype or float32 if that is wider; and updates in it."""

    average: Slots
    count: Tensor  # type: ignore[assignment]  # applied updates, in place of the tuple's method


def ema(decay: float, warmup: bool = False) -> Transform:
    """average <- decay * average + (1 - decay) * parameters, after every applied update; it begins as the parameters.

    It stands right of the last optimizer, in the innermost bracket around it, so that each rank averages its part and
    nothing travels. Law: the same bits at every stage. `fz.averaged(state)` is the state with the average as its
    parameters, for step.eval, step.params and exports. What is frozen has none, and is itself there.

    Layout: new parameters, unchanged. Memory: one more copy of this rank's masters.

    Args:
      decay: in [0, 1).
      warmup: min(decay, (1 + n) / (10 + n)) at update n, so that the start is forgotten sooner.

    Source: Polyak and Juditsky 1992; the warmup is TensorFlow's ExponentialMovingAverage(num_updates=).

    >>> import funczero as fz
    >>> loss_fn = lambda p, b: ((p["w"] * b).sum(), torch.tensor(float(len(b))))
    >>> step = fz.train_step(fz.value_and_grad(loss_fn), fz.sgd(1.0), fz.ema(0.5))
    >>> state, _ = step(step.init({"w": torch.tensor(2.0)}), torch.ones(4))
    >>> step.params(state)["w"].item(), step.params(fz.averaged(state))["w"].item()
    (1.0, 1.5)
    """
    decay, name = number("ema", "decay", decay, high=1.0), f"ema({decay:g})"
    flag("ema", "warmup", warmup)

    def transform(g: Grad) -> Grad:
        beside_update(g, name)
        key, dtype = slot_name(g, "ema"), torch.promote_types(g.env.policy.params, torch.float32)

        def init(params: Lazy) -> State:
            masters = params.at(g.env.mesh.coords(g.layout.sharded), dtype).trainable()
            return {key: Ema(masters, torch.zeros((), dtype=torch.float64))}

        def fn(out: Updated, state: State) -> tuple[Updated, State]:
            own: Ema = state[key]
            kept = (
                ((1 + own.count) / (10 + own.count)).clamp(max=decay) if warmup else torch.full_like(own.count, decay)
            )
            mixed = lambda a, p: torch.where(out.ok, a * kept.to(a) + p.to(a.dtype) * (1 - kept).to(a), a)
            average = own.average.map(mixed, out.params.trainable())
            if g.env.donate:
                average = own.average.map(torch.Tensor.copy_, average)
            return out, {**state, key: Ema(average, own.count + out.ok.to(own.count))}

        return after(g, name, g.layout, fn, init)

    transform.__name__ = name
    return transform


def averaged(state: TrainState) -> TrainState:
    """The state with the average of its parameters in their place, in their dtype; to look at, not to train on.

    Raises:
      KeyError: its chain has no fz.ema.
    """
    own = next((x for x in state.chain.values() if isinstance(x, Ema)), None)
    if own is None:
        raise KeyError(
            f"averaged: no transform of this chain keeps an average; it has {list(state.chain)}, write fz.ema"
        )
    return state._replace(params=own.average.to(state.params.buffers[0].dtype).with_frozen(state.params))
