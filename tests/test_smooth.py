"""transforms/smooth.py: an optimizer's plain form gives its kernel's values, for every optimizer that has one."""

from __future__ import annotations

import pytest
import torch
from optimizers import MAKERS

import funczero as fz
from funczero.core.optimizer import GradientTransformation
from funczero.testing import simulate

HAVE = ["adam", "adamw", "adagrad", "lion", "sgd"]


def updates(tx, smooth, policy="float64", n=4):
    """Masters and state after some updates, of which one is skipped, by the driver or by the formula."""
    loss = lambda p, b: (((p["w"] * b.sum()) ** 2).sum() + p["v"].sum() * b.sum(), torch.tensor(float(len(b))).double())
    step = fz.train_step(fz.value_and_grad(loss), tx, policy=policy)
    state = step.init({"w": torch.linspace(-1, 1, 5).double(), "v": torch.ones(2).double()})
    one = fz.differentiable(step)
    for i in range(n):
        b = torch.full((3,), float("nan") if i == 2 else 0.5 + i).double()
        if smooth:  # batched, the formula gives the values
            state = fz.unstack(torch.func.vmap(one, in_dims=(0, None))(fz.stack([state]), b)[0])[0]
        else:
            state, _ = step(state, b)
    return state


@pytest.mark.parametrize("name", HAVE)
def test_the_plain_form_has_the_kernels_values(name):
    makers = {
        "adam": lambda: fz.adam(0.1, weight_decay=0.2),
        "adamw": lambda: fz.adamw(fz.schedules.warmup_cosine(0.1, 2, 9), weight_decay=0.2),
        "adagrad": lambda: fz.adagrad(0.1, weight_decay=0.2),
        "lion": lambda: fz.lion([("w", 0.1), ("", 0.2)], weight_decay=0.2),
        "sgd": lambda: fz.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.2),
    }
    want, got = updates(makers[name](), False), updates(makers[name](), True)
    assert int(got.updates) == int(want.updates) == 3
    for a, b in zip(fz.tree.leaves(want), fz.tree.leaves(got), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("name", MAKERS)
def test_every_optimizer_has_a_plain_form_or_is_refused(name):
    """One that joins with a kernel alone says so by name."""
    tx = MAKERS[name](0.1)
    if not isinstance(tx, GradientTransformation):
        pytest.skip("a partition of these")
    step = fz.train_step(fz.value_and_grad(lambda p, b: (p["w"].sum(), b.sum())), tx)
    if tx.formula is None or tx.formula.smooth is not None:
        fz.differentiable(step)
        return
    with pytest.raises(fz.ChainError, match="its update is a kernel that torch.func cannot differentiate"):
        fz.differentiable(step)


def test_a_pairs_odd_state_is_refused():
    init = lambda p: {"seen": torch.zeros(7), "m": fz.tree.map(torch.zeros_like, p)}
    pair = fz.lift((init, lambda g, s, p: (g, s)), "odd", elementwise=True)
    loss = lambda p, b: (p["w"].sum() * b.sum(), b.sum())

    def derived():
        step = fz.train_step(*fz.zero(fz.value_and_grad(loss, batch=fz.P("data")), pair, stage=1), mesh={"data": 2})
        state = step.init({"w": torch.ones(3)})
        moved = lambda p: fz.parts(fz.differentiable(step)(fz.with_parts(state, p), torch.ones(2))[0])["w"].sum()
        try:
            torch.func.grad(moved)(fz.parts(state))
        except TypeError as error:
            return str(error)

    for said in simulate({"data": 2})(derived):
        assert "the state of odd holds a tensor of shape (7,)" in said
