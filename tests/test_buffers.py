"""gradients/buffers.py: buffers that a module's forward changes are a state of the model."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cover import EACH
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations

import funczero as fz
from funczero import P
from funczero.checkpoint.export import export
from funczero.gradients.buffers import changing, computed
from funczero.testing import tree_hash
from funczero.testing.simulate import simulate

ROWS = 8


class Codebook(nn.Module):
    """Nearest codes, which follow what they are nearest to, as VQ-VAE's do."""

    def __init__(self, n=4, dim=6):
        super().__init__()
        self.register_buffer("codes", torch.randn(n, dim))
        self.register_buffer("size", torch.ones(n))
        self.register_buffer("usage", torch.zeros(n, dtype=torch.long))

    def forward(self, x):
        near = torch.cdist(x, self.codes).argmin(1)
        if self.training:
            hot = F.one_hot(near, len(self.codes)).to(x.dtype)
            self.size = 0.9 * self.size + 0.1 * hot.sum(0)
            self.codes.mul_(0.9).add_(0.1 * (hot.T @ x.detach()) / self.size[:, None])
            self.usage += hot.sum(0).long()
        return x + (self.codes[near] - x).detach()


class Net(nn.Module):
    """One of every kind of layer that changes buffers."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6)
        block = lambda: nn.Sequential(nn.Conv1d(6, 6, 3, padding=1, bias=False), nn.BatchNorm1d(6), nn.ReLU())
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.instance = nn.InstanceNorm1d(6, track_running_stats=True)
        self.cumulative = nn.BatchNorm1d(6, momentum=None)
        self.code = Codebook()
        self.one, self.two = parametrizations.spectral_norm(nn.Linear(6, 6)), nn.utils.spectral_norm(nn.Linear(6, 6))
        self.three = nn.utils.weight_norm(nn.Linear(6, 2))

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        for layer in self.layers:
            x = x + layer(x)
        x = self.cumulative(self.instance(x)).mean(2)
        return self.three(self.two(self.one(self.code(x))))


STATE = [("code.usage", "sum"), ("code", "mean")]


def net(train=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().double().train(train)


def loss(model, batch):
    return F.mse_loss(model(batch["x"]), batch["y"], reduction="sum"), torch.tensor(float(len(batch["x"])))


def batch(t):
    g = torch.Generator().manual_seed(t)
    make = lambda *shape: torch.randn(ROWS, *shape, dtype=torch.float64, generator=g)
    return {"x": make(3, 5), "y": make(2)}


def trained(stage, world, micros=2, remat=False, higher_order=False):
    loss_fn, params = fz.stateless(net(), loss, remat=remat, state=STATE)
    grad = fz.value_and_grad(loss_fn, batch=P("data"), higher_order=higher_order)
    chain = fz.zero(grad, fz.sgd(0.05, momentum=0.9), stage=stage, accumulate=micros // world)
    step = fz.train_step(*chain, mesh={"data": -1}, policy="float64")
    state = step.init(params)
    for t in range(3):
        state, _ = step(state, step.local_rows(batch(t)))
    test, _ = fz.stateless(net(train=False), loss)
    rows = step.local_rows(batch(9))
    return (
        {**step.params(state), **state.model_state},
        step.eval(test)(state, rows).loss,
        step.eval(loss_fn)(state, rows).loss,
    )


def plain(train_on=3):
    """Plain torch, one micro-batch an update."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    for t in range(train_on):
        value, weight = loss(module, batch(t))
        optimizer.zero_grad()
        (value / weight).backward()
        optimizer.step()
    values = {n: x.detach() for n, x in module.state_dict().items()}
    with torch.no_grad():
        tested = loss(module.eval(), batch(9))
    return values, tested[0] / tested[1]


@pytest.mark.parametrize("kind", [{}, {"remat": True}, {"higher_order": True}], ids=["plain", "remat", "higher order"])
def test_one_batch_is_plain_torch_with_its_statistics(kind):
    want, tested = plain()
    for stage in (0, 3):
        found, evaluated, _ = trained(stage, 1, 1, **kind)
        assert found.keys() == want.keys()
        for name, x in want.items():
            torch.testing.assert_close(found[name], x, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(evaluated, tested)


@EACH
def test_one_hash_at_every_stage_and_world(whole):
    at = list(product(range(4), (1, 2))) if whole else [(0, 1), (3, 1), (0, 2), (1, 2), (2, 2), (3, 2)]
    found = {(s, w): simulate({"data": w})(trained, s, w) for s, w in at}
    assert len({tree_hash(x[0]) for ranks in found.values() for x in ranks}) == 1
    assert {tree_hash(x[0]) for x in simulate({"data": 2})(lambda: trained(3, 2, remat=True))} == {
        tree_hash(found[0, 1][0][0])
    }


def test_the_module_and_the_first_state_stay_as_they_were():
    module = net()
    before = tree_hash(module.state_dict())
    loss_fn, params = fz.stateless(module, loss, state=STATE)
    first = tree_hash(loss_fn.state)
    *_, new = loss_fn(params, loss_fn.state, batch(0))
    assert tree_hash(module.state_dict()) == before and tree_hash(loss_fn.state) == first != tree_hash(new)
    assert new["norm.num_batches_tracked"] == 1 and module.norm.num_batches_tracked == 0


def test_what_layers_of_torch_change_is_known():
    names = dict(changing(net()))
    assert names["layers.1.1.running_mean"] == "mean" and names["cumulative.num_batches_tracked"] == "first"
    assert names["one.parametrizations.weight.0._u"] == names["two.weight_v"] == "first"
    assert not dict(changing(net(train=False))) and computed(net()) == {"two.weight", "three.weight"}


def test_a_rule_of_ones_own_counts_first():
    loss_fn, _ = fz.stateless(net(), loss, state=[("running_mean", "first"), ("code", "mean"), ("norm", "mean")][:2])
    rules = {regex: rule for regex, rule in loss_fn.rules}
    assert rules[r"^norm\.running_mean$"] == "first" and rules[r"^norm\.running_var$"] == "mean"


def test_shared_modules_have_one_state():
    norm = nn.BatchNorm1d(3)
    module = nn.Sequential(norm, nn.Linear(3, 3), norm)
    loss_fn, params = fz.stateless(module, lambda m, b: (m(b).sum(), torch.tensor(4.0)))
    *_, new = loss_fn(params, loss_fn.state, torch.randn(4, 3))
    assert set(new) == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    assert new["0.num_batches_tracked"] == 2


def test_what_is_not_known_is_told_with_what_to_write():
    loss_fn, params = fz.stateless(Codebook(), lambda m, b: (m(b).sum(), torch.tensor(4.0)))
    with pytest.raises(RuntimeError, match="changes buffer 'codes', .* write fz.stateless\\(..., state='codes'\\)"):
        loss_fn(params, torch.randn(4, 6))
    with pytest.raises(ValueError, match="state='tables' finds no buffer of the module; it has \\['codes', 'size'"):
        fz.stateless(Codebook(), loss, state="tables")
    named, params = fz.stateless(Codebook(), lambda m, b: (m(b).sum(), torch.tensor(4.0)), state="codes|size|usage")
    with pytest.raises(
        TypeError, match="the forward changes buffers \\(codes, size, usage\\); call loss_fn\\(params, model"
    ):
        named(params, torch.randn(4, 6))


def test_a_state_of_another_module_is_told():
    step_loss, params = fz.stateless(
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), lambda m, b: (m(b).sum(), torch.tensor(4.0))
    )
    step = fz.train_step(fz.value_and_grad(step_loss), fz.sgd(0.1))
    state, _ = step(step.init(params), torch.randn(4, 3))
    without = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    other, _ = fz.stateless(without.eval(), lambda m, b: (m(b).sum(), torch.tensor(4.0)))
    with pytest.raises(ValueError, match="the model state has '1.* which is no buffer of the module"):
        step.eval(other)(state, torch.randn(4, 3))


def test_a_mean_with_a_state():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    loss_fn, params = fz.stateless(module, lambda m, b: (m(b) ** 2).mean())
    step = fz.train_step(fz.value_and_grad(fz.mean_loss(loss_fn)), fz.sgd(0.1), policy="float64")
    state, metrics = step(step.init(params), torch.randn(4, 3, dtype=torch.float64))
    assert metrics.weight == 4 and state.model_state["1.num_batches_tracked"] == 1


def test_a_mean_with_a_state_and_an_aux():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    loss_fn, params = fz.stateless(module, lambda m, b: ((m(b) ** 2).mean(), {"seen": b.sum()}))
    step = fz.train_step(fz.value_and_grad(fz.per_row(loss_fn), has_aux=True), fz.sgd(0.1), policy="float64")
    rows = torch.randn(4, 3, dtype=torch.float64)
    state, metrics = step(step.init(params), rows)
    assert metrics.aux["seen"] == rows.sum() and state.model_state["1.num_batches_tracked"] == 1


def test_an_export_is_the_modules_state_dict(tmp_path):
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    loss_fn, params = fz.stateless(module, lambda m, b: (m(b).square().sum(), torch.tensor(4.0)))
    step = fz.train_step(fz.value_and_grad(loss_fn), fz.sgd(0.1))
    state, _ = step(step.init(params), torch.randn(4, 3))
    with fz.Checkpointer(tmp_path) as ck:
        ck.save(state, "last")
    export(tmp_path / "last", tmp_path / "out.safetensors")
    module.load_state_dict(load_file(tmp_path / "out.safetensors"))
    assert module[1].num_batches_tracked == 1 and torch.equal(
        module[1].running_mean, state.model_state["1.running_mean"]
    )
