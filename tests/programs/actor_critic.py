"""Advantage actor-critic on a shared trunk: one loss of both heads, an optimizer with a schedule for each part."""

from __future__ import annotations

import torch
from programs.table import Program
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import funczero as fz

DECAYED = lambda n: 1 / (1 + n)


class ActorCritic(nn.Module):
    """Logits of three actions, and a value."""

    def __init__(self, dim=4, wide=8):
        super().__init__()
        layer = lambda: nn.Sequential(nn.Linear(wide, wide), nn.Tanh())
        self.into, self.trunk = nn.Linear(dim, wide), nn.ModuleList(layer() for _ in range(3))
        self.actor, self.critic = nn.Linear(wide, 3), nn.Linear(wide, 1)

    def forward(self, x):
        x = self.into(x)
        for layer in self.trunk:
            x = x + layer(x)
        return self.actor(x).log_softmax(-1), self.critic(x).squeeze(-1)


def loss(model, batch):
    """Policy gradient with the advantage, half the square of it, a bonus of entropy."""
    logits, value = model(batch["seen"])
    advantage = batch["returned"] - value
    chosen = logits.gather(-1, batch["action"][:, None]).squeeze(-1)
    entropy = -(logits.exp() * logits).sum(-1)
    each = -chosen * advantage.detach() + 0.5 * advantage.square() - 0.01 * entropy
    return each.sum(), torch.tensor(float(len(each)))


def batch(t):
    """Eight moments of play."""
    g = torch.Generator().manual_seed(t)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return {"seen": new(8, 4), "returned": new(8), "action": torch.randint(3, (8,), generator=g)}


class Two:
    """torch's two optimizers and two schedules, stepped together."""

    def __init__(self, params):
        *trunk, weight, bias = params  # the critic's are the last two
        self.critic = torch.optim.SGD([weight, bias], 1e-1)
        self.rest = torch.optim.AdamW(trunk, 1e-2, betas=(0.8, 0.99), weight_decay=0.1)
        self.schedules = [LambdaLR(self.critic, DECAYED), LambdaLR(self.rest, lambda n: 0.9**n)]

    def zero_grad(self):
        for own in (self.critic, self.rest):
            own.zero_grad()

    def step(self):
        for own in (self.critic, self.rest, *self.schedules):
            own.step()


def program():
    """The critic's head by itself."""
    rest = fz.adamw(lambda n: 1e-2 * 0.9**n, b1=0.8, b2=0.99, weight_decay=0.1)
    parts = [("critic", fz.sgd(lambda n: 1e-1 * DECAYED(n))), ("", rest)]
    return Program(
        make=lambda: ActorCritic().double(),
        loss=loss,
        batch=batch,
        chain=lambda: (fz.partition(parts),),
        optimizer=Two,
    )
