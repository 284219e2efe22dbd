"""Pairs that somebody wrote, handed whole leaves: one at a time by its owner, or all on every rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import zoo
from cover import EACH
from leaves import directly, drawn, going_on, masters, trained
from optimizers import F64

import funczero as fz
from funczero import tree
from funczero.checkpoint.names import named
from funczero.testing.simulate import simulate


class Trust(NamedTuple):
    """Momentum, and a count that scales."""

    n: Any
    m: Any


def trust_init(params):
    return Trust(torch.zeros((), dtype=torch.int64), tree.map(lambda p: p.clone(), params))


def trust_update(grads, state, params):
    """Each leaf by the norms of its gradient and of itself."""
    m = tree.map(lambda m, g: 0.9 * m + g, state.m, grads)
    move = lambda m, p: -0.01 * m * (p.norm() + 1) / (m.norm() + 1) / (state.n + 1)
    return tree.map(move, m, params), Trust(state.n + 1, m)


def clipped_update(grads, state, params):
    """All leaves by the norm of all."""
    total = sum((g * g).sum() for g in tree.leaves(grads)).sqrt()
    m = tree.map(lambda m, g: 0.9 * m + g / (1 + total), state.m, grads)
    return tree.map(lambda m: -0.05 * m, m), Trust(state.n + 1, m)


def keyword_update(updates, state, *, params=None, inplace=True):
    """torchopt's signature; whoever lets it write in place is told by funczero."""
    assert params is not None and not inplace
    return trust_update(updates, state, params)


LIFTED = {
    "leafwise": fz.lift((trust_init, trust_update), "trust", needs="leafwise"),
    "whole": fz.lift((trust_init, clipped_update), "clipped", needs="whole"),
    "torchopt's": fz.lift((trust_init, keyword_update), "keyword", needs="leafwise"),
    "leafwise, in a partition": fz.partition(
        [("w$|conv", fz.lift((trust_init, trust_update), "trust", needs="leafwise")), ("", fz.adamw(1e-2))]
    ),
    "whole, in a partition": fz.partition(
        [("w$|conv", fz.lift((trust_init, clipped_update), "clipped", needs="whole")), ("", fz.adamw(1e-2))]
    ),
    "leafwise, before another": fz.chain(fz.lift((trust_init, trust_update), "trust", needs="leafwise"), fz.sgd(1.0)),
}


FAST = ("leafwise", "whole, in a partition")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in LIFTED])
@EACH
def test_a_pair_is_handed_whole_leaves_and_has_the_bits_of_the_unsharded_run(name, whole):
    found = {masters(LIFTED[name], stage, donate=stage > 1) for stage in (0, 3)}
    for world, stages in ((2, (1, 3)), (4, (2,))) if whole else ((2, (1 if name == FAST[0] else 3,)), (4, (2,))):
        for stage in stages:
            found |= set(simulate({"data": world})(lambda s: masters(LIFTED[name], s, donate=s == 3), stage))
    assert len(found) == 1


def test_leafwise_pairs_are_their_own_values_on_whole_leaves():
    """Without a mesh the pair alone, a leaf at a time."""
    grads, start = drawn(5, 4, dtype=F64)
    state, p = trust_init({"w": start}), start
    for g, got in zip(grads, directly(LIFTED["leafwise"], grads, start), strict=True):
        updates, state = trust_update({"w": g}, state, {"w": p})
        p = p + updates["w"]
        assert torch.equal(got, p)


def kept(name, stage):
    state = trained(LIFTED[name], stage, updates=3)[1]
    return {n: (p.shape, None if stage else p.value.clone()) for n, p in named(state).parts.items()}


@pytest.mark.parametrize("name", ["leafwise", "whole", "leafwise, in a partition"])
def test_states_of_pairs_have_the_same_names_and_shapes_at_every_stage_and_world(name):
    want = {n: shape for n, (shape, _) in kept(name, 0).items()}
    for got in simulate({"data": 2})(kept, name, 3):
        assert {n: shape for n, (shape, _) in got.items()} == want
    assert "trust/m/conv" in want or name == "whole"


def handed_on(name):
    step = fz.train_step(*fz.zero(zoo.source(), LIFTED[name], stage=1, accumulate=4), mesh={"data": -1})
    other = fz.train_step(*fz.zero(zoo.source(), LIFTED[name], stage=3, accumulate=4), mesh={"data": -1})
    state = step.init(zoo.params())
    for t in (0, 1):
        state, _ = step(state, step.local_rows(zoo.batch(t)))
    return going_on(step, state, (2,)), going_on(other, fz.reshard(state, other), (2,))


@pytest.mark.parametrize("name", ["leafwise", "whole"])
def test_states_of_pairs_are_handed_to_another_stage(name):
    for one, other in simulate({"data": 2})(handed_on, name):
        assert one == other


PAIRS_REFUSED = {
    "numbers in its state": ((lambda p: {"n": 0}, trust_update), TypeError, "its state holds a int at 'n'"),
    "a state that changes": (
        (trust_init, lambda g, s, p: (g, Trust(s.n, tree.map(lambda m: m[0], s.m)))),
        TypeError,
        "its state changes its form at 'm'; return tensors of the shapes and dtypes that init gives for zeros",
    ),
}


@pytest.mark.parametrize("name", PAIRS_REFUSED)
def test_a_leafwise_pair_whose_state_cannot_be_kept_is_refused(name):
    pair, error, words = PAIRS_REFUSED[name]
    step = fz.train_step(*fz.zero(zoo.source(), fz.lift(pair, needs="leafwise"), stage=1), mesh={"data": 1})
    with pytest.raises(error, match=f"lift: {words}"):
        step(step.init(zoo.params()), zoo.batch(0))


def test_what_does_not_say_how_much_is_refused():
    for kw in ({"needs": "leaf_norms"}, {"needs": "rows"}, {"needs": "whole", "elementwise": False}):
        with pytest.raises(ValueError, match="lift: needs='.*does not say how much of a leaf moves a value"):
            fz.lift((trust_init, trust_update), **kw)
