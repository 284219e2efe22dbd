"""A frozen language model with low-rank adapters, whose blocks run again in the backward to save memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from programs.table import Pair, seeded
from torch import nn

import funczero as fz
from funczero import P

ADAPTERS = fz.lora(rank=2, match="up|down", alpha=4)


class Block(nn.Module):
    """A feed-forward block."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Three such blocks over an embedding."""

    def __init__(self, dim=8, words=11):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(words, dim), nn.ModuleList(Block(dim) for _ in range(3))
        self.head = nn.Linear(dim, words)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model, tokens):
    """Cross entropy of every next word."""
    logits = model(tokens[:, :-1]).flatten(0, 1)
    return F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum"), torch.tensor(float(len(logits)))


def batch(t):
    """Four rows of words."""
    return torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(t))


def model():
    """The pretrained one with fresh adapters."""
    return ADAPTERS.module(seeded(lambda: Net().double()))


def sharded(stage, accumulate):
    """The merged weights after a few updates."""
    net = model()
    loss_fn, params = fz.stateless(net, loss, remat=True)
    grad = fz.value_and_grad(loss_fn, batch=P("data"), trainable=loss_fn.trainable)
    chain = fz.zero(grad, fz.adamw(1e-1, weight_decay=0.0), stage=stage, accumulate=accumulate)
    step = fz.train_step(*chain, mesh={"data": -1}, policy="float64")
    state = step.init(params)
    for t in range(3):
        state, _ = step(state, step.local_rows(batch(t)))
    return dict(sorted(ADAPTERS.merged(step.params(state), net).items()))


def plain():
    """The same, with the product written out."""
    net, adapters = seeded(lambda: Net().double()), {}
    for name, p in model().named_parameters():
        if ADAPTERS.trainable(name):
            adapters[name] = p.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW(adapters.values(), 1e-1, weight_decay=0.0)

    def weights():
        out = dict(net.named_parameters())
        for name in (n.removesuffix(".lora_A.weight") for n in adapters if "lora_A" in n):
            own = adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]
            out[f"{name}.weight"] = out[f"{name}.weight"] + 2 * own
        return out

    for t in range(3):
        total, weight = loss(lambda x: torch.func.functional_call(net, weights(), (x,)), batch(t))
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
    return {n: x.detach() for n, x in sorted(weights().items())}


def program():
    """Micro-batches are the same at every world."""
    return Pair(sharded, plain)
