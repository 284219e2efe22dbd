"""Direct preference optimization: a policy against its frozen reference, which is sharded with a stage of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from programs.table import Pair, seeded
from torch import nn

import funczero as fz
from funczero import P


class Net(nn.Module):
    """A language model that looks one word back."""

    def __init__(self, dim=8, words=11):
        super().__init__()
        self.embed, self.head = nn.Embedding(words, dim), nn.Linear(dim, words)
        block = lambda: nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def log_prob(model, tokens):
    """Of every row, all words after the first."""
    logits = model(tokens[:, :-1]).log_softmax(-1)
    return logits.gather(-1, tokens[:, 1:, None]).sum((1, 2))


def margin(model, batch):
    """By how much the chosen row is likelier than the rejected one."""
    return log_prob(model, batch["chosen"]) - log_prob(model, batch["rejected"])


def dpo(policy, reference):
    """(sum over pairs, pairs)."""
    return -F.logsigmoid(0.5 * (policy - reference)).sum(), torch.tensor(float(len(policy)))


def batch(t):
    """Four pairs."""
    g = torch.Generator().manual_seed(t)
    return {name: torch.randint(11, (4, 6), generator=g) for name in ("chosen", "rejected")}


net = lambda: seeded(lambda: Net().double())  # the policy's first values, and the reference


def sharded(stage, accumulate):
    """The policy after a few updates."""
    summed = lambda model, batch: (margin(model, batch), torch.ones(()))
    margins, params = fz.stateless(net(), summed)

    def loss_fn(params, batch):
        with torch.no_grad():
            other, _ = margins(reference.params(), batch)
        return dpo(margins(params, batch)[0], other)

    grad = fz.value_and_grad(loss_fn, batch=P("data"), units=margins.units)
    chain = fz.zero(grad, fz.adam(1e-2), stage=stage, accumulate=accumulate)
    step = fz.train_step(*chain, mesh={"data": -1}, policy="float64")
    reference, state, losses = fz.frozen(params, step, stage=3), step.init(params), []
    for t in range(3):
        state, metrics = step(state, step.local_rows(batch(t)))
        losses.append(metrics.loss)
    return losses, step.params(state)


def plain():
    """The same in one process."""
    policy, reference, losses = net(), net(), []
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    for t in range(3):
        with torch.no_grad():
            other = margin(reference, batch(t))
        total, weight = dpo(margin(policy, batch(t)), other)
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        losses.append((total / weight).detach())
    return losses, {n: p.detach() for n, p in policy.named_parameters()}


def program():
    """Two trees of one module."""
    return Pair(sharded, plain)
