"""The same for modules: loops, experts, autocast and inner gradients within an unmodified forward, through
fz.stateless.
"""

from __future__ import annotations

import cover
import pytest
import torch
import zoo
from cover import EACH
from torch import nn

import funczero as fz
from funczero import P
from funczero.layout.processes import world_size

LR, ROWS, MICROS = 0.01, 2, 4


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Blocks that a micro-batch visits in the order that its subclass says."""

    def __init__(self, width=6):
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Linear(6, width),
            nn.ModuleList(Block(width) for _ in range(3)),
            nn.Linear(width, 3),
        )

    def order(self, route):
        return range(3)

    def forward(self, x, route):
        x = self.embed(x)
        for i in self.order(route):
            x = self.blocks[i](x)
        return self.head(x)


class Looped(Net):
    def order(self, route):
        return (0, 1, 0, 2, 1, 0)


class Routed(Net):
    def order(self, route):
        return [int(route[0])][: int(route[0]) < 3]


class Cast(Net):
    def forward(self, x, route):
        with torch.autocast("cpu", torch.bfloat16):
            x = super().forward(x, route)
        return x.double()

    def order(self, route):
        return (0, 1, 0, 2)


def plain(model, b):
    return model(b["x"], b["route"]).square().sum(), torch.tensor(float(len(b["x"])))


def attack(model, b):
    x = b["x"].clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x, b["route"]).square().sum(), x)
    return model((x + 0.1 * g.sign()).detach(), b["route"]).square().sum(), torch.tensor(float(len(x)))


def penalty(model, b):
    x = b["x"].clone().requires_grad_()
    out = model(x, b["route"])
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.square().sum() + g.square().sum(), torch.tensor(float(len(x)))


CASES = {
    "looped": (Looped, plain),
    "routed": (Routed, plain),
    "cast": (Cast, plain),
    "attack": (Net, attack),
    "penalty": (Net, penalty),
    "loop attack": (Looped, attack),
}


FORMS = {"keep": (None, False), "remat": (None, True), "whole": ((), False)}


def model_of(cls):
    torch.manual_seed(0)
    return cls().double()


def batch():
    x = torch.randn(ROWS * MICROS, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"x": x, "route": torch.tensor([0, 2, 1, 3]).repeat_interleave(ROWS)}


def ways(name, whole):
    """By world the stages and forms in which a case is tried."""
    return cover.ways(name, CASES, FORMS, whole, ("routed",))


def runs(name, ways):
    """By units: a hash by (stage, remat); and the masters."""
    cls, loss = CASES[name]
    found, masters = {None: {}, (): {}}, None
    for stage, form in ways:
        units, remat = FORMS[form]
        loss_fn, p = fz.stateless(model_of(cls), loss, units=units, remat=remat)
        parts = fz.zero(
            fz.value_and_grad(loss_fn, batch=P("data")), fz.sgd(LR), stage=stage, accumulate=MICROS // world_size()
        )
        step = fz.train_step(*parts, mesh={"data": -1}, policy="float64")
        state = step.init(p)
        if loss is penalty and remat and stage > 1 and world_size() > 1:
            with pytest.raises(RuntimeError, match="first-order only, but create_graph=True .* leave remat out"):
                step(state, step.local_rows(batch()))
            continue
        for _ in range(2):
            state, _ = step(state, step.local_rows(batch()))
        masters = step.params(state)
        found[units][stage, remat] = zoo.tree_hash(masters)
    return [sorted(set(v.values())) for v in found.values()], {k: v.tolist() for k, v in masters.items()}


def reference(name):
    """Two updates of the module itself, by torch's SGD."""
    cls, loss = CASES[name]
    model = model_of(cls)
    tx = torch.optim.SGD(model.parameters(), LR)
    for _ in range(2):
        sums = [loss(model, {k: v.chunk(MICROS)[i] for k, v in batch().items()}) for i in range(MICROS)]
        tx.zero_grad()
        (sum(s for s, _ in sums) / sum(w for _, w in sums)).backward()
        tx.step()
    return {k: v.detach() for k, v in model.named_parameters()}


@EACH
@pytest.mark.parametrize("name", CASES)
def test_modules_give_plain_torchs_values_and_one_hash(run_world, name, whole):
    want, seen = reference(name), []
    for world, some in ways(name, whole).items():
        hashes, masters = zoo.everywhere(run_world, world, runs, name, some)
        off = max(float((want[k] - torch.tensor(v, dtype=torch.float64)).abs().max()) for k, v in masters.items())
        assert off < (2e-2 if name == "cast" else 1e-12)
        seen.append(hashes)
    assert all(len({*one, *two}) == 1 for one, two in zip(*seen, strict=True))
