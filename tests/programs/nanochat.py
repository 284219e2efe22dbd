"""A small GPT as nanochat trains it: Muon for matrices of its blocks, AdamW with betas of their own for the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from programs.table import Program
from torch import nn

import funczero as fz

VOCAB, DIM, HEADS = 13, 16, 2


class Block(nn.Module):
    """Causal attention and a feed-forward layer with squared relu, without biases; norms learn nothing."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.up, self.down = nn.Linear(DIM, 4 * DIM, bias=False), nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x):
        q, k, v = (
            y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(F.rms_norm(x, (DIM,))).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:]), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(F.rms_norm(x, (DIM,)))).square())


class GPT(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, tokens):
        x = F.rms_norm(self.embed(tokens), (DIM,))
        for block in self.blocks:
            x = block(x)
        return 15 * torch.tanh(self.head(F.rms_norm(x, (DIM,))) / 15)


def loss(model, batch):
    """Cross entropy of every token."""
    nll = F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten(), reduction="sum")
    return nll, torch.tensor(float(batch["y"].numel()))


def batch(t):
    """Four rows of tokens, and the next ones."""
    tokens = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(t))
    return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


class Both(torch.optim.Optimizer):
    """torch's Muon and AdamW, one after the other."""

    def __init__(self, params):
        embed, head, *matrices = params
        self.each = (
            torch.optim.Muon(matrices, 0.02, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW([embed], 0.2, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0),
            torch.optim.AdamW([head], 4e-3, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0),
        )

    def zero_grad(self):
        for one in self.each:
            one.zero_grad()

    def step(self):
        for one in self.each:
            one.step()


def program():
    """In three updates."""
    adamw = lambda lr: fz.adamw(lr, b1=0.8, b2=0.95, eps=1e-10, weight_decay=0.0)
    groups = [("embed", adamw(0.2)), ("head", adamw(4e-3)), (fz.matrices(), fz.muon(0.02, weight_decay=0.01))]
    return Program(
        make=lambda: GPT().double(),
        loss=loss,
        batch=batch,
        chain=lambda: (fz.partition(groups),),
        optimizer=Both,
    )
