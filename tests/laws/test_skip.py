"""With ok false every leaf but the scale's own state, the step and reset stream accumulators is unchanged, in every
chain.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import zoo
from cover import params as covered

import funczero as fz
from funczero import tree
from funczero.layout.processes import world_size
from funczero.testing import tree_hash

MOVES = {
    "step",
    "chain/scale_loss/scale",
    "chain/scale_loss/hysteresis",
    "chain/scale_loss/iteration",
    "chain/scale_loss/last_overflow",
}


def leaves(state):
    """Bits of every leaf of a state, by path."""
    return {path: tree_hash(x) for path, x in tree.paths(state._asdict())}


def weightless(t, dtype=torch.float32):
    """A batch that weighs nothing; its losses are zero."""
    b = zoo.batch(t, dtype)
    return b | {"mask": torch.zeros_like(b["mask"])}


def moved(make, donate, scaled):
    """By chain: whether the update was applied, and which leaves moved in it."""
    k, out = zoo.MICROS // world_size(), {}
    for name, (parts, stream) in zoo.flat_chains(zoo.source(), k, zoo.tx(scale=scaled)).items():
        step = fz.train_step(*parts, mesh={"data": -1})
        step = fz.donate(step) if donate else step
        state = step.init(zoo.params())
        for b in (zoo.batch(0), make(zoo.BAD)):
            rows, before = step.local_rows(b), leaves(state)
            for x in [*zoo.split(rows, stream), None] if stream else [rows]:
                state, m = step(state, x)
        after = leaves(state)
        out[name] = bool(m.ok), {p for p in before if before[p] != after.get(p)} | (after.keys() - before.keys())
    return out


@pytest.mark.parametrize(("world", "donate"), covered(product((1, 2), (False, True)), by=1))
def test_an_overflow_moves_the_scale_alone(run_world, world, donate):
    found = zoo.everywhere(run_world, world, moved, zoo.batch, donate, True)
    assert {
        n: (ok, paths - MOVES) for n, (ok, paths) in found.items() if ok or paths - MOVES or "step" not in paths
    } == {}


@pytest.mark.parametrize("make", [zoo.batch, weightless])
def test_without_a_scale_only_the_step_moves(make):
    assert set(map(repr, moved(make, False, False).values())) == {repr((False, {"step"}))}


def test_an_update_of_no_weight_moves_the_step_alone():
    assert set(map(repr, moved(weightless, False, True).values())) == {repr((False, {"step"}))}
