"""A state handed to another step in memory goes on with the bits it would have had."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz

TWO, NESTED = {"data": 2}, {"node": 2, "local": 1}


def make(stage, mesh=TWO, units=("blocks",), right=None):
    axes = tuple(mesh)
    right = zoo.tx(scale=True) if right is None else right
    if len(axes) == 1:
        return fz.train_step(*fz.zero(zoo.source(units=units), *right, stage=stage, accumulate=2), mesh=mesh)
    inside = fz.shard("local", fz.shard("node", *right))
    return fz.train_step(zoo.source(axes, units=units), fz.accumulate(2), inside, mesh=mesh)


def rows(step, t):
    return step.local_rows(zoo.batch(t, micros=4))


def run(step, state, start, stop):
    for t in range(start, stop):
        state, _ = step(state, rows(step, t))
    return state


def handed(first, second):
    """Hashes of masters, moments and scale: of a run that changes steps, and of one that does not."""
    a, b = make(*first), make(*second)
    state = run(a, a.init(zoo.params(), key=7), 0, 3)
    over = fz.reshard(state, b)
    mixed = run(b, over, 3, 5)
    whole = run(a, state, 3, 5)
    return zoo.bits((b.params(mixed), [], mixed, b)), zoo.bits((a.params(whole), [], whole, a))


WAYS = [((0,), (3,)), ((3,), (1,)), ((2,), (0,)), ((1,), (3, TWO, ())), ((3, TWO, ()), (2, NESTED))]


@pytest.mark.parametrize(("first", "second"), WAYS, ids=str)
def test_a_run_that_changes_steps_has_the_same_bits(run_world, first, second):
    mixed, whole = zoo.everywhere(run_world, 2, handed, first, second)
    assert mixed == whole


def other_optimizer():
    a, b = make(1), make(3, right=(fz.clip_by_global_norm(0.5), fz.sgd(0.1, momentum=0.9)))
    state = run(a, a.init(zoo.params(), key=7), 0, 2)
    over, fresh = fz.reshard(state, b), b.init(a.params(state), key=7)
    same = all(torch.equal(x, y) for x, y in zip(over.params.buffers, fresh.params.buffers))
    run(b, over, 2, 3)
    return same, int(over.step), int(over.updates), sorted(over.chain) == sorted(fresh.chain)


def test_another_optimizer_begins_anew_on_the_same_masters(run_world):
    assert zoo.everywhere(run_world, 2, other_optimizer) == (True, 2, 2, True)


def test_rates_are_those_of_the_step_and_that_is_said(caplog):
    first = make(0, {"data": 1}, right=(fz.adamw(0.1),))
    second = make(0, {"data": 1}, right=(fz.adamw(0.02),))
    state = run(first, first.init(zoo.params()), 0, 1)
    _, metrics = second(fz.reshard(state, second), rows(second, 1))
    assert metrics.lr.item() == 0.02
    assert "reshard: 'adamw/rates/lr' is 0.1 in the state and 0.02 in the step, which counts" in caplog.messages


def frozen_and_back():
    """Handed from a step that freezes a leaf to one that trains it, and back: (masters as they were, moved, kept)."""
    first = fz.train_step(*fz.zero(zoo.source(), fz.freeze("embed"), *zoo.tx(), stage=1, accumulate=2), mesh=TWO)
    second = make(3)
    state = run(first, first.init(zoo.params(), key=7), 0, 2)
    over = fz.reshard(state, second)
    on = run(second, over, 2, 3)
    back = run(first, fz.reshard(on, first), 4, 5)
    given, held, now, kept = (
        s.params(x)["embed"] for s, x in ((first, state), (second, over), (second, on), (first, back))
    )
    return torch.equal(given, held), not torch.equal(held, now), torch.equal(now, kept)


def test_a_leaf_may_be_frozen_on_one_side(run_world):
    assert zoo.everywhere(run_world, 2, frozen_and_back) == (True, True, True)


def test_what_cannot_be_handed_over_is_refused():
    step = make(0, {"data": 1}, right=(fz.adamw(0.1),))
    with pytest.raises(TypeError, match="reshard: it takes a TrainState, but this is a dict"):
        fz.reshard({}, step)
    state = step.init(zoo.params())
    stream = fz.train_step(
        zoo.source(), fz.accumulate(2, stream=True), fz.all_reduce("data"), fz.adamw(0.1), mesh={"data": 1}
    )
    open_, _ = stream(stream.init(zoo.params()), zoo.split(zoo.batch(0, micros=2), 1)[0])
    with pytest.raises(ValueError, match="reshard: 'accumulate' holds an open window"):
        fz.reshard(open_, step)
    wide = fz.train_step(zoo.source(), fz.all_reduce("data"), fz.adamw(0.1), mesh={"data": 1}, policy="float64")
    with pytest.raises(ValueError, match="is float32 in the state and float64 in the step"):
        fz.reshard(state, wide)
    other = zoo.params()
    other["one"] = torch.ones(2)
    with pytest.raises(ValueError, match="has shape"):
        fz.reshard(state._replace(params=step.init(other).params), step)
