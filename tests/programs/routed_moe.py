"""Routed experts as people write them: the two best of four for every row, and an expert without rows does not run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from programs.table import Program
from torch import nn

import funczero as fz


class Expert(nn.Module):
    """A feed-forward block."""

    def __init__(self, dim):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class Routed(nn.Module):
    """Every row goes to the experts that its router likes most."""

    def __init__(self, dim, n, top):
        super().__init__()
        self.router, self.experts = nn.Linear(dim, n, bias=False), nn.ModuleList(Expert(dim) for _ in range(n))
        self.norm, self.top = nn.LayerNorm(dim), top

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(self.top, -1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, place = (chosen == i).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, expert(self.norm(x[rows])) * weights[rows, place, None])
        return x + out


class Net(nn.Module):
    """Three such blocks."""

    def __init__(self, dim=8, depth=3):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Routed(dim, 4, 2) for _ in range(depth)), nn.Linear(dim, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model, batch):
    """Cross entropy of every row."""
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), torch.tensor(float(len(batch["y"])))


def batch(t):
    """Four rows, so that on every rank some experts have none."""
    g = torch.Generator().manual_seed(t)
    return {"x": torch.randn(4, 8, dtype=torch.float64, generator=g), "y": torch.randint(3, (4,), generator=g)}


def program():
    """Trained with AdamW."""
    return Program(
        make=lambda: Net().double(),
        loss=loss,
        batch=batch,
        chain=lambda: (fz.adamw(1e-2, weight_decay=0.1),),
        optimizer=lambda params: torch.optim.AdamW(params, 1e-2, weight_decay=0.1),
        options={"units": ["blocks"]},
    )
