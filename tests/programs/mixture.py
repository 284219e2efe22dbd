"""A mixture at the root of a model: every row goes through one expert, and leaves its trunk as soon as it is sure."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from programs.table import Program
from torch import nn

import funczero as fz


class Block(nn.Module):
    """A residual block with an exit of its own."""

    def __init__(self, dim):
        super().__init__()
        self.up, self.down, self.exit = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim), nn.Linear(dim, 3)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x)))
        return x, self.exit(x)


class Mixture(nn.Module):
    """Experts by the sign of a gate, then a trunk with early exits."""

    def __init__(self, dim=8):
        super().__init__()
        self.gate, self.experts = nn.Linear(dim, 1), nn.ModuleList(Block(dim) for _ in range(2))
        self.trunk = nn.ModuleList(Block(dim) for _ in range(3))

    def forward(self, x):
        gate = self.gate(x)[:, 0]
        out = torch.zeros(len(x), 3, dtype=x.dtype)
        for expert, rows in zip(self.experts, (gate < 0, gate >= 0), strict=True):
            if not rows.any():
                continue
            h, logits = expert(x[rows])
            for block in self.trunk:
                if logits.softmax(-1).amax() > 0.6:  # sure enough
                    break
                h, more = block(h)
                logits = logits + more
            out[rows] = logits * gate[rows, None].sigmoid()
        return out


def loss(model, batch):
    """Cross entropy of every row."""
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), torch.tensor(float(len(batch["y"])))


def batch(t):
    """One row a micro-batch: what runs is the row's own matter."""
    g = torch.Generator().manual_seed(t)
    return {"x": torch.randn(2, 8, dtype=torch.float64, generator=g), "y": torch.randint(3, (2,), generator=g)}


def program():
    """Trained with SGD; the experts are known by their name, the trunk is named."""
    return Program(
        make=lambda: Mixture().double(),
        loss=loss,
        batch=batch,
        chain=lambda: (fz.sgd(0.1, momentum=0.9),),
        optimizer=lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
        updates=4,
        options={"conditional": ["experts", "trunk"]},
        micros=True,
    )
