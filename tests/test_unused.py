"""transforms/unused.py: a leaf that nobody used in an update is left alone, at every stage and world."""

from __future__ import annotations

import pytest
import torch
from cover import EACH, places
from torch import nn

import funczero as fz
from funczero import P
from funczero.testing import tree_hash
from funczero.testing.simulate import simulate

ROWS = 8


class Net(nn.Module):
    """Two heads, of which a batch has one or both; a part of a block that is used now and then."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})

    def forward(self, x, task, deep):
        for block in self.blocks:
            x = block(x, deep)
        return sum(self.heads[k](x[task == i]).square().sum() for i, k in enumerate("ab") if bool((task == i).any()))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, deep):
        x = x + torch.tanh(self.always(x))
        return x + torch.tanh(self.sometimes(x)) if deep else x


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().double()


def batch(t):
    """Of one task, then of the other, then of both; deep at first alone."""
    task = [torch.zeros(ROWS), torch.ones(ROWS), torch.arange(ROWS) % 2][t % 3].long()
    x = torch.randn(ROWS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    return {"x": x, "task": task, "deep": t in (0, 3)}


def loss(model, b):
    return model(b["x"], b["task"], b["deep"]), torch.tensor(float(len(b["x"])))


OPTIMIZERS = {
    "sgd": lambda: fz.sgd(0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda: fz.adamw(1e-2, weight_decay=0.1),
    "partition": lambda: fz.partition([("heads", fz.sgd(0.05, momentum=0.9)), ("", fz.adamw(1e-2))]),
    "muon": lambda: fz.partition([(fz.matrices(), fz.muon(0.02, small=1)), ("", fz.adamw(1e-2))]),
}


def trained(name, stage, world, donate=False, unused="keep"):
    loss_fn, params = fz.stateless(net(), loss)
    grad = fz.value_and_grad(loss_fn, batch=P("data"), unused=unused)
    chain = fz.zero(grad, OPTIMIZERS[name](), stage=stage, accumulate=2 // world)
    step = fz.train_step(*chain, mesh={"data": -1}, policy="float64")
    step = fz.donate(step) if donate else step
    state, log = step.init(params), []
    for t in range(5):
        state, _ = step(state, step.local_rows(batch(t)))
        log.append(step.params(state))
    return log


@EACH
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_hash_at_every_stage_and_world(name, whole):
    at = places(name, OPTIMIZERS, whole)
    found = {tree_hash(x) for w, s in at for x in simulate({"data": w})(trained, name, s, w)}
    assert found == {tree_hash(trained(name, 3, 1, donate=True))}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_was_not_used_did_not_move(name):
    log = [net().state_dict(), *trained(name, 0, 1)]
    for t, (old, new) in enumerate(zip(log, log[1:], strict=False)):
        used = {"a": t % 3 in (0, 2), "b": t % 3 in (1, 2)}
        for path in old:
            moves = used[path[6]] if path.startswith("heads") else "always" in path or t in (0, 3)
            assert torch.equal(old[path], new[path]) != moves, (t, path)
    zeros = trained(name, 0, 1, unused="zeros")
    assert not torch.equal(zeros[1]["heads.a.weight"], zeros[0]["heads.a.weight"])  # momentum goes on


def test_it_is_torchs_update_where_a_grad_is_none():
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), 0.05, 0.9, weight_decay=0.1)
    for t in range(5):
        optimizer.zero_grad()
        (loss(module, batch(t))[0] / ROWS).backward()
        optimizer.step()
    for path, x in trained("sgd", 0, 1)[-1].items():
        torch.testing.assert_close(x, module.state_dict()[path], rtol=1e-12, atol=1e-12)


def test_a_window_counts_every_micro_batch():
    loss_fn, params = fz.stateless(net(), loss)
    grad = fz.value_and_grad(loss_fn, unused="keep")
    step = fz.train_step(grad, fz.accumulate(2, stream=True), fz.sgd(0.05, weight_decay=0.1), policy="float64")
    state = step.init(params)
    for t in (0, 1):
        state, _ = step(state, batch(t))
    after = step.params(step(state, None)[0])
    assert all(not torch.equal(after[n], x) for n, x in params.items())


@pytest.mark.parametrize("donate", [False, True])
def test_where_frozen_leaves_alone_are_unused_all_else_moves(donate):
    loss_fn = lambda p, b: (((p["w"] + p["still"]) * b).sum(), torch.tensor(float(len(b))))
    step = fz.train_step(fz.value_and_grad(loss_fn, unused="keep"), fz.freeze("still"), fz.sgd(0.5))
    step = fz.donate(step) if donate else step
    state, _ = step(step.init({"w": torch.zeros(2), "still": torch.ones(2)}), torch.ones(4, 2))
    assert {n: x.tolist() for n, x in step.params(state).items()} == {"w": [-0.5, -0.5], "still": [1.0, 1.0]}


def test_where_it_cannot_be_it_is_refused():
    grad = lambda **kw: fz.value_and_grad(lambda p, b: (p["w"].sum(), torch.tensor(1.0)), unused="keep", **kw)
    own = fz.lift((lambda p: (), lambda u, s, p: (u, s)), elementwise=True)
    with pytest.raises(fz.ChainError, match="lift: of a state in a form of its own nobody knows"):
        fz.train_step(grad(), own)
    with pytest.raises(fz.ChainError, match="sgd: it is not the last optimizer, and unused='keep'"):
        fz.train_step(grad(), fz.sgd(0.1), fz.adamw(0.1))
    with pytest.raises(fz.ChainError, match="a differentiable step moves every leaf"):
        fz.differentiable(fz.train_step(grad(), fz.sgd(0.1)))
    with pytest.raises(fz.ChainError, match="higher_order gives every leaf of a message a gradient"):
        grad(higher_order=True)
    with pytest.raises(ValueError, match="unused='skip' is neither 'zeros' nor 'keep'"):
        fz.value_and_grad(lambda p, b: None, unused="skip")


def hierarchical(form, mesh):
    """With batch norm in units, rows and what is joined beside the loss, on two axes."""

    def told(model, b):
        error = (model[2](model[0](b["x"])) if b["deep"] else model[0](b["x"])).square().sum(1)
        return error.sum(), torch.tensor(float(len(error))), {"all": error.detach(), "mean": error.detach().mean()}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        module = nn.ModuleList([block(), block(), nn.Linear(4, 4)]).double()
    loss_fn, params = fz.stateless(module, told)
    grad = fz.value_and_grad(loss_fn, batch=P(tuple(mesh)), unused="keep", has_aux=[("all", "cat")])
    step = fz.train_step(*form(grad, fz.adamw(1e-2)), mesh=mesh, policy="float64")
    state, aux = step.init(params), []
    for t in range(3):
        state, metrics = step(state, step.local_rows({**batch(t), "deep": t == 0}))
        aux.append(metrics.aux)
    return tree_hash((step.params(state), state.model_state, aux))


def test_one_hash_on_meshes_of_two_axes():
    two = {"node": 2, "local": 2}
    forms = [(fz.hpz, two), (fz.mics, two), (lambda *chain: fz.zero(*chain, stage=3), {"data": 4})]
    assert len({bits for form, mesh in forms for bits in simulate(mesh)(hierarchical, form, mesh)}) == 1
