"""Denoising diffusion with an average of the weights; every row's step and noise are a function of its key."""

from __future__ import annotations

import torch
from programs.table import Pair, seeded
from torch import nn

import funczero as fz
from funczero import P, rng

STEPS = 10
KEPT = torch.cumprod(1 - torch.linspace(0.01, 0.3, STEPS, dtype=torch.float64), 0)  # of the signal, by step


class Net(nn.Module):
    """Noise as told by a noisy point and its step."""

    def __init__(self, dim=4, wide=8):
        super().__init__()
        self.into, self.time, self.out = nn.Linear(dim, wide), nn.Embedding(STEPS, wide), nn.Linear(wide, dim)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(wide, wide), nn.SiLU()) for _ in range(3))

    def forward(self, x, t):
        x = self.into(x) + self.time(t)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def loss(model, batch):
    """|noise - model(sqrt(kept) x + sqrt(1 - kept) noise, t)|^2."""
    t = (rng.row_uniform(batch["key"]) * STEPS).long()
    noise, kept = rng.row_normal(batch["key"], batch["x"].shape[1:], torch.float64), KEPT[t][:, None]
    found = model(kept.sqrt() * batch["x"] + (1 - kept).sqrt() * noise, t)
    return (found - noise).square().sum(), torch.tensor(float(found.numel()))


def batch(t):
    """Eight points, each with a key."""
    g = torch.Generator().manual_seed(t)
    return {"x": torch.randn(8, 4, dtype=torch.float64, generator=g), "key": rng.row_keys(rng.fold(0, t), 8)}


def sharded(stage, accumulate):
    """The weights and their average."""
    loss_fn, params = fz.stateless(seeded(lambda: Net().double()), loss)
    grad = fz.value_and_grad(loss_fn, batch=P("data"))
    chain = fz.zero(grad, fz.adam(1e-2), fz.ema(0.9), stage=stage, accumulate=accumulate)
    step = fz.train_step(*chain, mesh={"data": -1}, policy="float64")
    state = step.init(params)
    for t in range(3):
        state, _ = step(state, step.local_rows(batch(t)))
    return step.params(fz.averaged(state)), step.params(state)


def plain():
    """The same in one process."""
    net = seeded(lambda: Net().double())
    mean = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for t in range(3):
        total, weight = loss(net, batch(t))
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        mean = {n: 0.9 * mean[n] + 0.1 * p.detach() for n, p in net.named_parameters()}
    return mean, {n: p.detach() for n, p in net.named_parameters()}


def program():
    """An average beside what learns."""
    return Pair(sharded, plain)
