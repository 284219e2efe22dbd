"""gradients/synced.py: statistics over all ranks' rows are those of one batch, at every stage and derivative."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cover import EACH
from torch import nn

import funczero as fz
from funczero import P
from funczero.gradients.synced import normed
from funczero.testing import tree_hash
from funczero.testing.simulate import simulate

ROWS = 8


def net(kind, momentum=0.1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = lambda: nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), kind(4, momentum=momentum), nn.Tanh())
        module = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ModuleList([block(), block()]), nn.Flatten(), nn.Linear(12, 1))
        module = Net(module)
        return module.double()


class Net(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.stem, self.layers, self.flat, self.head = parts

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.flat(x))


def loss(model, batch):
    return F.mse_loss(model(batch["x"]), batch["y"], reduction="sum"), torch.tensor(float(len(batch["x"])))


def batch(t):
    g = torch.Generator().manual_seed(t)
    return {
        "x": torch.randn(ROWS, 2, 3, dtype=torch.float64, generator=g),
        "y": torch.randn(ROWS, 1, dtype=torch.float64, generator=g),
    }


def trained(kind, stage, momentum=0.1, **kw):
    loss_fn, params = fz.stateless(net(kind, momentum), loss, remat=kw.pop("remat", False))
    grad = fz.value_and_grad(loss_fn, batch=P("data"), **kw)
    step = fz.train_step(*fz.zero(grad, fz.sgd(0.05, momentum=0.9), stage=stage), mesh={"data": -1}, policy="float64")
    state = step.init(params)
    for t in range(3):
        state, metrics = step(state, step.local_rows(batch(t)))
    return {
        **step.params(state),
        **state.model_state,
        "loss": metrics.loss,
        "eval": step.eval(loss_fn)(state, step.local_rows(batch(7))).loss,
    }


@EACH
@pytest.mark.parametrize("momentum", [0.1, None])
def test_two_ranks_are_batch_norm_of_the_whole_batch(momentum, whole):
    want = trained(nn.BatchNorm1d, 0, momentum)
    ways = [(0, {}), (1, {}), (2, {}), (3, {}), (3, {"remat": True}), (3, {"higher_order": True})]
    ways = ways if whole else ways[0::2] if momentum else ways[1::2]
    found = [simulate({"data": 2})(lambda s=s, kw=kw: trained(nn.SyncBatchNorm, s, momentum, **kw)) for s, kw in ways]
    for ranks in found:
        for name, x in want.items():
            torch.testing.assert_close(
                ranks[0][name], x, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert len({tree_hash(x) for ranks in found for x in ranks}) == 1


def test_accumulate_is_refused():
    loss_fn, _ = fz.stateless(net(nn.SyncBatchNorm), loss)
    chain = fz.zero(fz.value_and_grad(loss_fn, batch=P("data")), fz.sgd(0.1), stage=1, accumulate=2)
    with pytest.raises(fz.ChainError, match="a SyncBatchNorm takes its statistics over the rows of all ranks at once"):
        fz.train_step(*chain, mesh={"data": 2})


@pytest.mark.parametrize("kw", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_one_rank_is_torchs_layer(training, kw):
    mine, theirs = nn.SyncBatchNorm(3, **kw).double().train(training), nn.BatchNorm2d(3, **kw).double().train(training)
    for t in range(2):
        x = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        torch.testing.assert_close(normed(mine, None, x), theirs(x), rtol=1e-12, atol=1e-12)
    for name, x in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("own", [True, False], ids=["half layer", "float32 layer"])
def test_half_precision_counts_and_sums_in_float32(dtype, own):
    x = (torch.randn(70_001, 2, generator=torch.Generator().manual_seed(0)) * 2 + 3).to(dtype)
    layers = [kind(2).to(dtype if own else torch.float32) for kind in (nn.SyncBatchNorm, nn.BatchNorm1d)]
    layers[1] = layers[1].float()
    ours, torchs = normed(layers[0], None, x), layers[1](x.float())
    assert ours.dtype == dtype
    for mine, exact in ((ours, torchs), *zip(layers[0].buffers(), layers[1].buffers(), strict=True)):
        exact = exact.double()
        assert (mine.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
