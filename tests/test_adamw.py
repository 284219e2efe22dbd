"""AdamW and Adam: their closed forms on simple gradients, where they differ, and what they count."""

from __future__ import annotations

import pytest
import torch
from optimizers import F64, close, masters, skipping, torchs, walk

import funczero as fz
from funczero import P
from funczero.testing import tree_hash

G = torch.tensor([3.0, -0.25, 1e-3, -7.0], dtype=torch.float64)
BOTH = pytest.mark.parametrize("make", [fz.adamw, fz.adam], ids=lambda f: f.__name__)


@BOTH
@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.0, 0.5), (0.5, 0.0)])
def test_a_constant_gradient_moves_every_value_by_the_rate(make, b1, b2):
    """The corrected moments of a constant are that constant and its square, at every update."""
    found, state = walk(make(0.1, b1=b1, b2=b2, eps=1e-300, weight_decay=0.0), [G] * 5)
    for n, p in enumerate(found):
        torch.testing.assert_close(p, -0.1 * (n + 1) * G.sign(), rtol=1e-12, atol=0)
    torch.testing.assert_close(state.mu["w"], (1 - b1**5) * G)
    torch.testing.assert_close(state.nu["w"], (1 - b2**5) * G * G)
    assert state.count == 5


@BOTH
def test_values_do_not_depend_on_the_scale_of_gradients_or_on_their_neighbours(make):
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, generator=g, dtype=F64) for _ in range(4)]
    tx = make(0.1, eps=1e-300, weight_decay=0.0)
    found, _ = walk(tx, grads)
    scaled, _ = walk(tx, [x * 2.0**20 for x in grads])
    order = [3, 1, 5, 0, 4, 2]
    permuted, _ = walk(tx, [x[order] for x in grads])
    for p, q, r in zip(found, scaled, permuted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
        assert torch.equal(p[order], r)


def test_decoupled_decay_shrinks_and_decay_in_the_gradient_moves_by_the_rate():
    """Where the gradient is zero adamw multiplies by 1 - lr wd, and adam takes wd p for a gradient of its own."""
    start = torch.tensor([2.0, -0.5, 1e-3])
    zeros = [torch.zeros(3)] * 3
    shrunk, _ = walk(fz.adamw(0.1, weight_decay=0.5), zeros, start)
    for n, p in enumerate(shrunk):
        torch.testing.assert_close(p, start.to(F64) * 0.95 ** (n + 1), rtol=1e-14, atol=0)
    moved, _ = walk(fz.adam(0.1, eps=1e-300, weight_decay=0.5), zeros[:1], start)
    torch.testing.assert_close(moved[0], start.to(F64) - 0.1 * start.to(F64).sign(), rtol=1e-12, atol=1e-15)


def test_without_decay_both_are_one():
    grads = [G * x for x in (1.0, -2.0, 0.5)]
    (ours, a), (theirs, b) = (walk(make(0.1, weight_decay=0.0), grads) for make in (fz.adamw, fz.adam))
    assert tree_hash(ours) == tree_hash(theirs) and tree_hash([a.mu, a.nu]) == tree_hash([b.mu, b.nu])


@BOTH
def test_a_skipped_update_leaves_no_trace(make):
    """Not even in the bias correction of those that follow."""
    (_, first), (_, skipped), (_, again), (last, _) = skipping(make(0.1), [True, False, False, True])
    assert first == skipped == again and last.chain[make.__name__].count == 2


# --- in a step --------------------------------------------------------------------------------------------------------
def test_a_momentum_may_be_a_schedule():
    """Adam's kernel with beta 1 as written into torch's groups before every step."""
    beta = fz.schedules.one_cycle_momentum(0.7, 0.95, 2)

    class Cycled(torch.optim.AdamW):
        n = 0

        def step(self, closure=None):
            self.param_groups[0]["betas"] = (beta(torch.tensor(self.n)).item(), 0.99)
            self.n += 1
            return super().step(closure)

    tx = fz.adamw(1e-2, b1=beta, b2=0.99)
    close(masters(tx, dtype=F64)[0], torchs(lambda p: Cycled(p, 1e-2, foreach=False)), 1e-13)
    close(masters(fz.lift((tx.init, tx.update), elementwise=True), dtype=F64)[0], masters(tx, dtype=F64)[0], 1e-13)


def test_a_beta_that_leaves_its_range_is_told():
    with pytest.raises(
        ValueError,
        match=r"adamw: after 1 applied updates the schedule's value: b1=1.0 is not below 1; write a number in \[0, 1\)",
    ):
        masters(fz.adamw(1e-2, b1=lambda u: 0.9 + 0.1 * u), updates=2)


def test_adamw_counts_in_its_own_state():
    step = fz.train_step(
        fz.value_and_grad(lambda p, b: ((p * b["x"]).sum(), torch.ones(())), batch=P("data")),
        fz.shard("data", fz.adamw(0.1)),
        mesh={"data": 1},
    )
    state = step.init(torch.zeros(3))
    for x in (1.0, torch.nan, 1.0):
        state, _ = step(state, {"x": torch.tensor([x])})
    assert state.chain["adamw"].count == 2 == int(state.updates) and int(state.step) == 3
