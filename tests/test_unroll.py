"""step/unroll.py: many steps as one function that keeps few of them, and many states as one."""

from __future__ import annotations

import pytest
import torch
from modules import Alive
from torch.func import grad

import funczero as fz

ROWS = torch.linspace(-1, 1, 4 * 64, dtype=torch.float64).view(4, 64)


def made(loss=None):
    """A step of one leaf, [64, 17], with AdamW."""
    plain = lambda p, b: ((torch.tanh(b @ p["w"]) ** 2).sum(), torch.tensor(float(len(b))).double())
    chain = fz.zero(fz.value_and_grad(loss or plain, batch=fz.P("data")), fz.adamw(0.01), stage=3)
    step = fz.train_step(*chain, mesh={"data": 1}, policy="float64")
    return step, step.init({"w": torch.linspace(-1, 1, 64 * 17, dtype=torch.float64).view(64, 17)})


def last_loss(smooth, state, n):
    def after(p, remat):
        return fz.unroll(smooth, fz.with_parts(state, p), [ROWS] * n, remat)[1][-1].loss

    return after


@pytest.mark.parametrize("remat", [1, 3, 5, 20])
def test_remat_changes_no_value_and_costs_one_more_forward(remat):
    calls = []

    def counted(p, b):
        calls.append(1)
        return (torch.tanh(b @ p["w"]) ** 2).sum(), torch.tensor(float(len(b))).double()

    step, state = made(counted)
    after = last_loss(fz.differentiable(step), state, 10)
    want, n = grad(after)(fz.parts(state), None), len(calls)
    got, more = grad(after)(fz.parts(state), remat), len(calls) - n
    assert n == 10 and more == 20
    torch.testing.assert_close(got["w"], want["w"], rtol=1e-12, atol=1e-14)


def test_few_states_are_kept():
    """Buffers of a state's size that are alive at once: those of every state, or of n / remat + remat of them."""
    step, state = made()
    after, buffer = last_loss(fz.differentiable(step), state, 40), state.params.buffers[0].shape

    def most(remat):
        with Alive(buffer) as seen:
            grad(after)(fz.parts(state), remat)
        return seen.most

    every, few = most(None), most(10)
    assert every > 40 * 3 and few < every * (4 + 10) / 40


def test_what_would_be_lost_is_refused():
    rate, xs = torch.tensor(0.5, requires_grad=True), [torch.tensor(1.0)] * 4
    with pytest.raises(TypeError, match="fn captures a tensor"):
        fz.unroll(lambda c, x: (c * rate, x), torch.tensor(1.0), xs, remat=2)
    assert fz.unroll(lambda c, x: (c * rate, x), torch.tensor(1.0), xs)[0].requires_grad
    with pytest.raises(TypeError, match="fn captures a tensor"):
        grad(lambda r: fz.unroll(lambda c, x: (c * r, x), torch.tensor(1.0), xs, remat=2)[0])(torch.tensor(0.5))
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match="is not a number of steps"):
            fz.unroll(lambda c, x: (c, x), torch.tensor(1.0), xs, remat=wrong)
    assert fz.unroll(lambda c, x: (c, x), 1.0, [], remat=3) == (1.0, [])


def test_stack_and_unstack():
    step, state = made()
    other = step(state, ROWS)[0]
    together = fz.stack([state, other])
    assert together.step.tolist() == [0, 1] and together.params.where is state.params.where
    for a, b in zip(fz.unstack(together), (state, other), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(fz.tree.leaves(a), fz.tree.leaves(b), strict=True))
    with pytest.raises(ValueError, match="tree 1 is not like tree 0"):
        fz.stack([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match="there is nothing to stack"):
        fz.stack([])
