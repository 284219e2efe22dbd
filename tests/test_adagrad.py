"""Adagrad: its closed forms on simple gradients."""

from __future__ import annotations

import torch
from optimizers import F64, skipping, walk

import funczero as fz

G = torch.tensor([3.0, -0.25, 1e-3, -7.0], dtype=torch.float64)


def test_the_nth_move_of_a_constant_gradient_is_the_rate_over_the_root_of_n():
    found, state = walk(fz.adagrad(0.5, eps=1e-300), [G] * 6)
    for n, p in enumerate(found):
        far = sum(0.5 / k**0.5 for k in range(1, n + 2))
        torch.testing.assert_close(p, -far * G.sign(), rtol=1e-14, atol=0)
    torch.testing.assert_close(state.nu["w"], 6 * G * G, rtol=1e-14, atol=0)
    assert state.count == 6


def test_values_do_not_depend_on_the_scale_of_gradients_nor_sums_on_their_order():
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(6, generator=g, dtype=F64) for _ in range(4)]
    tx = fz.adagrad(0.1, eps=1e-300)
    found, state = walk(tx, grads)
    scaled, _ = walk(tx, [x * 2.0**20 for x in grads])
    _, other = walk(tx, grads[::-1])
    assert all(torch.equal(p, q) for p, q in zip(found, scaled, strict=True))
    torch.testing.assert_close(state.nu["w"], other.nu["w"], rtol=1e-14, atol=0)


def test_a_value_without_a_gradient_stays_and_decay_is_a_gradient_of_its_own():
    start = torch.tensor([2.0, -0.5, 0.0])
    assert torch.equal(walk(fz.adagrad(0.1), [torch.zeros(3)] * 2, start)[0][-1], start.to(F64))
    (decayed,), _ = walk(fz.adagrad(0.1, weight_decay=0.25), [torch.zeros(3)], start)
    (plain,), _ = walk(fz.adagrad(0.1), [0.25 * start], start)
    assert torch.equal(decayed, plain) and decayed[0] < 2.0


def test_a_skipped_update_leaves_no_trace():
    (_, first), (_, skipped), (last, _) = skipping(fz.adagrad(0.1, weight_decay=0.1), [True, False, True])
    assert first == skipped and last.chain["adagrad"].count == 2
