"""Derivatives by inputs and checkpoints inside a loss: plain torch's gradients at every stage, in every form."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from modules import build
from torch import nn
from torch.autograd import functional as A
from torch.utils.checkpoint import checkpoint

import funczero as fz
from funczero import P
from funczero.testing import simulate, tree_hash

DIM = 6
FORMS = {"keep": {}, "remat": {"remat": True}, "no units": {"units": ()}}
# by world; stages 0 and 1 are one way through the gradient, and so are all stages of one rank
RUNS = {2: [("keep", 0), ("keep", 2), ("keep", 3), ("remat", 3), ("no units", 3)], 1: [("keep", 3), ("remat", 3)]}


class Block(nn.Module):
    """A residual block with dropout, which may checkpoint what it holds."""

    def __init__(self, inside=None, p=0.0):
        super().__init__()
        self.up, self.down, self.drop, self.inside = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Dropout(p), inside
        self.gain = nn.Parameter(torch.tensor(0.5))

    def body(self, x):
        return self.drop(self.gain * self.down(torch.tanh(self.up(x)))) - self.gain

    def forward(self, x):
        return x + (self.body(x) if self.inside is None else checkpoint(self.body, x, use_reentrant=self.inside))


class Net(nn.Module):
    """Blocks between two layers; it may checkpoint the blocks, and run them twice."""

    def __init__(self, inside=None, around=None, passes=1, p=0.0):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(DIM, DIM), nn.ModuleList(), nn.Linear(DIM, 3)
        self.blocks.extend(Block(inside, p) for _ in range(3))
        self.around, self.passes = around, passes

    def forward(self, x):
        x = self.stem(x)
        for block in [*self.blocks] * self.passes:
            x = block(x) if self.around is None else checkpoint(block, x, use_reentrant=self.around)
        return self.head(x)


class Tables(nn.Module):
    """Embeddings that ask for sparse gradients."""

    def __init__(self):
        super().__init__()
        self.one, self.bag = nn.Embedding(7, DIM, sparse=True), nn.EmbeddingBag(7, DIM, sparse=True, mode="sum")
        self.net = Net()

    def forward(self, x):
        rows = x[:, 0].long() % 7
        return self.net(self.one(rows) + self.bag(rows[:, None]))


# --- losses -----------------------------------------------------------------------------------------------------------
def entropy(out, b):
    return F.cross_entropy(out, b["y"], reduction="sum")


def plain(m, b):
    return entropy(m(b["x"]), b)


def leaf(m, b):
    return entropy(m(b["x"].clone().requires_grad_()), b)


def attack(m, b):
    x = b["x"].clone().requires_grad_()
    (g,) = torch.autograd.grad(entropy(m(x), b), x)
    return entropy(m((x + 0.1 * g.sign()).detach()), b)


def feature(m, b):
    x = b["x"].clone().requires_grad_()
    out = m(x)
    (g,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    return entropy(out, b) + (g.detach() * m(b["x"]).sum(-1, keepdim=True)).sum()


def accumulated(m, b):
    x = b["x"].clone().requires_grad_()
    m(x).square().sum().backward(inputs=[x])
    return entropy(m(x.detach() + 0.1 * x.grad), b)


def penalty(m, b):
    x = b["x"].clone().requires_grad_()
    out = m(x)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return entropy(out, b) + g.square().sum()


def vjp(m, b, **kw):
    out, v = A.vjp(m, b["x"], torch.ones(len(b["x"]), 3, dtype=torch.float64), **kw)
    return entropy(m(b["x"] + 0.1 * v), b) + v.square().sum() + (out.sum() if kw else 0.0)


def jvp(m, b):
    _, dx = A.jvp(m, b["x"], torch.ones_like(b["x"]))
    return (m(b["x"]) - dx).square().sum()


def jacobian(m, b):
    j = A.jacobian(lambda x: m(x).sum(0), b["x"])
    return plain(m, b) + (j.sum(0) * b["x"]).sum() * m(b["x"]).sum()


def hessian(m, b, **kw):
    h = A.hessian(lambda x: m(x[None]).square().sum(), b["x"][0], **kw)
    return plain(m, b) + h.square().sum() * m(b["x"]).sum()


CASES = {
    **{f.__name__: (Net, f) for f in (plain, leaf, attack, feature, accumulated, penalty, vjp, jvp, jacobian, hessian)},
    "vjp, differentiated": (Net, lambda m, b: vjp(m, b, create_graph=True)),
    "hessian, differentiated": (Net, lambda m, b: hessian(m, b, create_graph=True)),
    "a checkpoint inside": (lambda: Net(inside=False), plain),
    "inside, twice": (lambda: Net(inside=False, passes=2), plain),
    "inside, an attack": (lambda: Net(inside=False), attack),
    "a checkpoint around": (lambda: Net(around=False), plain),
    "around, twice": (lambda: Net(around=False, passes=2), plain),
    "around, a leaf": (lambda: Net(around=False), leaf),
    "around and inside": (lambda: Net(inside=False, around=False), attack),
    "sparse embeddings": (Tables, plain),
    "compiled": (lambda: torch.compile(Net(), backend="eager"), plain),
    "compiled in place": (lambda: _compiled(Net()), attack),
}
QUICK = (
    "leaf",
    "attack",
    "penalty",
    "jacobian",
    "a checkpoint inside",
    "around and inside",
    "sparse embeddings",
    "compiled",
)
SECOND = "penalty", "jvp", "hessian", "vjp, differentiated", "hessian, differentiated"  # what remat has no graph for


def _compiled(net):
    for block in net.blocks:
        block.compile(backend="eager")
    return net


def counted(loss):
    return lambda m, b: (loss(m, b), torch.tensor(float(len(b["x"]))))


def batch():
    g = torch.Generator().manual_seed(0)
    return {"x": torch.randn(8, DIM, dtype=torch.float64, generator=g), "y": torch.arange(8) % 3}


def want(make, loss, world):
    """Of the plain module, micro-batch by micro-batch: gradients of the mean."""
    module = build(make, torch.float64)
    n, total = 8 // world, 0.0
    for i in range(world):
        total = total + loss(module, {k: v[i * n : (i + 1) * n] for k, v in batch().items()})
    module = getattr(module, "_orig_mod", module)
    found = torch.autograd.grad(total / 8, list(module.parameters()), allow_unused=True)
    pairs = zip(module.named_parameters(), found, strict=True)
    return {n: torch.zeros_like(p) if g is None else g.to_dense() for (n, p), g in pairs}


def got(make, loss, form, stage, rng=False):
    """The same from an update."""
    loss_fn, params = fz.stateless(build(make, torch.float64), counted(loss), **FORMS[form])
    step = fz.train_step(
        *fz.zero(fz.value_and_grad(loss_fn, batch=P("data"), rng=rng), fz.sgd(1.0), stage=stage),
        mesh={"data": -1},
        policy="float64",
    )
    state = step.init(params)
    old, new = step.params(state), step.params(step(state, step.local_rows(batch()))[0])
    return {n: old[n] - new[n] for n in old}


def everything(make, loss, runs):
    return {run: got(make, loss, *run) for run in runs}


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_gradients_are_plain_torchs(name, world):
    make, loss = CASES[name]
    runs = [(f, s) for f, s in RUNS[world] if not (f == "remat" and name in SECOND)]
    right = want(make, loss, world)
    for found in simulate({"data": world})(everything, make, loss, runs):
        for key, grads in found.items():
            assert max((right[n] - g).abs().max().item() for n, g in grads.items()) < 1e-12, key


@pytest.mark.parametrize("name", SECOND[:3])
def test_a_block_that_runs_again_has_no_second_derivative_and_says_so(name):
    make, loss = CASES[name]
    with pytest.raises(RuntimeError, match=r"\(remat\) is first-order only.*; leave remat out for this loss"):
        simulate({"data": 2})(got, make, loss, "remat", 3)


# --- checkpoints ------------------------------------------------------------------------------------------------------
def hashes():
    nets = {"plain": {}, "inside": {"inside": False}, "around": {"around": False}}
    return {
        (form, stage, how): tree_hash(got(partial(Net, p=0.3, **kw), plain, form, stage, rng=True))
        for how, kw in nets.items()
        for form, stage in (("keep", 0), ("keep", 3), ("remat", 3))
    }


@pytest.mark.parametrize("world", [1, 2])
def test_dropout_is_the_same_inside_checkpoints(world):
    for found in simulate({"data": world})(hashes):
        assert len(set(found.values())) == 1, found


@pytest.mark.parametrize(("form", "world"), [("keep", 1), ("keep", 2), ("remat", 2), ("no units", 2)])
@pytest.mark.parametrize("where", ["inside", "around"])
def test_a_reentrant_checkpoint_is_refused_in_our_words(where, form, world):
    with pytest.raises(TypeError, match=r"use_reentrant=True\) runs its function's .*; write use_reentrant=False"):
        simulate({"data": world})(got, lambda: Net(**{where: True}), plain, form, 3)


def opened(form):
    most = []

    def loss(m, b):
        out = plain(m, b)
        most.append(m.blocks[0].up.weight.tape)
        return out

    got(lambda: Net(inside=False), loss, form, 3)
    return most[0].gathers.peak, most[0].gathers.live


@pytest.mark.parametrize("form", ["keep", "remat"])
def test_a_checkpoint_inside_opens_no_third_unit(form):
    assert simulate({"data": 2})(opened, form) == [(2, 0)] * 2


# --- writes -----------------------------------------------------------------------------------------------------------
class Clamped(Block):
    """It clamps its weights on the way."""

    def forward(self, x):
        with torch.no_grad():
            self.up.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def clamps(where):
    net = Net()
    if where == "a block":
        net.blocks[1] = Clamped()
    elif where == "max_norm":
        net.stem = nn.Sequential(nn.Embedding(7, DIM, max_norm=0.5))
    return net


WRITES = {"a block": "blocks.1.up.weight", "the rest": "head.weight", "max_norm": "stem.0.weight"}


def writing(where, form, stage, higher):
    def loss(m, b):
        if where == "the rest":
            with torch.no_grad():
                m.head.weight.clamp_(-0.1, 0.1)
        x = b["y"] if where == "max_norm" else b["x"]
        return m(x).square().sum(), torch.tensor(float(len(x)))

    loss_fn, params = fz.stateless(build(lambda: clamps(where), torch.float64), loss, **FORMS[form])
    grad = fz.value_and_grad(loss_fn, batch=P("data"), higher_order=higher)
    step = fz.train_step(*fz.zero(grad, fz.sgd(1.0), stage=stage), mesh={"data": -1}, policy="float64")
    try:
        step(step.init(params), step.local_rows(batch()))
    except RuntimeError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("where", WRITES)
def test_a_write_into_a_parameter_is_refused_by_path_and_the_projection_is_named(where, world):
    for form, stage in RUNS[world]:
        for higher in (False, True) if stage == 3 and form != "remat" else (False,):
            for said in simulate({"data": world})(writing, where, form, stage, higher):
                assert f"writes into parameter {WRITES[where]!r} in place" in said and "fz.project(fn)" in said, said
