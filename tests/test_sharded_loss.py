"""torch.func over sharded parameters: every derivative is the unsharded one, at every stage."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from layouts import cut
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap

import funczero as fz
from funczero import P
from funczero.testing import simulate

TOLERANCE = 1e-10
TREE = {"w": (5, 3), "b": (3,), "v": (3, 2), "s": ()}


def params(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=g, dtype=torch.float64) * 0.5 for n, shape in TREE.items()}


def rows(n=8):
    g = torch.Generator().manual_seed(9)
    return {
        "x": torch.randn(n, 5, generator=g, dtype=torch.float64),
        "y": torch.randn(n, 2, generator=g, dtype=torch.float64),
    }


def loss_fn(p, b):
    out = torch.tanh(b["x"] @ p["w"] + p["b"]) @ p["v"] * p["s"]
    return ((out - b["y"]) ** 2).sum(), torch.tensor(float(len(b["x"])), dtype=torch.float64)


def block(p, x):
    return x + torch.tanh(x @ p["w"] + p["b"])


def deep_loss(p, b):
    """The same kind of loss with blocks, which are units."""
    out = fz.layers(block, p["blocks"], torch.tanh(b["x"] @ p["inp"])) @ p["out"]
    return ((out - b["y"]) ** 2).sum(), torch.tensor(float(len(b["x"])), dtype=torch.float64)


def deep(seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64) * 0.5
    return {"blocks": [{"w": draw(3, 3), "b": draw(3)} for _ in range(2)], "inp": draw(5, 3), "out": draw(3, 2)}


class Problem(NamedTuple):
    """A loss, its parameters by seed, and what of it are units."""

    loss: Any = loss_fn
    params: Any = params
    units: tuple = ()

    def mean(self):
        """The mean over rows as a function of leaves by path."""
        form = fz.tree.flatten(self.params())[1]

        def loss(p, b):
            loss, weight = self.loss(fz.tree.unflatten(list(p.values()), form), b)
            return loss / weight

        return loss

    def leaves(self, seed=0):
        return dict(fz.tree.paths(self.params(seed)))


FLAT, UNITS = Problem(), Problem(deep_loss, deep, ("blocks",))


def clipped(g):
    norm = sum((x * x).sum() for x in g.values()).sqrt()
    return {n: x / norm.clamp(min=1.0) for n, x in g.items()}


def penalty(p, b, loss):
    """A gradient penalty on parameters, and one on inputs."""
    first = grad(loss)(p, b)
    return loss(p, b) + 0.1 * sum((x**2).sum() for x in first.values())


def derivatives(loss, p, t, b, dot):
    """Everything that is asked for, as trees by path."""
    g = grad(loss)
    return {
        "value": {"": loss(p, b)},
        "grad": g(p, b),
        "jvp": {"": jvp(lambda p: loss(p, b), (p,), (t,))[1]},
        "vjp": vjp(lambda p: loss(p, b), p)[1](torch.tensor(2.0, dtype=torch.float64))[0],
        "hvp forward over reverse": jvp(lambda p: g(p, b), (p,), (t,))[1],
        "hvp reverse over reverse": grad(lambda p: dot(g(p, b), t))(p),
        "hvp reverse over forward": grad(lambda p: jvp(lambda q: loss(q, b), (p,), (t,))[1])(p),
        "third": jvp(lambda p: jvp(lambda p: g(p, b), (p,), (t,))[1], (p,), (t,))[1],
        "inputs": {"x": grad(lambda x: dot(grad(loss)(p, {**b, "x": x}), t))(b["x"])},
        "members": vmap(lambda s: g({n: x * s for n, x in p.items()}, b))(torch.tensor([1.0, 0.5]).double()),
    }


def sharded(stage, mesh, axes, problem=FLAT):
    g = fz.value_and_grad(problem.loss, batch=P(axes), units=problem.units)
    chain = fz.hpz(g, fz.sgd(0.1)) if stage == "hpz" else fz.zero(g, fz.sgd(0.1), stage=stage, axis=axes)
    step = fz.train_step(*chain, mesh=mesh, policy="float64")
    state = step.init(problem.params())
    return step, state, fz.sharded_loss(step, problem.loss, state)


def compared(stage, mesh, axes=("data",), problem=FLAT):
    """By name the largest difference from plain torch.func on whole parameters, relative to the largest value."""
    step, state, loss = sharded(stage, mesh, axes, problem)
    p, t, b, mean_loss = problem.leaves(), problem.leaves(1), rows(), problem.mean()
    plain_dot = lambda a, b: sum((a[n] * b[n]).sum() for n in b)
    want = derivatives(mean_loss, p, t, b, plain_dot)
    mine = step.local_rows(b)
    got = derivatives(loss, fz.parts(state), cut(loss, t), mine, loss.dot)
    errors = {}
    for name, leaves in want.items():
        if name == "inputs":
            parts = {"x": step.local_rows(leaves)["x"]}
        else:
            parts = leaves if name in ("value", "jvp") else cut(loss, leaves)
        top = max([x.abs().max().item() for x in leaves.values()])
        errors[name] = (
            max([(got[name][n] - x).abs().max().item() if x.numel() else 0.0 for n, x in parts.items()]) / top
        )
    whole = hessian(mean_loss)(p, b)
    found = fz.hessian(loss)(fz.parts(state), mine)
    errors["hessian"] = max(
        (found[a][n] - x).abs().max().item() if x.numel() else 0.0
        for a in whole
        for n, x in cut(loss, whole[a]).items()
    )
    reverse = fz.jacrev(loss, lambda p, b: grad(loss)(p, b))(fz.parts(state), mine)
    errors["jacrev"] = max(
        (found[a][n] - reverse[a][n]).abs().max().item() if found[a][n].numel() else 0.0 for a in whole for n in whole
    )
    forward = fz.jacfwd(loss, loss)(fz.parts(state), mine)
    first = grad(mean_loss)(p, b)
    errors["jacfwd"] = max((forward[n] - x).abs().max().item() for n, x in first.items())
    every = vmap(lambda r: clipped(grad(lambda p: mean_loss(p, {k: x[None] for k, x in r.items()}))(p)))(b)
    clip = fz.per_sample(loss, clipped)(fz.parts(state), mine)
    errors["per sample"] = max(
        (clip[n] - x).abs().max().item() if x.numel() else 0.0
        for n, x in cut(loss, {n: x.sum(0) for n, x in every.items()}).items()
    )
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_derivatives_are_those_of_the_unsharded_loss(run_world, stage):
    for errors in run_world(2, compared, stage, {"data": 2}, timeout=300.0):
        assert all(e < TOLERANCE for e in errors.values()), errors


@pytest.mark.parametrize("stage", [pytest.param(s, marks=pytest.mark.slow) for s in (3, "hpz")])
def test_over_two_axes(run_world, stage):
    for errors in run_world(4, compared, stage, {"node": 2, "local": 2}, ("node", "local"), timeout=300.0):
        assert all(e < TOLERANCE for e in errors.values()), errors


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.slow) for s in range(3)), 3])
def test_with_units(run_world, stage):
    for errors in run_world(2, compared, stage, {"data": 2}, ("data",), UNITS, timeout=300.0):
        assert all(e < TOLERANCE for e in errors.values()), errors


@pytest.mark.slow
def test_with_units_over_two_axes(run_world):
    mesh = {"node": 2, "local": 2}
    for errors in run_world(4, compared, "hpz", mesh, ("node", "local"), UNITS, timeout=300.0):
        assert all(e < TOLERANCE for e in errors.values()), errors


class Tied(nn.Module):
    """Two blocks, a weight at two paths, and a bias that does not learn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        self.out.weight = self.emb.weight
        self.norm.bias.requires_grad_(False)

    def forward(self, x):
        h = self.emb(x)
        for b in self.blocks:
            h = h + b(h)
        return self.out(self.norm(h))


WORDS = {"x": torch.arange(24).view(8, 3) % 11, "y": torch.arange(24).view(8, 3) * 3 % 11}


def nll(model, b):
    loss = F.cross_entropy(model(b["x"]).flatten(0, 1), b["y"].flatten(), reduction="sum")
    return loss, torch.tensor(float(b["x"].numel()), dtype=torch.float64)


def of_a_module(stage):
    """An unmodified module's gradient, and that of its gradient's square, by path; with where this rank's parts lie."""
    fn, p = fz.stateless(Tied().double(), nll)
    g = fz.value_and_grad(fn, batch=P("data"), trainable=fn.trainable)
    step = fz.train_step(*fz.zero(g, fz.sgd(0.1), stage=stage), mesh={"data": 2}, policy="float64")
    state = step.init(p)
    loss, mine, rows = fz.sharded_loss(step, fn, state), fz.parts(state), step.local_rows(WORDS)
    first = grad(loss)(mine, rows)
    second = grad(lambda p: (lambda g: loss.dot(g, g))(grad(loss)(p, rows)))(mine)
    return first, second, loss


@pytest.mark.parametrize("stage", [0, 3])
def test_an_unmodified_module_is_a_loss_of_its_parts(stage):
    net = Tied().double()
    learns = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}

    def plain(p):
        logits = functional_call(net, {**p, "out.weight": p["emb.weight"]}, (WORDS["x"],))
        return F.cross_entropy(logits.flatten(0, 1), WORDS["y"].flatten(), reduction="sum") / WORDS["x"].numel()

    want = grad(plain)(learns), grad(lambda p: sum((x * x).sum() for x in grad(plain)(p).values()))(learns)
    for first, second, loss in simulate({"data": 2})(of_a_module, stage):
        for got, whole in zip((first, second), want, strict=True):
            assert not got["norm.bias"].count_nonzero() and set(got) == {*whole, "norm.bias"}
            for n, x in cut(loss, {**whole, "norm.bias": torch.zeros(6).double()}).items():
                torch.testing.assert_close(got[n], x, rtol=0, atol=1e-12)


def test_rows_one_by_one_may_be_none_and_beside_what_is_no_tensor():
    step, state, loss = sharded(3, {"data": 1}, ("data",))
    p, b = fz.parts(state), rows()
    none = fz.per_sample(loss, clipped, rows=2)(p, {k: x[:0] for k, x in b.items()})
    assert all(not none[n].count_nonzero() and none[n].shape == x.shape for n, x in p.items())
    want, got = fz.per_sample(loss, clipped)(p, b), fz.per_sample(loss, clipped, rows=3)(p, {**b, "tag": None, "n": 3})
    for n, x in want.items():
        torch.testing.assert_close(got[n], x, rtol=1e-13, atol=1e-14)


def private(stage):
    """Clipped gradients of single rows where two leaves do not learn."""
    g = fz.value_and_grad(loss_fn, batch=P("data"), trainable="w|s")
    step = fz.train_step(*fz.zero(g, fz.sgd(0.1), stage=stage), mesh={"data": 2}, policy="float64")
    state = step.init(params())
    loss = fz.sharded_loss(step, loss_fn, state)
    return fz.per_sample(loss, clipped)(fz.parts(state), step.local_rows(rows())), loss


@pytest.mark.parametrize("stage", [0, 3])
def test_a_clip_of_single_rows_does_not_see_what_is_frozen(stage):
    p = params()

    def one(row):
        g = grad(lambda q: loss_fn({**p, **q}, {k: x[None] for k, x in row.items()})[0])({k: p[k] for k in ("w", "s")})
        return clipped(g)

    want = {**fz.tree.map(torch.zeros_like, p), **{k: x.sum(0) for k, x in vmap(one)(rows()).items()}}
    for got, loss in simulate({"data": 2})(private, stage):
        for n, x in cut(loss, want).items():
            torch.testing.assert_close(got[n], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_loss_is_divided_by_the_weight_that_there_is(dtype):
    """100001 rows are 99840 in bfloat16, and inf in float16."""
    narrow = lambda p, b: (loss_fn(p, b)[0].to(dtype), torch.tensor(100001.0))
    step, state, _ = sharded(3, {"data": 1}, ("data",))
    loss, want = fz.sharded_loss(step, narrow, state), narrow(params(), rows())[0].float() / 100001.0
    assert loss(fz.parts(state), rows()).item() == want.item()
    whole = grad(lambda p: loss_fn(p, rows())[0])(params())
    for n, x in grad(loss)(fz.parts(state), rows()).items():
        torch.testing.assert_close(x, whole[n] / 100001.0, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("units", [(), ("blocks",)], ids=["whole", "units"])
def test_a_loss_with_a_key_has_a_hessian(units):
    """Every coordinate is that of one mask."""

    def keyed(p, b):
        drop = lambda q, x, key: x + fz.rng.dropout(torch.tanh(x @ q["w"] + q["b"]), 0.5, key)
        out = fz.layers(drop, p["blocks"], torch.tanh(b["x"] @ p["inp"]), key=3) @ p["out"]
        return ((out - b["y"]) ** 2).sum(), b["y"].new_tensor(float(len(b["y"])))

    problem = Problem(keyed, deep, units)
    _, state, loss = sharded(3, {"data": 1}, ("data",), problem)
    p, t, b, mean = problem.leaves(), problem.leaves(1), rows(), problem.mean()
    want = jvp(lambda p: grad(mean)(p, b), (p,), (t,))[1]
    found = fz.hessian(loss)(fz.parts(state), b)
    for n, x in want.items():
        along = sum((found[m][n] * t[m].reshape(t[m].shape + (1,) * x.dim())).sum(tuple(range(t[m].dim()))) for m in p)
        torch.testing.assert_close(along, x, rtol=1e-10, atol=1e-12)


def test_what_is_no_tree_of_parts_is_refused():
    _, state, loss = sharded(3, {"data": 1}, ("data",))
    with pytest.raises(TypeError, match=r"give what fz.parts\(state\) returned"):
        loss({"w": torch.zeros(5, 3)}, rows())
    with pytest.raises(ValueError, match=r"'w' has shape \(2, 3\), and this rank's part is \(5, 3\)"):
        loss({**fz.parts(state), "w": torch.zeros(2, 3)}, rows())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode, whose tensors have no derivative"):
        loss(fz.parts(state), rows())


@pytest.mark.parametrize("stage", [0, 3])
def test_a_loss_that_writes_into_what_it_is_given_is_refused_by_path(stage):
    def said():
        def loss_fn(p, b):
            with torch.no_grad():
                p["w"].clamp_(-1, 1)
            return (p["w"] * b).sum(), torch.tensor(float(len(b)))

        grad = fz.value_and_grad(loss_fn, batch=P("data"))
        step = fz.train_step(*fz.zero(grad, fz.sgd(0.1), stage=stage), mesh={"data": -1})
        state = step.init({"w": torch.full((4,), 2.0)})
        with pytest.raises(RuntimeError, match=r"writes into parameter 'w' in place.*fz\.project"):
            fz.sharded_loss(step, loss_fn, state)(fz.parts(state), torch.ones(2, 4))
        return True

    assert simulate({"data": 2})(said) == [True, True]
