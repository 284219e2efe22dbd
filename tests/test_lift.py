"""optax's pair by hand: AdamW at every stage, what a pair may not return, and which pairs a bracket refuses."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import zoo
from cover import EACH
from optimizers import F32, F64, close, masters

import funczero as fz
from funczero import tree


class ByHand(NamedTuple):
    """AdamW as somebody writes it against optax: a pair of functions on trees."""

    count: Any
    mu: Any
    nu: Any


def by_hand_init(params):
    return ByHand(0, tree.map(torch.zeros_like, params), tree.map(torch.zeros_like, params))


def by_hand_update(grads, state, params):
    n = state.count + 1
    mu = tree.map(lambda m, g: zoo.B1 * m + (1 - zoo.B1) * g, state.mu, grads)
    nu = tree.map(lambda v, g: zoo.B2 * v + (1 - zoo.B2) * g * g, state.nu, grads)
    step = lambda m, v, p: -zoo.LR * (m / (1 - zoo.B1**n) / ((v / (1 - zoo.B2**n)).sqrt() + zoo.EPS) + zoo.DECAY * p)
    return tree.map(step, mu, nu, params), ByHand(n, mu, nu)


def lifted(dtype):
    """By stage: the pair's masters as a list, and their distance from the fused AdamW's."""
    out = []
    for stage in range(4):
        hand, fused = (
            masters(tx, stage, dtype)[0]
            for tx in (fz.lift((by_hand_init, by_hand_update), elementwise=True), fz.adamw(**zoo.TX))
        )
        out.append((max((hand[n] - fused[n]).abs().max().item() for n in hand if hand[n].numel()), zoo.tree_hash(hand)))
    return out


@EACH
@pytest.mark.parametrize(("dtype", "atol"), [(F64, 1e-13), (F32, 1e-6)])
def test_a_pair_by_hand_is_adamw_at_every_stage(run_world, dtype, atol, whole):
    for world in (1, 2) if whole else (2,) if dtype is F64 else (1,):
        found = zoo.everywhere(run_world, world, lifted, dtype)
        assert max(d for d, _ in found) < atol


def test_an_integer_in_a_lifted_state_may_stay_one():
    """It does not count a skipped update, so that what follows is still AdamW."""
    hand, _, state = masters(
        fz.lift((by_hand_init, by_hand_update), name="mine", elementwise=True), dtype=F64, updates=6
    )
    assert state.chain["mine"].count == 5 == int(state.updates) and [*state.chain] == ["mine"]
    close(hand, masters(fz.adamw(**zoo.TX), dtype=F64, updates=6)[0], 1e-13)


def writing(where):
    """A pair that writes into what it is given."""

    def update(grads, state, params):
        tree.map(lambda x: x.mul_(0.5), params if where == "params" else state)
        return tree.map(lambda g: -g, grads), state

    return fz.lift((lambda p: tree.map(torch.zeros_like, p), update), "writer", elementwise=True)


ODD_UPDATES = {
    "writes params": (
        writing("params"),
        RuntimeError,
        "writer: its update writes into the parameters, which stay as they were given; return new tensors",
    ),
    "writes state": (
        writing("state"),
        RuntimeError,
        "writer: its update writes into its state, which stay as they were given; return new tensors",
    ),
    "a number": (
        (lambda p: (), lambda g, s, p: (tree.map(lambda x: 0.0, g), s)),
        TypeError,
        "lift: its update of parameter 'embed' is a float; return a tensor of this part's shape",
    ),
    "a scalar that would spread": (
        (lambda p: (), lambda g, s, p: (tree.map(lambda x: x.sum(), g), s)),
        TypeError,
        r"lift: its update of parameter 'embed' is a tensor of shape \(\); return",
    ),
    "another tree": (
        (lambda p: (), lambda g, s, p: ([], s)),
        TypeError,
        "lift: its updates are no tree like the parameters",
    ),
    "two updates of a tied leaf": (
        (lambda p: (), lambda g, s, p: ({**g, "norm": -g["norm"] - 1}, s)),
        ValueError,
        "lift: it gives the tied parameter 'norm' one update at each of its paths, and they differ",
    ),
}


@pytest.mark.parametrize("behind", [(), (fz.sgd(1.0),)], ids=["last", "before another"])
@pytest.mark.parametrize("name", ODD_UPDATES)
def test_a_pair_that_does_not_return_updates_is_refused(name, behind):
    pair, error, words = ODD_UPDATES[name]
    tx = pair if isinstance(pair, fz.GradientTransformation) else fz.lift(pair, elementwise=True)
    step = fz.train_step(*fz.zero(zoo.source(), tx, *behind, stage=1), mesh={"data": 1})
    state = step.init(zoo.params())
    with pytest.raises(error, match=words):
        step(state, zoo.batch(0))


def test_a_name_that_would_break_paths_is_refused():
    with pytest.raises(
        ValueError, match="lift: name='a/b' would not tell leaves of the state apart on disk; write a word without"
    ):
        fz.lift((by_hand_init, by_hand_update), "a/b")


def test_a_lifted_pair_is_not_run_before_the_step_and_says_what_it_was_told():
    def init(params):
        raise AssertionError("nothing is tried")

    for told in (None, True, False):
        tx = fz.lift((init, lambda u, s, p: (u, s)), name="descend", elementwise=told)
        assert (tx.name, tx.elementwise) == ("descend", told)
    assert (
        fz.lift(fz.adamw(0.1)).elementwise is True and fz.lift(fz.adamw(0.1), elementwise=False).elementwise is False
    )  # an optimizer says it of itself


class LateTrust(NamedTuple):
    """A pair that works value by value for three updates, and then scales each leaf by its own norm: no probe of three
    updates sees it.
    """

    n: Any


LATE = (
    lambda params: LateTrust(0),
    lambda g, s, p: (tree.map(lambda x: -x / (x.square().sum().sqrt() + 1) if s.n >= 3 else -x, g), LateTrust(s.n + 1)),
)


def big_leaves_update(g, state, params):
    """Adafactor's habit: leaves of 128 values and more are treated otherwise."""
    return tree.map(lambda x: -x / (x.square().mean().sqrt() + 1) if x.numel() >= 128 else -x, g), state


@pytest.mark.parametrize(
    "pair", [LATE, (lambda params: (), big_leaves_update)], ids=["a trust ratio that starts late", "a size threshold"]
)
def test_a_pair_that_a_probe_would_trust_is_refused_in_a_bracket(pair):
    for told in (None, False):
        for stage in (1, 2, 3):
            with pytest.raises(
                fz.ChainError, match="lift: (nothing says that it works value by value|it needs whole leaves)"
            ):
                fz.train_step(*fz.zero(zoo.source(), fz.lift(pair, elementwise=told), stage=stage), mesh={"data": 2})
        fz.train_step(*fz.zero(zoo.source(), fz.lift(pair, elementwise=told), stage=0), mesh={"data": 2})
    fz.train_step(*fz.zero(zoo.source(), fz.lift(pair, elementwise=True), stage=3), mesh={"data": 2})  # promised
