"""The formulas of optimizers of whole leaves: torch's classes bit for bit, papers in plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from leaves import directly, drawn
from optimizers import F64, skipping

import funczero as fz


@pytest.mark.parametrize(
    "kw",
    [{}, {"nesterov": False, "weight_decay": 0.1, "momentum": 0.8}, {"scale": "match_rms_adamw", "steps": 3}],
    ids=["default", "plain", "rms"],
)
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (1, 7)], ids=str)
def test_muon_is_torchs_class_bit_for_bit(shape, kw):
    grads, start = drawn(*shape)
    p = torch.nn.Parameter(start.clone())
    named = {"scale": "adjust_lr_fn", "steps": "ns_steps"}
    theirs = torch.optim.Muon([p], 0.02, **{"weight_decay": 0.0} | {named.get(k, k): x for k, x in kw.items()})
    for g, got in zip(grads, directly(fz.muon(0.02, **kw), grads, start), strict=True):
        p.grad = g.clone()
        theirs.step()
        assert torch.equal(got, p.detach())


def test_a_batch_of_matrices_is_each_of_them_and_flattened_is_one():
    grads, start = drawn(3, 4, 5)
    got = directly(fz.muon(0.02), grads, start)[-1]
    one = [directly(fz.muon(0.02), [g[i] for g in grads], start[i])[-1] for i in range(3)]
    assert torch.equal(got, torch.stack(one))
    flat = directly(fz.muon(0.02, flatten=3), grads, start)[-1]
    assert torch.equal(flat, directly(fz.muon(0.02), [g.flatten(1) for g in grads], start.flatten(1))[-1].view(3, 4, 5))


@pytest.mark.parametrize("corrected", ["moments", "rate", "none"])
def test_lamb_is_plain_arithmetic(corrected):
    grads, p = drawn(5, 3, dtype=F64)
    m = v = torch.zeros_like(p)
    got = directly(fz.lamb(0.1, 0.8, 0.9, 1e-4, 0.1, low=0.05, high=2.0, corrected=corrected), grads, p)
    for n, (g, mine) in enumerate(zip(grads, got, strict=True), 1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        c1, c2 = (1 - 0.8**n, 1 - 0.9**n) if corrected == "moments" else (1, 1)
        u = (m / c1) / ((v / c2).sqrt() + 1e-4) + 0.1 * p
        rate = 0.1 * ((1 - 0.9**n) ** 0.5 / (1 - 0.8**n) if corrected == "rate" else 1)
        p = p - rate * (p.norm() / u.norm()).clamp(0.05, 2.0) * u
        torch.testing.assert_close(mine, p, rtol=1e-12, atol=1e-12)


def test_lars_is_plain_arithmetic():
    grads, p = drawn(5, 3, dtype=F64)
    v = torch.zeros_like(p)
    for g, mine in zip(grads, directly(fz.lars(2.0, 0.8, 0.1, trust=0.01, eps=1e-3), grads, p), strict=True):
        v = 0.8 * v + 2.0 * 0.01 * p.norm() / (g.norm() + 0.1 * p.norm() + 1e-3) * (g + 0.1 * p)
        p = p - v
        torch.testing.assert_close(mine, p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "kw", [{}, {"weight_decay": 0.1, "d": 2.0, "beta2_decay": -0.5, "eps": (1e-6, 1e-2)}], ids=["default", "other"]
)
@pytest.mark.parametrize("shape", [(6, 10), (3, 4, 5), (7,), ()], ids=str)
def test_adafactor_is_torchs_class(shape, kw):
    grads, start = drawn(*shape, dtype=F64)
    p = torch.nn.Parameter(start.clone())
    theirs = torch.optim.Adafactor([p], 0.05, **kw)
    for g, got in zip(grads, directly(fz.adafactor(0.05, **kw), grads, start), strict=True):
        p.grad = g.clone()
        theirs.step()
        torch.testing.assert_close(got, p.detach(), rtol=1e-12, atol=1e-12)


def root(x):
    values, vectors = torch.linalg.eigh(x)
    return vectors @ torch.diag(values**-0.25) @ vectors.T


@pytest.mark.parametrize("every", [1, 3])
def test_shampoo_is_plain_arithmetic(every):
    grads, p = drawn(5, 3, dtype=F64)
    left, right, t = torch.zeros(5, 5, dtype=F64), torch.zeros(3, 3, dtype=F64), torch.zeros_like(p)
    got = directly(fz.shampoo(0.1, 0.9, 0.1, eps=0.5, b2=0.8, every=every), grads, p)
    for n, (g, mine) in enumerate(zip(grads, got, strict=True)):
        left, right = 0.8 * left + g @ g.T, 0.8 * right + g.T @ g
        if n % every == 0:
            a, b = (root(x + 0.5 * torch.eye(len(x), dtype=F64)) for x in (left, right))
        t = 0.9 * t + a @ g @ b
        p = p * (1 - 0.1 * 0.1) - 0.1 * t
        torch.testing.assert_close(mine, p, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("every", [1, 3])
def test_soap_is_plain_arithmetic(every):
    """On a square, whose first gradient leaves no eigenvector to chance."""
    grads, p = drawn(4, 4, dtype=F64)
    left, right, m, v = (torch.zeros(4, 4, dtype=F64) for _ in range(4))
    got = directly(fz.soap(0.1, 0.8, 0.9, 1e-2, 0.1, every=every), grads, p)
    for n, (g, mine) in enumerate(zip(grads, got, strict=True), 1):
        left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
        if (n - 1) % every == 0:
            a, b = (torch.linalg.eigh(x)[1] for x in (left, right))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * (a.T @ g @ b) ** 2
        u = a.T @ m @ b / (1 - 0.8**n) / ((v / (1 - 0.9**n)).sqrt() + 1e-2)
        p = p * (1 - 0.1 * 0.1) - 0.1 * a @ u @ b.T
        torch.testing.assert_close(mine, p, rtol=1e-10, atol=1e-10)


PLAIN = {
    "lamb": fz.lamb(0.02, weight_decay=0.1),
    "lars": fz.lars(1.0, weight_decay=0.1),
    "muon": fz.muon(0.02, dtype=F64, small=0),
    "adafactor": fz.adafactor(0.1),
    "shampoo": fz.shampoo(0.1, 0.9, every=2),
    "soap": fz.soap(0.1, every=2),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_pair_is_the_formula(name):
    """What an optimizer further right reads, and what a step without a mesh may lift."""
    grads, start = drawn(6, 4, dtype=F64)
    tx = PLAIN[name]
    for a, b in zip(directly(tx, grads, start), directly(fz.lift((tx.init, tx.update)), grads, start), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_leaf_that_is_zero_has_a_trust_of_one(name):
    got = directly(PLAIN[name], drawn(3)[0], torch.zeros(3))[0]
    assert got.isfinite().all() and got.abs().min() > 0


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_skipped_update_moves_nothing(name):
    (_, first), (_, skipped), (last, after) = skipping(PLAIN[name], [True, False, True])
    assert first == skipped != after and last.chain[name].count == 2
