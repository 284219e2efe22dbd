"""Graph attention over one graph that every rank holds; the rows of a batch are the nodes that the loss is taken at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from programs.table import Program, seeded
from torch import nn

import funczero as fz

NODES = 10
GRAPH = seeded(lambda: {
    "x": torch.randn(NODES, 4, dtype=torch.float64),
    "edges": torch.cat([torch.randint(NODES, (2, 30)), torch.arange(NODES).expand(2, -1)], 1),
    "y": torch.randint(3, (NODES,)),
})  # fmt: skip


class Attention(nn.Module):
    """One head: a softmax over the edges that lead to a node."""

    def __init__(self, dim, out):
        super().__init__()
        self.w, self.source, self.target = (nn.Linear(a, b, bias=False) for a, b in ((dim, out), (out, 1), (out, 1)))

    def forward(self, x, edges):
        source, target = edges
        h = self.w(x)
        score = F.leaky_relu(self.source(h)[source] + self.target(h)[target], 0.2).exp()
        total = torch.zeros(len(x), 1, dtype=x.dtype).index_add(0, target, score)
        return torch.zeros_like(h).index_add(0, target, h[source] * score / total[target])


class Net(nn.Module):
    """Three layers."""

    def __init__(self):
        super().__init__()
        self.into, self.layers = nn.Linear(4, 8), nn.ModuleList(Attention(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x, edges):
        x = self.into(x)
        for layer in self.layers:
            x = x + F.elu(layer(x, edges))
        return self.head(x)


def loss(model, nodes):
    """Cross entropy at some nodes of the graph."""
    logits = model(GRAPH["x"], GRAPH["edges"])[nodes]
    return F.cross_entropy(logits, GRAPH["y"][nodes], reduction="sum"), torch.tensor(float(len(nodes)))


def program():
    """Adam on four nodes an update."""
    return Program(
        make=lambda: Net().double(),
        loss=loss,
        batch=lambda t: torch.randperm(NODES, generator=torch.Generator().manual_seed(t))[:4],
        chain=lambda: (fz.adam(1e-2),),
        optimizer=lambda params: torch.optim.Adam(params, 1e-2),
    )
