"""A trace speaks of the printed chain, and a profile's table of what is in the trace."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.nn.functional as F
import zoo
from engines import data, make
from torch.profiler import profile as profiler

import funczero as fz
from funczero.core.spans import MARK, span


def seen(stage, path):
    """(shares, hidden, table, names in the trace, names of the chain) of two updates."""
    right = (
        fz.scale_loss(init=4.0, weight=8.0),
        fz.clip_by_global_norm(1.0),
        fz.partition([("embed", fz.sgd(0.1)), ("", fz.adamw(1e-2))]),
    )
    step = fz.train_step(*fz.zero(zoo.source(), *right, stage=stage, accumulate=2), mesh={"data": -1})
    state = step.init(zoo.params())
    state, _ = step(state, step.local_rows(zoo.batch(0)))
    plain = fz.tree.clone(state)
    with fz.profile(path) as found:
        for t in (1, 2):
            state, _ = step(state, step.local_rows(zoo.batch(t)))
    for t in (1, 2):
        plain, _ = step(plain, step.local_rows(zoo.batch(t)))
    same = all(torch.equal(x, y) for x, y in zip(state.params.buffers, plain.params.buffers, strict=True))
    trace = json.loads(found.paths[0].read_text())
    names = {e["name"].removeprefix(MARK) for e in trace["traceEvents"] if e.get("name", "").startswith(MARK)}
    return found.shares(), found.hidden(), str(found), names, step.grad.names, found.travels, same, found.paths[0].name


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_part_of_the_chain_has_its_name_in_the_trace(run_world, tmp_path, stage, size):
    for rank, found in enumerate(run_world(size, seen, stage, tmp_path / "t.json")):
        shares, hidden, table, names, chain, travels, same, file = found
        assert same  # being looked at changes nothing
        assert file == ("t.json" if size == 1 else f"t.rank{rank}.json")
        assert {"forward", "backward", "accumulate(2)", "mean", "clip_by_global_norm(1)", "step(state, batch)"} <= names
        assert {"blocks/0", "blocks/1"} <= names
        own = {name for name in chain if name != ")" and not name.startswith(("value_and_grad", "shard", "sgd("))}
        assert own <= names and ("the end of shard('data')" in names) == (")" in chain)
        assert {"sgd", "adamw"} <= names  # each of the optimizers
        assert abs(sum(shares.values()) - 1) < 1e-6 and all(x >= 0 for x in shares.values())
        assert "2 calls of a step" in table
        if size == 2:
            gathers = {0: set(), 1: {"all_gather data"}, 3: {"all_gather data"}}[stage]
            assert gathers <= set(travels) and "all_reduce data" in travels
            assert all(0 <= x <= 1 for x in hidden.values()) and set(hidden) == set(travels)


def test_a_span_without_a_profiler_is_nothing_and_with_one_is_a_name():
    with span("never"):
        pass
    with profiler() as traced, span("some", "words"):
        torch.ones(2) + 1
    assert [e.name for e in traced.events() if e.name.startswith(MARK)] == [MARK + "some words"]


def test_a_profile_without_a_step_says_so(tmp_path):
    with fz.profile(tmp_path / "none.json") as found:
        torch.ones(2) + 1
    assert str(found) == "profile: no step was called in it" and found.shares() == {} and os.listdir(tmp_path)


def of_an_engine(stage):
    """(shares, collectives) of two updates of an engine, whose forwards run before its step."""
    engine = make(stage)
    with fz.profile() as found:
        for _ in range(2):
            engine.backward(F.cross_entropy(engine(data()[0]), data()[1]))
            engine.step()
    return found.shares(), found.travels, str(found)


@pytest.mark.parametrize("stage, size", [(0, 1), (3, 2)])
def test_a_profile_of_an_engine_has_its_forwards_and_backwards(run_world, stage, size):
    for shares, travels, table in run_world(size, of_an_engine, stage):
        assert {"forward", "backward"} <= set(shares) and abs(sum(shares.values()) - 1) < 1e-6
        assert "4 calls of a step" in table  # a micro-batch and an update, each a call
        if stage:
            assert "blocks.*" in shares and travels["all_gather data"].launches >= 4
