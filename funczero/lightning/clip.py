"""A clip whose limit a loop says from update to update: Lightning hands it to a method, not to an optimizer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core.transform import after, slot_name
from funczero.core.types import Grad, State, Transform, Value
from funczero.transforms.mean import global_norm, rewritten, value

EPS = 1e-6  # torch's


class AskedClip(NamedTuple):
    """The limits of the next update; inf for none. They are used once."""

    norm: Tensor  # float64, of the whole mean gradient
    value: Tensor  # float64, of every element of it


def none() -> AskedClip:
    """Nothing is clipped."""
    return AskedClip(*(torch.tensor(math.inf, dtype=torch.float64) for _ in range(2)))


def asked_clip() -> Transform:
    """Clips the mean gradient as the state asks, by norm or by value, and asks for nothing afterwards.

    Law: with no limit it is the identity. A norm touches only the factor, a value rewrites the gradient.
    """
    name = "asked_clip"

    def transform(g: Grad) -> Grad:
        g = value(g, name)
        key = slot_name(g, name)

        def fn(out: Value, state: State) -> tuple[Value, State]:
            asked: AskedClip = state[key]
            norm, limit = float(asked.norm), float(asked.value)
            if math.isinf(norm) and math.isinf(limit):
                return out, state
            state = {**state, key: none()}
            if not math.isinf(limit):
                grads = out.grads.map(lambda b: torch.clamp(b * out.factor.to(b.dtype), -limit, limit))
                return rewritten(out, grads), state
            found = global_norm(out.grads, out.factor, g.layout, g.env) if out.norm is None else out.norm
            shrink = norm / (found + EPS).clamp(min=norm)
            logs = {"grad_norm": found, **out.logs}
            return out._replace(factor=out.factor * shrink, norm=found * shrink, logs=logs), state

        init: Any = lambda params: {key: none()}
        return after(g, name, g.layout, fn, init)

    transform.__name__ = name
    return transform
