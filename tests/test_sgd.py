"""SGD: its closed forms on simple gradients, and a momentum that looks ahead or is not there."""

from __future__ import annotations

import pytest
import torch
from optimizers import F64, skipping, walk

import funczero as fz

G = torch.tensor([3.0, -0.25, 1e-3, -7.0], dtype=torch.float64)


def test_without_momentum_it_is_the_gradient_times_the_rate():
    found, state = walk(fz.sgd(0.5), [G, -2 * G, 4 * G])
    assert all(torch.equal(p, -0.5 * n * G) for p, n in zip(found, (1, -1, 3), strict=True))
    assert state.trace == () and set(state.rates) == {"lr", "weight_decay"} and state.count == 3


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta", [0.5, 0.75])
def test_a_constant_gradient_fills_the_momentum_geometrically(beta, nesterov):
    found, state = walk(fz.sgd(1.0, beta, nesterov), [G] * 6)
    trace = [(1 - beta**n) / (1 - beta) for n in range(1, 8)]  # after so many updates
    moves = [trace[n + nesterov] for n in range(6)]  # one further, where it looks ahead
    for n, p in enumerate(found):
        torch.testing.assert_close(p, -sum(moves[: n + 1]) * G, rtol=1e-14, atol=0)
    torch.testing.assert_close(state.trace["w"], trace[5] * G, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kw", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_it_is_linear_in_the_gradients(kw):
    g = torch.Generator().manual_seed(0)
    xs, ys = ([torch.randn(5, generator=g, dtype=F64) for _ in range(4)] for _ in range(2))
    tx = fz.sgd(0.1, **kw)
    (x, _), (y, _), (both, _) = walk(tx, xs), walk(tx, ys), walk(tx, [a + 2 * b for a, b in zip(xs, ys, strict=True)])
    for p, q, r in zip(x, y, both, strict=True):
        torch.testing.assert_close(p + 2 * q, r, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kw", [{}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}], ids=str)
def test_decay_is_a_gradient_of_its_own(kw):
    start = torch.tensor([2.0, -0.5, 1.0])
    decayed, _ = walk(fz.sgd(0.5, weight_decay=0.25, **kw), [torch.zeros(3)], start)
    plain, _ = walk(fz.sgd(0.5, **kw), [0.25 * start], start)
    assert torch.equal(decayed[0], plain[0]) and not torch.equal(decayed[0], start.to(F64))


def test_a_skipped_update_keeps_the_momentum():
    (_, first), (_, skipped), (last, _) = skipping(fz.sgd(0.1, 0.9), [True, False, True])
    assert first == skipped and last.chain["sgd"].count == 2


def test_there_is_nothing_to_look_ahead_with_without_a_momentum():
    with pytest.raises(ValueError, match="^sgd: momentum=0.0 leaves nesterov=True nothing to look ahead with"):
        fz.sgd(0.1, nesterov=True)
