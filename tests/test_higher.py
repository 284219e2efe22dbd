"""value_and_grad(higher_order=True): losses that take derivatives of their own through units, at every stage."""

from __future__ import annotations

from itertools import groupby, product

import pytest
import torch
from cover import EACH, cover
from torch import nn
from torch.func import grad, jvp, vmap

import funczero as fz
from funczero import P

TOLERANCE = 1e-10
BLOCKS = 3


def params():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64) * 0.4
    return {"inp": draw(5, 6), "blocks": [{"w": draw(6, 6), "b": draw(6)} for _ in range(BLOCKS)], "out": draw(6, 1)}


def rows(n=8):
    g = torch.Generator().manual_seed(9)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    return {"x": draw(n, 5), "v": draw(n, 5)}


def block(p, x):
    return x + torch.tanh(x @ p["w"] + p["b"])


def critic(p, x):
    return (fz.layers(block, p["blocks"], torch.tanh(x @ p["inp"])) @ p["out"]).squeeze(-1)


def penalty_by_autograd(p, b):
    """WGAN-GP's penalty, as everybody writes it."""
    x = b["x"].clone().requires_grad_()
    (g,) = torch.autograd.grad(critic(p, x).sum(), x, create_graph=True)
    return ((g.norm(dim=1) - 1) ** 2).sum() + critic(p, b["x"]).sum()


def penalty_by_func(p, b):
    each = vmap(grad(lambda x: critic(p, x[None]).sum()))(b["x"])
    return ((each.norm(dim=1) - 1) ** 2).sum()


def mean_flow(p, b):
    """A jvp inside a loss, of which one half is a target."""
    out, along = jvp(lambda x: critic(p, x), (b["x"],), (b["v"],))
    return ((out + along) ** 2).sum() + (out - along.detach()).square().sum()


def curvature(p, b):
    """The second derivative along v, forward over reverse."""
    score = lambda x: critic(p, x).sum()
    return (jvp(grad(score), (b["x"],), (b["v"],))[1] * b["v"]).sum() ** 2 / len(b["x"])


def by_parameters(p, b):
    """A penalty on this micro-batch's gradient by a block's weights, which a loss opens for it."""
    whole = fz.gather(p["blocks"])
    (g,) = torch.autograd.grad(critic({**p, "blocks": whole}, b["x"]).sum(), whole[1]["w"], create_graph=True)
    return (g**2).sum() / len(b["x"]) + critic({**p, "blocks": whole}, b["x"]).square().sum()


LOSSES = [penalty_by_autograd, penalty_by_func, mean_flow, curvature, by_parameters]


def counted(loss, b):
    return loss, torch.tensor(float(len(b["x"])), dtype=torch.float64)


def chain_of(stage, loss, axes, units, higher=True):
    source = fz.value_and_grad(lambda p, b: counted(loss(p, b), b), batch=P(axes), units=units, higher_order=higher)
    inner = (fz.accumulate(2), fz.sgd(1.0))
    return fz.hpz(source, *inner) if stage == "hpz" else fz.zero(source, *inner, stage=stage, axis=axes)


def errors(mesh, axes, tried):
    """Of (loss, stage, units) the largest difference of an update from plain torch's, relative to its largest value."""
    out = {}
    for loss, some in groupby(tried, key=lambda row: row[0]):
        micro = 2 * torch.tensor(list(mesh.values())).prod().item()
        b, p = rows(2 * micro), params()
        cut = [{k: x[i * 2 : i * 2 + 2] for k, x in b.items()} for i in range(micro)]
        flat, form = fz.tree.flatten(fz.tree.map(lambda x: x.clone().requires_grad_(), p))
        whole = sum(loss(fz.tree.unflatten(flat, form), c) for c in cut) / len(b["x"])
        want = torch.autograd.grad(whole, flat)
        top = max(x.abs().max().item() for x in want)
        for _, stage, units in some:
            step = fz.train_step(*chain_of(stage, loss, axes, units), mesh=mesh, policy="float64")
            state, metrics = step(step.init(p), step.local_rows(b))
            old, new = fz.tree.leaves(p), fz.tree.leaves(step.params(state))
            gaps = [(a - b - w).abs().max().item() for a, b, w in zip(old, new, want, strict=True)]
            out[f"{loss.__name__} at {stage}, {units}"] = max(gaps) / top
    return out


TRIED = list(product(LOSSES, (0, 1, 2, 3), ((), ("blocks",))))
NESTED = list(product(LOSSES, ("hpz", 3), (("blocks",),)))


@EACH
def test_derivatives_inside_a_loss(run_world, whole):
    """Without `whole` every loss with units and without, and both at every stage."""
    tried = TRIED if whole else cover(TRIED, pairs=[(0, 2), (1, 2)])
    for found in run_world(2, errors, {"data": 2}, ("data",), tried, timeout=300.0):
        assert all(e < TOLERANCE for e in found.values()) and len(found) == len(tried), found


@EACH
def test_derivatives_inside_a_loss_with_hpz(run_world, whole):
    tried = NESTED if whole else cover(NESTED, by=1)
    for found in run_world(4, errors, {"node": 2, "local": 2}, ("node", "local"), tried, timeout=300.0):
        assert all(e < TOLERANCE for e in found.values()) and len(found) == len(tried), found


# --- modules, and what is refused ------------------------------------------------------------------------------------
class Critic(nn.Module):
    """Blocks with dropout, a tied weight and a frozen bias."""

    def __init__(self, p=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.out = nn.Linear(5, 6), nn.Linear(6, 5, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(p)) for _ in range(2))
        self.out.weight = nn.Parameter(self.inp.weight.detach().T.clone())
        self.inp.bias.requires_grad_(False)

    def forward(self, x):
        h = self.inp(x)
        for b in self.blocks:
            h = h + b(h)
        return self.out(h).sum(-1)


def wgan(model, b):
    x = b["x"].clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return counted(((g.norm(dim=1) - 1) ** 2).sum() + model(b["x"]).sum(), b)


def of_a_module(stage):
    """The update of an unmodified module's penalty at two ranks, by path."""
    fn, p = fz.stateless(Critic().double(), wgan)
    source = fz.value_and_grad(fn, batch=P("data"), trainable=fn.trainable, higher_order=True)
    step = fz.train_step(*fz.zero(source, fz.sgd(1.0), stage=stage), mesh={"data": 2}, policy="float64")
    state, _ = step(step.init(p), step.local_rows(rows()))
    return {n: p[n] - x for n, x in step.params(state).items()}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_unmodified_module_with_a_penalty(run_world, stage):
    net, b = Critic().double(), rows()
    loss, weight = wgan(net, b)
    learns = {n: p for n, p in net.named_parameters() if p.requires_grad}
    want = dict(zip(learns, torch.autograd.grad(loss / weight, list(learns.values())), strict=True))
    for found in run_world(2, of_a_module, stage):
        assert not found["inp.bias"].count_nonzero()
        for n, x in want.items():
            torch.testing.assert_close(found[n], x, rtol=1e-10, atol=1e-12)


def dropped(higher, units):
    """An update of a loss with dropout, whose blocks run once or many times."""
    plain = lambda model, b: counted((model(b["x"]) ** 2).sum(), b)
    fn, p = fz.stateless(Critic(0.5).double(), plain, units=units)
    source = fz.value_and_grad(fn, batch=P("data"), trainable=fn.trainable, rng=True, higher_order=higher)
    step = fz.train_step(*fz.zero(source, fz.sgd(1.0), stage=3), mesh={"data": 1}, policy="float64")
    state, metrics = step(step.init(p, key=3), rows())
    return metrics.loss, step.params(state)


def test_what_a_block_drops_is_what_it_drops_without_this_form():
    loss, want = dropped(False, ())
    again, found = dropped(True, None)
    assert torch.equal(loss, again)
    for n, x in want.items():
        torch.testing.assert_close(found[n], x, rtol=1e-12, atol=1e-14)


def one_update(loss, mesh=None, units=("blocks",), **options):
    source = fz.value_and_grad(lambda p, b: counted(loss(p, b), b), batch=P("data"), units=units, higher_order=True)
    step = fz.train_step(*fz.zero(source, fz.sgd(1.0), stage=3, **options), mesh=mesh or {"data": 1}, policy="float64")
    return step(step.init(params()), step.local_rows(rows()))


def test_a_block_that_captures_what_is_differentiated_is_refused():
    def captures(p, b):
        def score(x):
            inner = lambda q, h: h + torch.tanh(h @ q["w"] + q["b"]) * x.sum()
            return fz.layers(inner, p["blocks"], torch.tanh(x @ p["inp"])).sum()

        return jvp(score, (b["x"],), (b["v"],))[1] ** 2

    with pytest.raises(TypeError, match="the block captures a tensor"):
        one_update(captures)


def test_a_block_that_writes_is_refused_by_path():
    def written(q, h):
        q["w"].mul_(2.0)
        return h + torch.tanh(h @ q["w"])

    loss = lambda p, b: fz.layers(written, p["blocks"], b["x"] @ p["inp"]).sum()
    with pytest.raises(RuntimeError, match="writes into parameter 'blocks/0/w' in place"):
        one_update(loss)

    def changed(q, h):
        return h.add_(torch.tanh(h @ q["w"]))

    loss = lambda p, b: fz.layers(changed, p["blocks"], b["x"] @ p["inp"]).sum()
    with pytest.raises(RuntimeError, match="a block changes an input in place"):
        one_update(loss)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "vmap"])
def test_closed_parameters_in_a_transform_are_told(transform):
    """By parameters, as MAML inside a loss is; the remedy is right."""

    def inner(p, b):
        return critic(p, b["x"]).square().sum()

    def of(p, b):
        score = lambda p: inner(p, b)
        return {
            "grad": lambda: sum((x**2).sum() for x in fz.tree.leaves(grad(score)(p))),
            "vjp": lambda: torch.func.vjp(score, p)[0],
            "jvp": lambda: jvp(score, (p,), (p,))[1],
            "vmap": lambda: vmap(score)(fz.tree.map(lambda x: x[None], p)).sum(),
        }[transform]()

    with pytest.raises(TypeError, match="to a transform of torch.func; open them first|or open it with fz.gather"):
        one_update(of)
    assert one_update(lambda p, b: of(fz.gather(p), b))[1].ok


def test_a_block_sees_the_grad_mode_it_is_called_in():
    def moded(q, h):
        return h + torch.tanh(h @ q["w"]) * (1.0 if torch.is_grad_enabled() else 100.0)

    loss = lambda p, b: fz.layers(moded, p["blocks"], b["x"] @ p["inp"]).square().sum()
    assert one_update(loss)[1].loss == one_update(loss, units=())[1].loss


def test_a_sparse_gradient_is_told(run_world):
    for told in [*run_world(2, sparse, 3), *run_world(2, sparse, 1), sparse(3)]:
        assert all("is sparse" in x for x in told), told


def sparse(stage):
    loss = lambda p, b: counted(torch.nn.functional.embedding(torch.arange(4), p["inp"], sparse=True).sum(), b)
    source = fz.value_and_grad(loss, batch=P("data"), higher_order=True)
    step = fz.train_step(*fz.zero(source, fz.sgd(1.0), stage=stage), mesh={"data": -1}, policy="float64")
    told, state, b = [], step.init(params()), step.local_rows(rows())
    for run in (step, fz.differentiable(step)):
        try:
            run(state, b)
        except TypeError as error:
            told.append(str(error))
    return told or [""]


def test_a_wire_has_no_derivative():
    with pytest.raises(fz.ChainError, match="the wire over 'data' .* has no derivative"):
        one_update(mean_flow, mesh={"data": 2}, gather=fz.cast("bfloat16"))


def test_the_first_order_form_names_this_one(run_world):
    for told in run_world(2, first_order):
        assert told.endswith("write value_and_grad(..., higher_order=True)")


def first_order():
    step = fz.train_step(*chain_of(3, mean_flow, ("data",), ("blocks",), higher=False), mesh={"data": 2})
    p = fz.tree.map(lambda x: x.float(), params())
    try:
        step(step.init(p), step.local_rows(fz.tree.map(lambda x: x.float(), rows())))
    except RuntimeError as error:
        return str(error)


def one_skips():
    """Two ranks that open different blocks of equal size, at stage 3."""

    def routed(p, b):
        use = p["blocks"][: 1 + int(torch.distributed.get_rank())]
        other = p["blocks"][2 - int(torch.distributed.get_rank()) :][:1] if len(use) < 2 else []
        return fz.layers(block, [*use, *other], torch.tanh(b["x"] @ p["inp"])).sum()

    try:
        one_update(routed, mesh={"data": 2})
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_ranks_that_open_different_units_are_told(run_world):
    for told in run_world(2, one_skips):
        assert told and "DivergenceError" in told, told
