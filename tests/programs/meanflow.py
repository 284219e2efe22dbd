"""MeanFlow: the mean velocity of a flow, whose target holds a forward-mode derivative of the network itself."""

from __future__ import annotations

import torch
from programs.table import Program
from torch import nn
from torch.func import jvp

import funczero as fz


class Net(nn.Module):
    """The mean velocity between two times, at a point."""

    def __init__(self, dim=4, wide=8):
        super().__init__()
        self.into, self.out = nn.Linear(dim + 2, wide), nn.Linear(wide, dim)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(wide, wide), nn.Tanh()) for _ in range(3))

    def forward(self, z, r, t):
        x = self.into(torch.cat([z, r, t], 1))
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def loss(model, batch):
    """|u - (v - (t - r) du/dt)|^2, the target held constant."""
    x, noise, r, t = (batch[n] for n in ("x", "noise", "r", "t"))
    z, v = (1 - t) * x + t * noise, noise - x
    u, slope = jvp(model, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    return (u - (v - (t - r) * slope).detach()).square().sum(), torch.tensor(float(len(x)))


def batch(t):
    """Four points, their noise, and two times each."""
    g = torch.Generator().manual_seed(t)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    times = new(4, 2).sigmoid().sort(1).values
    return {"x": new(4, 4), "noise": new(4, 4), "r": times[:, :1], "t": times[:, 1:]}


def program():
    """Blocks are units, through which the derivative goes."""
    return Program(
        make=lambda: Net().double(),
        loss=loss,
        batch=batch,
        chain=lambda: (fz.adam(1e-2),),
        optimizer=lambda params: torch.optim.Adam(params, 1e-2),
        grad={"higher_order": True},
    )
