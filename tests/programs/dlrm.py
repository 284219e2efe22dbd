"""A recommender: large embedding tables, of which a batch uses a few rows, beside small layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from programs.table import Program
from torch import nn

import funczero as fz

SIZES, DIM = (40, 7, 23), 4


class DLRM(nn.Module):
    """Dense features below, products of all pairs, one logit above."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(n, DIM, mode="sum") for n in SIZES)
        self.below = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, DIM), nn.ReLU())
        pairs = (len(SIZES) + 1) * len(SIZES) // 2
        self.above = nn.Sequential(nn.Linear(DIM + pairs, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense, chosen):
        x = self.below(dense)
        rows = torch.stack([x, *(table(chosen[:, i]) for i, table in enumerate(self.tables))], 1)
        i, j = torch.tril_indices(rows.shape[1], rows.shape[1], -1)
        return self.above(torch.cat([x, (rows @ rows.mT)[:, i, j]], 1)).squeeze(-1)


def loss(model, batch):
    """Clicked or not."""
    each = F.binary_cross_entropy_with_logits(model(batch["dense"], batch["chosen"]), batch["y"], reduction="sum")
    return each, torch.tensor(float(len(batch["y"])))


def batch(t):
    """Eight rows, with two entries of every table."""
    g = torch.Generator().manual_seed(t)
    chosen = torch.stack([torch.randint(n, (8, 2), generator=g) for n in SIZES], 1)
    y = torch.randint(2, (8,), generator=g).double()
    return {"dense": torch.randn(8, 5, generator=g, dtype=torch.float64), "chosen": chosen, "y": y}


def program():
    """Adagrad, with a rate of its own for the tables."""
    return Program(
        make=lambda: DLRM().double(),
        loss=loss,
        batch=batch,
        chain=lambda: (fz.adagrad([("tables", 1e-1), ("", 1e-2)]),),
        optimizer=lambda params: torch.optim.Adagrad(
            [{"params": params[: len(SIZES)], "lr": 1e-1}, {"params": params[len(SIZES) :]}], 1e-2
        ),
    )
