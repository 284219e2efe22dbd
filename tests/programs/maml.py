"""Model-agnostic meta-learning: every row of a batch is a task, adapted to by a step of its own inside the loss."""

from __future__ import annotations

import torch
from programs.table import Pair, seeded
from torch import nn
from torch.func import functional_call, grad, vmap

import funczero as fz
from funczero import P


class Net(nn.Module):
    """A curve."""

    def __init__(self, wide=8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, wide), nn.Tanh(), nn.Linear(wide, wide), nn.Tanh(), nn.Linear(wide, 1))

    def forward(self, x):
        return self.net(x)


NET = seeded(lambda: Net().double())
first = lambda: {n: p.detach().clone() for n, p in NET.named_parameters()}


def meta_loss(params, batch):
    """The loss on held-out points after two inner steps on a task's own, summed over tasks."""
    error = lambda p, x, y: (functional_call(NET, p, (x,)) - y).square().mean()

    def of_task(x, y, held_x, held_y):
        own = dict(params)
        for _ in range(2):
            slopes = grad(error)(own, x, y)
            own = {n: p - 0.1 * slopes[n] for n, p in own.items()}
        return error(own, held_x, held_y)

    each = vmap(of_task)(batch["x"], batch["y"], batch["held_x"], batch["held_y"])
    return each.sum(), torch.tensor(float(len(each)))


def batch(t):
    """Four sine curves, five points each to adapt on and five held out."""
    g = torch.Generator().manual_seed(t)
    new = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)
    x, held_x, phase = new(4, 5, 1) * 6 - 3, new(4, 5, 1) * 6 - 3, new(4, 1, 1) * 3
    return {"x": x, "y": (x + phase).sin(), "held_x": held_x, "held_y": (held_x + phase).sin()}


def sharded(stage, accumulate):
    """The first values that adapt best, after a few updates."""
    source = fz.value_and_grad(meta_loss, batch=P("data"), higher_order=True)
    chain = fz.zero(source, fz.adam(1e-2), stage=stage, accumulate=accumulate)
    step = fz.train_step(*chain, mesh={"data": -1}, policy="float64")
    state, losses = step.init(first()), []
    for t in range(3):
        state, metrics = step(state, step.local_rows(batch(t)))
        losses.append(metrics.loss)
    return losses, step.params(state)


def plain():
    """The same in one process."""
    params, losses = {n: p.requires_grad_() for n, p in first().items()}, []
    optimizer = torch.optim.Adam(params.values(), 1e-2)
    for t in range(3):
        total, weight = meta_loss(params, batch(t))
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        losses.append((total / weight).detach())
    return losses, {n: p.detach() for n, p in params.items()}


def program():
    """A loss of parameters, without a module around it."""
    return Pair(sharded, plain)
