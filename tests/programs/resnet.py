"""A ResNet with batch norm, trained with SGD; its statistics are averaged over the micro-batches of an update."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from programs.table import MICROS, Pair, seeded
from torch import nn

import funczero as fz
from funczero import P
from funczero.core.rows import split


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet18 with four channels for sixty-four."""

    def __init__(self, width=4, classes=3):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width * 2**i for i in range(4)]
        stages = zip([width, *widths[:-1]], widths, strict=True)
        self.layers = nn.ModuleList(nn.Sequential(Block(a, b, 1 + (a < b)), Block(b, b, 1)) for a, b in stages)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


def loss(model, batch):
    """Cross entropy of every image."""
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), torch.tensor(float(len(batch["y"])))


def batch(t, rows=8):
    g = torch.Generator().manual_seed(t)
    return {
        "x": torch.randn(rows, 3, 8, 8, dtype=torch.float64, generator=g),
        "y": torch.randint(3, (rows,), generator=g),
    }


def sharded(stage, accumulate):
    loss_fn, params = fz.stateless(seeded(lambda: ResNet().double()), loss)
    grad, sgd = fz.value_and_grad(loss_fn, batch=P("data")), fz.sgd(0.05, momentum=0.9, weight_decay=1e-4)
    step = fz.train_step(*fz.zero(grad, sgd, stage=stage, accumulate=accumulate), mesh={"data": -1}, policy="float64")
    state = step.init(params)
    for t in range(3):
        state, _ = step(state, step.local_rows(batch(t)))
    test, _ = fz.stateless(ResNet().double().eval(), loss)
    alone = {n: x[:1] for n, x in batch(9).items()}  # the same row on every rank, so that no sum is rounded otherwise
    return {**step.params(state), **state.model_state}, step.eval(test)(state, alone).loss


def plain():
    module = seeded(lambda: ResNet().double())
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    for t in range(3):
        optimizer.zero_grad()
        micros = split(batch(t), MICROS, "plain")
        replicas = [deepcopy(module) for _ in micros]  # each reads the same statistics
        for replica, micro in zip(replicas, micros, strict=True):
            (loss(replica, micro)[0] / 8).backward()
        for p, *copies in zip(module.parameters(), *(r.parameters() for r in replicas), strict=True):
            p.grad = sum(c.grad for c in copies)
        for b, *copies in zip(module.buffers(), *(r.buffers() for r in replicas), strict=True):
            b.copy_(sum(copies) / MICROS)
        optimizer.step()
    values = {n: x.detach() for n, x in [*module.named_parameters(), *module.named_buffers()]}
    with torch.no_grad():
        return values, loss(module.eval(), {n: x[:1] for n, x in batch(9).items()})[0]


def program():
    """In three updates of two micro-batches."""
    return Pair(sharded, plain)
