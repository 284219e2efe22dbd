"""A U-Net as diffusion code writes it: lists of lists of what runs together, blocks of several kinds, skips."""

from __future__ import annotations

import torch
from programs.table import Program
from torch import nn
from torch.nn import functional as F

import funczero as fz


class Residual(nn.Module):
    """A block that knows the time."""

    def __init__(self, n, m, time):
        super().__init__()
        self.norm, self.one, self.two = nn.GroupNorm(2, n), nn.Conv1d(n, m, 3, padding=1), nn.Conv1d(m, m, 3, padding=1)
        self.time, self.skip = nn.Linear(time, m), nn.Conv1d(n, m, 1) if n != m else nn.Identity()

    def forward(self, x, t):
        h = self.one(F.silu(self.norm(x))) + self.time(t)[..., None]
        return self.two(F.silu(h)) + self.skip(x)


class Attention(nn.Module):
    """Every place looks at all others."""

    def __init__(self, n):
        super().__init__()
        self.attend = nn.MultiheadAttention(n, 2, batch_first=True)

    def forward(self, x):
        y = x.transpose(1, 2)
        return x + self.attend(y, y, y, need_weights=False)[0].transpose(1, 2)


class UNet(nn.Module):
    """Down, through the middle, and up again."""

    def __init__(self, widths=(4, 8, 8), time=6):
        super().__init__()
        self.inp, self.time = nn.Conv1d(1, widths[0], 3, padding=1), nn.Sequential(nn.Linear(1, time), nn.SiLU())
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for n, m in zip(widths, widths[1:], strict=False):
            down, up = nn.Conv1d(n, m, 2, stride=2), nn.ConvTranspose1d(m, n, 2, stride=2)
            self.downs.append(nn.ModuleList([Residual(n, n, time), Attention(n), down]))
            self.ups.insert(0, nn.ModuleDict({"up": up, "block": Residual(2 * n, n, time), "attend": Attention(n)}))
        self.mid, self.out = Residual(widths[-1], widths[-1], time), nn.Conv1d(widths[0], 1, 1)

    def forward(self, x, t):
        x, t, skips = self.inp(x), self.time(t), []
        for block, attend, down in self.downs:
            x = attend(block(x, t))
            skips.append(x)
            x = down(x)
        x = self.mid(x, t)
        for part in self.ups:
            x = torch.cat([part["up"](x), skips.pop()], 1)
            x = part["attend"](part["block"](x, t))
        return self.out(x)


def loss(model, batch):
    """The noise that was added is what is learned."""
    x, noise, t = batch["x"], batch["noise"], batch["t"]
    noisy = x * (1 - t)[:, None].sqrt() + noise * t[:, None].sqrt()
    return F.mse_loss(model(noisy, t), noise, reduction="sum"), torch.tensor(float(noise.numel()))


def batch(t):
    """Waves, noise, and how much of it."""
    g = torch.Generator().manual_seed(t)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=g)
    return {"x": draw(4, 1, 8).cumsum(-1), "noise": draw(4, 1, 8), "t": draw(4, 1).sigmoid()}


def program():
    """Trained with Adam."""
    return Program(
        make=lambda: UNet().double(),
        loss=loss,
        batch=batch,
        chain=lambda: (fz.adam(1e-3),),
        optimizer=lambda params: torch.optim.Adam(params, 1e-3),
    )
