"""Lion: every value moves by the rate, whatever its gradient, and the momentum is a mean of the past."""

from __future__ import annotations

import pytest
import torch
from optimizers import F64, skipping, walk

import funczero as fz

G = torch.tensor([3.0, -0.25, 1e-3, -7.0], dtype=torch.float64)


def test_a_constant_gradient_moves_every_value_by_the_rate():
    found, state = walk(fz.lion(0.25, 0.9, 0.5), [G] * 4)
    for n, p in enumerate(found):
        torch.testing.assert_close(p, -0.25 * (n + 1) * G.sign(), rtol=1e-14, atol=0)
    torch.testing.assert_close(state.mu["w"], (1 - 0.5**4) * G, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_values_do_not_depend_on_the_scale_of_gradients(scale):
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, generator=g, dtype=F64) for _ in range(4)]
    tx = fz.lion(0.1, 0.75, 0.5)
    for p, q in zip(walk(tx, grads)[0], walk(tx, [scale * x for x in grads])[0], strict=True):
        assert torch.equal(p, q)


def test_the_sign_is_of_the_gradient_and_the_momentum_together():
    """b1 m + (1 - b1) g, with the momentum before this update: 0.5 * 1 - 0.5 * x."""
    first, second = torch.ones(3), torch.tensor([-0.5, -0.75, -1.0])
    (_, found), state = walk(fz.lion(1.0, 0.5, 0.25), [first, second])
    assert found.tolist() == [-2.0, -1.0, 0.0]  # 0.75 of the momentum against half of the gradient
    torch.testing.assert_close(state.mu["w"], 0.25 * 0.75 + 0.75 * second.to(F64))


def test_nothing_moves_where_there_never_was_a_gradient_and_decay_is_decoupled():
    start = torch.tensor([2.0, -0.5])
    assert torch.equal(walk(fz.lion(0.1), [torch.zeros(2)] * 3, start)[0][-1], start.to(F64))
    (p,), state = walk(fz.lion(0.1, weight_decay=0.5), [torch.zeros(2)], start)
    torch.testing.assert_close(p, start.to(F64) * 0.95, rtol=1e-14, atol=0)
    assert not state.mu["w"].any()


def test_a_skipped_update_leaves_no_trace():
    (_, first), (_, skipped), (last, _) = skipping(fz.lion(0.1, weight_decay=0.1), [True, False, True])
    assert first == skipped and last.chain["lion"].count == 2
