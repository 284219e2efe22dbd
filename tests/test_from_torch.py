"""torch's elementwise classes as values: each is its class, value by value, and counts where an update is applied."""

from __future__ import annotations

from functools import partial

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


class Mine(torch.optim.SGD):
    """A class of somebody's own."""


REFUSED = {
    "LBFGS": ("LBFGS", "torch.optim.LBFGS cannot work here: it runs the forward again inside its step"),
    "SparseAdam": (torch.optim.SparseAdam, "torch.optim.SparseAdam cannot work here: gradients are dense here"),
    "no class": ("Nothing", "torch.optim.Nothing is not known here; write one of ASGD, .*SGD, Muon, Adafactor"),
    "a number": (3, "torch.optim.int is not known here"),
    "one's own": (Mine, "Mine is no class of torch.optim, and nothing says how much of a leaf it reads; .*fz.lift"),
    "one's own, made": (lambda p: Mine(p, lr=0.1), "Mine is no class of torch.optim"),
    "two groups": (
        lambda p: torch.optim.SGD([{"params": p}, {"params": [torch.nn.Parameter(torch.ones(1))]}], lr=0.1),
        "does not make one optimizer with one group of parameters",
    ),
    "no optimizer": (lambda p: p, "does not make one optimizer with one group of parameters"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_a_value_is_refused_by_name(kind):
    which, words = REFUSED[kind]
    with pytest.raises(fz.ChainError, match=f"from_torch: .*{words}"):
        fz.from_torch(which, 0.1)


MADE = {
    "a name": ("AdamW", lambda p: torch.optim.AdamW(p, foreach=False)),
    "a class": (torch.optim.RMSprop, lambda p: torch.optim.RMSprop(p, foreach=False)),
    "a partial": (
        partial(torch.optim.AdamW, lr=0.02, betas=(0.8, 0.9), weight_decay=0.2),
        lambda p: torch.optim.AdamW(p, 0.02, (0.8, 0.9), weight_decay=0.2, foreach=False),
    ),
    "a function": (
        lambda p: torch.optim.NAdam(p, lr=torch.tensor(0.03125), momentum_decay=0.1),
        lambda p: torch.optim.NAdam(p, 0.03125, momentum_decay=0.1, foreach=False),
    ),
    "SGD with dampening": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    ),
    "SGD": (torch.optim.SGD, lambda p: torch.optim.SGD(p)),
    "Adafactor": ("Adafactor", lambda p: torch.optim.Adafactor(p)),
    "Adafactor, made": (
        lambda p: torch.optim.Adafactor(p, lr=0.1, eps=(None, 1e-2), d=2.0),
        lambda p: torch.optim.Adafactor(p, lr=0.1, eps=(None, 1e-2), d=2.0),
    ),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_name_a_class_and_a_function_that_makes_one_are_the_class(kind):
    which, make = MADE[kind]
    still = "empty"  # of which torch's Adafactor takes a mean
    close(masters(fz.from_torch(which), dtype=F64, frozen=still)[0], torchs(make, frozen=still), 1e-12)


def test_muon_is_made_with_the_defaults_of_its_class():
    g = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(6, 4, generator=g) for _ in range(2))
    for which, make in ((torch.optim.Muon, torch.optim.Muon), (partial(torch.optim.Muon, ns_steps=3, lr=0.1),) * 2):
        p = torch.nn.Parameter(start.clone())
        p.grad, theirs = grad.clone(), make([p])
        theirs.step()
        step = fz.train_step(
            fz.value_and_grad(lambda q, b: ((q["w"] * b[0]).sum(), torch.ones(()))), fz.from_torch(which)
        )
        assert torch.equal(step.params(step(step.init({"w": start}), grad[None])[0])["w"], p.detach())


def test_what_climbs_is_refused():
    with pytest.raises(ValueError, match=r"from_torch\('SGD'\): maximize=True climbs; return the negative loss"):
        fz.from_torch("SGD", 0.1, maximize=True)


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
