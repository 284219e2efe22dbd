"""Updates that are not finite are skipped with a word: at the first, then ever more rarely, with leaf and rank, and too
many in a row end the run.
"""

from __future__ import annotations

import contextlib
import logging
from itertools import product

import pytest
import torch
import zoo
from cover import EACH, cover

import funczero as fz
from funczero import P
from funczero.testing import tree_hash

MESH = {"data": -1}


@contextlib.contextmanager
def lines():
    """What is logged meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("absl")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def params():
    return {
        "a": torch.linspace(-1, 1, 12).view(4, 3),
        "blocks": [{"w": torch.linspace(0, 1, 9).view(3, 3)} for _ in range(2)],
        "spike": torch.ones(5),
    }


def loss(p, b):
    x = fz.layers(lambda q, x: torch.tanh(x @ q["w"]), p["blocks"], b["x"] @ p["a"])
    return (x.square().sum(1) * b["w"]).sum() + (p["spike"][3] * b["spike"]).sum(), b["w"].sum()


def batch(bad=None, weight=1.0):
    """Eight rows, of which one may spoil the gradient of `spike`."""
    b = {
        "x": torch.randn(8, 4, generator=torch.Generator().manual_seed(3)),
        "w": torch.full((8,), weight),
        "spike": torch.zeros(8),
    }
    if bad is not None:
        b["spike"][bad] = torch.inf
    return b


def make(stage, *left, units=("blocks",), k=1, **kw):
    g = fz.value_and_grad(loss, batch=P("data"), units=units)
    return fz.train_step(
        *fz.zero(g, *left, fz.clip_by_global_norm(1.0), fz.adamw(1e-2), stage=stage, accumulate=k), mesh=MESH, **kw
    )


def told(stage, units, donate, bad, n):
    """Lines of n bad updates after a good one, and whether the parameters stood still."""
    step = make(stage, units=units)
    step = fz.donate(step) if donate else step
    state, _ = step(step.init(params()), step.local_rows(batch()))
    before = tree_hash((step.params(state), state.chain["adamw"]))
    with lines() as said:
        for _ in range(n):
            state, m = step(state, step.local_rows(batch(bad)))
            assert not m.ok
    return said, tree_hash((step.params(state), state.chain["adamw"])) == before


WAYS = list(product(((), ("blocks",)), (False, True), (1, 2), range(4)))


@EACH
def test_the_first_skip_is_said_with_leaf_and_rank_and_then_ever_fewer(run_world, whole):
    """Without `whole` at every stage on every world, with units and without, in place and not."""
    for units, donate, world, stage in WAYS if whole else cover(WAYS, pairs=[(0, 1), (0, 3), (1, 3), (2, 3)]):
        found = run_world(world, told, stage, units, donate, {1: 3, 2: 6}[world], 9)
        where = f"the gradient of 'spike' is not finite on rank {world - 1}; the update is skipped"
        want = [
            f"step {t}: {where}{f' ({n} in a row, {n} in all)' if n > 1 else ''}; the loss is inf"
            for t, n in ((1, 1), (2, 2), (4, 4), (8, 8))
        ]
        assert found == [(want, True)] + [([], True)] * (world - 1), (units, donate, world, stage)


def ended(stage, donate):
    """The error of the call after three skips with patience 3, on this rank; and what comes after it."""
    step = make(stage, patience=3)
    step = fz.donate(step) if donate else step
    state = step.init(params())
    rows, good = step.local_rows(batch(6)), step.local_rows(batch())
    for x in (rows, rows, good, rows, rows, rows):  # three in a row
        state, _ = step(state, x)
    with pytest.raises(FloatingPointError) as caught:
        step(state, rows)
    state, m = step(state, good)  # the state is what it was
    return str(caught.value), m.ok.item(), int(state.updates)


@pytest.mark.parametrize("donate", [False, True])
def test_all_ranks_raise_after_so_many_skips_in_a_row(run_world, donate):
    for stage in range(4):
        words, ok, updates = zoo.everywhere(run_world, 2, ended, stage, donate)
        assert (
            words
            == "step: the last 3 updates were not finite and were skipped, the gradient of 'spike' is not finite on"
            " rank 1; look at the data and the learning rate, or write train_step(..., patience=...) larger"
        )
        assert ok and updates == 2


def test_twenty_is_the_patience_of_a_step():
    step = make(1)
    state, calls = step.init(params()), 0
    with pytest.raises(FloatingPointError, match="the last 20 updates were not finite"):
        while calls < 30:
            state, _ = step(state, batch(0))
            calls += 1
    assert calls == 20


def test_a_dynamic_scale_may_search_as_long_as_it_likes():
    """2 ** 40 takes 39 skips and more to come down to where half precision holds, and says nothing."""
    half = lambda p, b: loss(p, {k: x.half() if k == "x" else x for k, x in b.items()})
    scale = fz.scale_loss(init=2.0**40, weight=8, hysteresis=1)
    parts = fz.zero(fz.value_and_grad(half, batch=P("data"), units=("blocks",)), scale, fz.adamw(1e-2), stage=2)
    step = fz.train_step(*parts, mesh=MESH, policy="compute=float16", patience=5)
    state, skipped = step.init(params()), 0
    with lines() as said:
        for _ in range(60):
            state, m = step(state, batch())
            skipped += not m.ok
    assert skipped > 5 and m.ok and said == []


def test_a_static_scale_does_not_search():
    step = make(2, fz.scale_loss(init=8.0, weight=8, dynamic=False), patience=2)
    state = step.init(params())
    with lines() as said, pytest.raises(FloatingPointError, match="the last 2 updates"):
        for _ in range(3):
            state, _ = step(state, batch(0))
    assert len(said) == 2


def test_at_its_floor_a_dynamic_scale_counts():
    step = make(2, fz.scale_loss(init=1.0, floor=1.0, weight=8, hysteresis=1))
    with lines() as said:
        step(step.init(params()), batch(0))
    assert said == ["step 0: the gradient of 'spike' is not finite on rank 0; the update is skipped; the loss is inf"]


def test_an_update_of_no_weight_is_no_failure():
    step = make(1, patience=2)
    state = step.init(params())
    with lines() as said:
        for _ in range(5):
            state, m = step(state, batch(weight=0.0))
    assert m.empty and said == []


def test_two_runs_of_one_step_do_not_mix_their_skips():
    step = make(3, patience=3)
    a, b = step.init(params()), step.init(params())
    for _ in range(2):
        a, _ = step(a, batch(0))
        b, _ = step(b, batch(0))
    b, m = step(b, batch())
    assert m.ok
    a, _ = step(a, batch(0))
    b, _ = step(b, batch(0))
    with pytest.raises(FloatingPointError):
        step(a, batch(0))
    step(b, batch(0))


def streamed():
    """Micro-batches of a window cannot be run again: the leaf is named at the second skip."""
    step = fz.train_step(
        fz.value_and_grad(loss, batch=P("data"), units=("blocks",)),
        fz.accumulate(2, stream=True),
        fz.shard("data", fz.adamw(1e-2)),
        mesh=MESH,
    )
    state = step.init(params())
    with lines() as said:
        for _ in range(2):
            for m in zoo.split(step.local_rows(batch(6)), 2):
                state, _ = step(state, m)
            state, _ = step(state, None)
    return said


def test_a_window_names_the_leaf_when_it_happens_again(run_world):
    first, second = run_world(2, streamed)[0]
    assert (
        first
        == "step 0: the gradient is not finite (debug=True names the leaf and the rank); the update is skipped; the"
        " loss is inf"
    )
    assert (
        second
        == "step 1: the gradient of 'spike' is not finite on rank 1; the update is skipped (2 in a row, 2 in all); the"
        " loss is inf"
    )


def negative():
    step = make(1)
    state = step.init(params())
    with pytest.raises(ValueError) as caught:
        step(state, step.local_rows(batch(weight=-1.0)))
    return str(caught.value)


def test_a_negative_weight_is_refused_on_all_ranks(run_world):
    for world in (1, 2):
        assert (
            zoo.everywhere(run_world, world, negative)
            == "value_and_grad: the weights of update 0 add up to -8, but a weight counts examples and is not"
            " negative; "
            "return (sum of losses, sum of weights) with a weight above 0, or 0 where nothing counts"
        )


@pytest.mark.parametrize("patience", [0, -1, 2.5, True, None])
def test_patience_is_a_number_of_updates(patience):
    with pytest.raises(ValueError, match="is not a number of skipped updates; write an int of at least 1"):
        make(1, patience=patience)
