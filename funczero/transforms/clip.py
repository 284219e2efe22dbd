"""Clipping: nonlinear, so it reads the mean."""

from __future__ import annotations

import math

import torch

from funczero.core.number import number
from funczero.core.transform import after
from funczero.core.types import Grad, State, Transform, Value
from funczero.transforms.mean import global_norm, pointwise, value


def clip_by_global_norm(limit: float, eps: float = 0.0) -> Transform:
    """Scales the gradient by min(1, limit / (norm + eps)); touches only the factor, with no pass over the gradient.

    Layout: the mean, sharded or not; the norm is that of the whole tree, exact on any mesh. `metrics.grad_norm` is
    before the clip.

    Args:
      limit: largest norm of the mean gradient; positive.
      eps: torch and DeepSpeed (`gradient_clipping`) add 1e-6.

    Source: Pascanu et al., arXiv 1211.5063.
    """
    if number("clip_by_global_norm", "limit", limit, low=-math.inf) <= 0:
        raise ValueError(
            f"clip_by_global_norm: limit={limit!r} is not a positive norm; leave the transform out to clip nothing"
        )
    eps, name = number("clip_by_global_norm", "eps", eps), f"clip_by_global_norm({limit:g})"

    def transform(g: Grad) -> Grad:
        g = value(g, name)

        def fn(out: Value, state: State) -> tuple[Value, State]:
            norm = global_norm(out.grads, out.factor, g.layout, g.env) if out.norm is None else out.norm
            shrink = limit / (norm + eps).clamp(min=limit)  # at most 1, and smooth at 0
            return (
                out._replace(factor=out.factor * shrink, norm=norm * shrink, logs={"grad_norm": norm, **out.logs}),
                state,
            )

        return after(g, name, g.layout, fn)

    transform.__name__ = name
    return transform


def clip_by_value(limit: float) -> Transform:
    """Clamps every value of the mean gradient to [-limit, limit]. Rewrites the gradient: its norm is unknown
    afterwards.
    """
    if number("clip_by_value", "limit", limit, low=-math.inf) <= 0:
        raise ValueError(f"clip_by_value: limit={limit!r} is not positive; leave the transform out to clip nothing")
    return pointwise(f"clip_by_value({limit:g})", lambda x, factor: torch.clamp(x * factor, -limit, limit))
