"""optim/param_groups.py: torch's param groups move what torch's optimizer moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import funczero as fz


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def groups(module):
    decayed = [p for n, p in module.named_parameters() if "weight" in n]
    others = [p for n, p in module.named_parameters() if "weight" not in n]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 0.03}]


def loss(module, x):
    return module(x).square().sum(), torch.tensor(float(len(x)))


def make(lr, betas, weight_decay, **_):
    return fz.adamw(lr, *betas, weight_decay=weight_decay)


@pytest.mark.parametrize("stage", [0, 3])
def test_they_are_torchs(stage):
    module = model()
    optimizer = torch.optim.AdamW(groups(module), lr=0.01, betas=(0.8, 0.9))
    loss_fn, params = fz.stateless(module, loss)
    tx = fz.param_groups(module, optimizer.param_groups, make)
    chain = fz.zero(fz.value_and_grad(loss_fn, batch=fz.P("data")), tx, stage=stage)
    step = fz.train_step(*chain, mesh={"data": 1}, policy="float64")
    state = step.init(params)
    for t in range(3):
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        state, _ = step(state, x)
        optimizer.zero_grad()
        total, n = loss(module, x)
        (total / n).backward()
        optimizer.step()
    for name, x in step.params(state).items():
        torch.testing.assert_close(x, module.state_dict()[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("groups_of", "error", "says"),
    [
        (lambda m: [m[0].weight], TypeError, "group 0 is a Parameter, not a dict with 'params'"),
        (
            lambda m: [{"params": [torch.ones(2)]}],
            ValueError,
            "group 0 has a tensor that is no parameter of the module",
        ),
        (lambda m: [{"params": m[0].weight}, {"params": m[0].weight}], ValueError, "'0.weight' is in groups 0 and 1"),
    ],
)
def test_what_is_no_group_is_told(groups_of, error, says):
    module = model()
    with pytest.raises(error, match=says):
        fz.param_groups(module, groups_of(module), lambda **_: fz.sgd(0.1))


def test_a_parameter_of_no_group_is_told():
    module = model()
    loss_fn, params = fz.stateless(module, loss)
    tx = fz.param_groups(module, groups(module)[:1], lambda **_: fz.sgd(0.1))
    with pytest.raises(ValueError, match="no part takes parameter '0.bias'"):
        fz.train_step(fz.value_and_grad(loss_fn), tx).init({n: p.float() for n, p in params.items()})
