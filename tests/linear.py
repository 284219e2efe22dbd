"""A gradient that is the sum of rows, so that what a chain makes of it is known by hand."""

from __future__ import annotations

import torch

import funczero as fz
from funczero import P

MESH = {"data": 1}
X = {"x": torch.tensor([[1.0, 2.0], [3.0, -4.0]])}


def linear(p, b):
    """Gradient of the sum: the sum of rows."""
    return (b["x"] @ p["w"]).sum(), torch.tensor(float(len(b["x"])))


def source(**kw):
    return fz.value_and_grad(linear, batch=P("data"), **kw)


def one(*parts, batch=X, updates=1, w=(0.0, 0.0), **kw):
    """The masters, metrics and state after some updates."""
    step = fz.train_step(*parts, mesh=MESH, **kw)
    state = step.init({"w": torch.tensor(w)})
    for _ in range(updates):
        state, m = step(state, step.local_rows(batch))
    return step.params(state)["w"].tolist(), m, state
