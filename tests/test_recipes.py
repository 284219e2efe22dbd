"""The recipes of docs/recipes.md, as they stand there: against plain torch, at every stage, on one rank and on two."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cover import EACH, places
from layouts import cut
from torch.func import grad, hessian, vmap

import funczero as fz
from funczero import P
from funczero.testing import tree_hash

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
TOLERANCE = 1e-10


def recipes():
    """The page's names, all blocks run one after another."""
    space = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(compile(code, str(PAGE), "exec"), space)
    return SimpleNamespace(**space)


def rows(n, seed=1):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    return {"x": draw(n, 2), "y": draw(n, 1)}


def gap(a, b):
    top = max(x.abs().max().item() for x in b.values())
    return max((a[k] - x).abs().max().item() if x.numel() else 0.0 for k, x in b.items()) / top


def at_hand(stage):
    r = recipes()
    step = r.made(stage)
    state = step.init(r.params())
    loss = fz.sharded_loss(step, r.loss_fn, state)
    mean = lambda p, b: r.loss_fn(p, b)[0] / len(b["y"])
    return r, step, state, loss, fz.parts(state), mean


def influenced(stage):
    r, step, state, loss, p, mean = at_hand(stage)
    train, test, one = rows(16), rows(4, 2), rows(1, 3)
    same = {k: x.expand(2, *x.shape[1:]) for k, x in one.items()}  # the mean over ranks is the row's own
    how = dict(damping=1.0, iterations=100, tolerance=1e-28)
    got = r.influence(loss, p, *map(step.local_rows, (train, test, same)), **how)
    flat = lambda t: torch.cat([t[k].reshape(-1) for k in r.params()])
    whole = r.params()
    second = hessian(mean)(whole, train)
    n = {k: x.numel() for k, x in whole.items()}
    h = torch.cat([torch.cat([second[a][b].reshape(n[a], n[b]) for b in n], 1) for a in n])
    solved = torch.linalg.solve(h + torch.eye(len(h), dtype=h.dtype), flat(grad(mean)(whole, test)))
    want = -flat(grad(mean)(whole, one)) @ solved
    return {"influence": abs((got - want) / want).item()}


def private(stage):
    r, limit, b = recipes(), 0.5, rows(8)
    whole = r.params()
    step = r.made(stage, fz.accumulate(2), fz.sgd(1.0), loss=r.clipped_per_sample(r.loss_fn, limit))
    state, metrics = step(step.init(r.params()), step.local_rows(b))

    def clipped(row):
        g = grad(lambda p: r.loss_fn(p, {k: x[None] for k, x in row.items()})[0])(whole)
        norm = sum((x**2).sum() for x in g.values()).sqrt()
        return {k: x * (limit / norm).clamp(max=1.0) for k, x in g.items()}

    want = {k: x.sum(0) / 8 for k, x in vmap(clipped)(b).items()}
    moved = {k: whole[k] - x for k, x in step.params(state).items()}
    loss = r.loss_fn(whole, b)[0] / 8
    return {"clipped": gap(moved, want), "loss": abs((metrics.loss - loss) / loss).item()}


class Tied(torch.nn.Module):
    """A weight at two paths, and a bias that does not learn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.a.bias.requires_grad_(False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def tied(stage):
    r, limit, b, net = recipes(), 0.05, rows(8), Tied().double()
    squares = lambda model, b: (((model(b["x"]) - b["y"]) ** 2).sum(), b["y"].new_tensor(float(len(b["y"]))))
    fn, whole = fz.stateless(net, squares)
    clip = r.clipped_per_sample(fn, limit)
    source = fz.value_and_grad(clip, batch=P("data"), trainable=fn.trainable)
    step = fz.train_step(*fz.zero(source, fz.sgd(1.0), stage=stage), mesh={"data": -1}, policy="float64")
    state, _ = step(step.init(whole), step.local_rows(b))
    want = {n: torch.zeros_like(x) for n, x in net.named_parameters()}
    learns = {n: x for n, x in net.named_parameters() if x.requires_grad}
    for i in range(8):
        loss, _ = squares(net, {k: x[i : i + 1] for k, x in b.items()})
        g = dict(zip(learns, torch.autograd.grad(loss, list(learns.values())), strict=True))
        norm = sum((x**2).sum() for x in g.values()).sqrt()
        for k, x in g.items():
            want[k] += x * (limit / norm).clamp(max=1.0) / 8
    new = step.params(state)
    return {"tied": gap({k: whole[k] - new[k] for k in want}, want)}


def sharp(stage, k):
    """A hash of three updates with SAM, and how far they are from plain torch's."""
    r, p = recipes(), recipes().params()
    step = r.made(stage, fz.accumulate(k), r.sam(0.1), fz.clip_by_global_norm(0.5), fz.sgd(0.1))
    state = step.init(p)
    mean = lambda p, b: r.loss_fn(p, b)[0] / len(b["y"])
    for i in range(3):
        b = rows(8, i)
        state, _ = step(state, step.local_rows(b))
        size = lambda g: sum((x**2).sum() for x in g.values()).sqrt()
        g = grad(mean)(p, b)
        g = grad(mean)({k: x + 0.1 * g[k] / size(g) for k, x in p.items()}, b)
        p = {k: x - 0.1 * g[k] * (0.5 / size(g)).clamp(max=1) for k, x in p.items()}
    return tree_hash(step.params(state)), gap(step.params(state), p)


def adapted(stage):
    r, step, state, loss, p, mean = at_hand(stage)
    step = r.made(stage, fz.sgd(0.1))
    state = step.init(r.params())
    tasks = [(rows(8, i), rows(8, i + 9)) for i in (1, 2)]
    new = r.maml_step(step, loss, state, [(step.local_rows(a), step.local_rows(b)) for a, b in tasks], 0.5)

    def plain(p):
        total = 0.0
        for support, query in tasks:
            q = p
            for _ in range(3):
                g = grad(mean)(q, support)
                q = {k: x - 0.1 * g[k] for k, x in q.items()}
            total = total + mean(q, query)
        return total / 2

    g = grad(plain)(r.params())
    want = {k: x - 0.5 * g[k] for k, x in r.params().items()}
    return {"maml": gap(step.params(new), want)}


def rated(stage):
    r, step, state, loss, p, mean = at_hand(stage)
    given, valid = [rows(8, i) for i in range(7)], step.local_rows(rows(8, 20))
    rates = torch.full((7,), 0.05, dtype=torch.float64)
    local = [step.local_rows(b) for b in given]
    measure = lambda r_: r.loss_of_rates(step, loss, state, r_, local, valid).item()
    better = r.better_rates(step, loss, state, rates, local, valid, lr=1e-3)
    slope, h = (rates - better) / 1e-3, 1e-6
    worst = 0.0
    for i in (0, 3, 6):
        d = torch.zeros(7).double()
        d[i] = h
        worst = max(worst, abs(slope[i].item() - (measure(rates + d) - measure(rates - d)) / (2 * h)))
    assert worst < 1e-7 * slope.abs().max().item() and measure(better) < measure(rates)  # of differences, and it learns
    return {}


def squared(stage):
    r, step, state, loss, p, mean = at_hand(stage)
    b, whole = rows(8), r.params()
    each = vmap(lambda row: grad(lambda p: r.loss_fn(p, {k: x[None] for k, x in row.items()})[0])(whole))(b)
    want = {k: (x**2).sum(0) / 8 for k, x in each.items()}
    return {"fisher": gap(r.fisher(loss, p, step.local_rows(b), 8), cut(loss, want))}


def tangent(stage):
    r, step, state, loss, p, mean = at_hand(stage)
    b, whole = rows(8), r.params()
    each = vmap(lambda x: grad(lambda p: r.predict(p, x[None]).sum())(whole))(b["x"])
    flat = torch.cat([g.flatten(1) for g in each.values()], 1)
    want = step.local_rows({"k": flat @ flat.T})["k"]
    return {"kernel": gap({"": r.tangent_kernel(loss, p, step.local_rows(b)["x"])}, {"": want})}


RECIPES = [influenced, private, tied, adapted, rated, squared, tangent]


@EACH
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.__name__)
def test_a_recipe_is_plain_torchs(run_world, recipe, whole):
    for world, stage in places(recipe, RECIPES, whole):
        for found in run_world(2, recipe, stage) if world == 2 else [recipe(stage)]:
            assert all(e < TOLERANCE for e in found.values()), found


def test_sam_has_the_same_bits_at_every_stage(run_world):
    want, error = sharp(0, 4)
    assert error < TOLERANCE
    for stage in range(4):
        assert run_world(2, sharp, stage, 2) == [(want, error)] * 2


def test_each_is_short():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1:]
    assert len(blocks) == 7 and all(len(b.splitlines()) <= 25 for b in blocks)
