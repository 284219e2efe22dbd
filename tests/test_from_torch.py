"""torch's elementwise classes as values: each is its class, value by value, and counts where an update is applied."""

from __future__ import annotations

import pytest
import torch
import zoo
from optimizers import F64, close, masters, skipping, torchs, walk

import funczero as fz
from funczero.optim.from_torch import ELEMENTWISE

NAMES = pytest.mark.parametrize("name", ELEMENTWISE)


def drawn(updates=5, n=7):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=g, dtype=F64) for _ in range(updates)], torch.randn(n, generator=g, dtype=F64)


@NAMES
def test_the_pair_is_the_class_bit_for_bit_but_for_its_updates(name):
    """On one leaf, without a mesh: the masters are p + (new p - p), rounded once."""
    grads, start = drawn()
    found, _ = walk(fz.from_torch(name, 0.05), grads, start)
    p = torch.nn.Parameter(start.clone())
    theirs = getattr(torch.optim, name)([p], lr=0.05, foreach=False)
    for g, q in zip(grads, found, strict=True):
        p.grad = g.clone()
        theirs.step()
        torch.testing.assert_close(q, p.detach(), rtol=1e-13, atol=1e-15)


@NAMES
def test_every_value_goes_its_own_way(name):
    """What `elementwise` promises of each of these classes: an order of values is of no account."""
    grads, start = drawn()
    order = torch.randperm(len(start), generator=torch.Generator().manual_seed(1))
    tx = fz.from_torch(name, 0.05)
    assert tx.elementwise and tx.name == name.lower()
    for p, q in zip(walk(tx, grads, start)[0], walk(tx, [g[order] for g in grads], start[order])[0], strict=True):
        assert torch.equal(p[order], q)


@NAMES
def test_a_skipped_update_moves_nothing_that_the_class_counts(name):
    tx = fz.from_torch(name, 0.05)
    (_, first), (_, skipped), (last, after) = skipping(tx, [True, False, True])
    assert first == skipped != after and last.chain[tx.name].scalars["step"] == 2


@NAMES
def test_a_state_is_made_of_what_the_class_keeps(name):
    """Numbers for all values and trees like the parameters, by the class's own names."""
    _, start = drawn()
    state = fz.from_torch(name, 0.05).init({"a": start, "b": start[:2]})
    p = torch.nn.Parameter(start.clone())
    theirs = getattr(torch.optim, name)([p], lr=0.05, foreach=False)
    p.grad = torch.zeros_like(p)
    theirs.step()
    kept = theirs.state[p]
    assert set(state.scalars) | set(state.moments) == {k for k, x in kept.items() if isinstance(x, torch.Tensor)}
    assert all(x.dim() == 0 for x in state.scalars.values())
    assert all({k: x.shape for k, x in m.items()} == {"a": (7,), "b": (2,)} for m in state.moments.values())


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "LBFGS", "SparseAdam", "SGD", "Nothing"])
def test_a_class_that_reads_more_than_one_place_is_refused(name):
    with pytest.raises(
        fz.ChainError, match=f"torch.optim.{name} is not known to work value by value; write one of ASGD"
    ):
        fz.from_torch(name, 0.1)


def test_a_schedule_is_read_at_applied_updates():
    grads, start = drawn(3)
    rates = [0.1, 0.02, 0.3]
    found, state = walk(fz.from_torch("RMSprop", lambda u: rates[u]), grads, start)
    p = torch.nn.Parameter(start.clone())
    theirs = torch.optim.RMSprop([p], lr=0.1, foreach=False)
    for g, q, rate in zip(grads, found, rates, strict=True):
        theirs.param_groups[0]["lr"], p.grad = rate, g.clone()
        theirs.step()
        torch.testing.assert_close(q, p.detach(), rtol=1e-13, atol=1e-15)
    assert state.rates["lr"] == 0.3


# --- in a step --------------------------------------------------------------------------------------------------------
def test_a_class_of_torch_has_its_own_defaults():
    for name in ("AdamW", "RMSprop", "Adadelta", "NAdam"):
        close(
            masters(fz.from_torch(name), dtype=F64)[0],
            torchs(lambda p, name=name: getattr(torch.optim, name)(p, foreach=False)),
            1e-13,
        )
    moved = masters(fz.from_torch("AdamW", 0.5), updates=1)[0]["unused"] / zoo.params()["unused"]
    torch.testing.assert_close(moved, torch.full((4,), 1 - 0.5 * 0.01))
