"""The named chains are the chains one would write."""

from __future__ import annotations

import pytest
import zoo

import funczero as fz

g, (clip, adamw) = zoo.source(), zoo.tx()
g2 = zoo.source(("node", "local"))
FLAT, NEST = {"data": 2}, {"node": 2, "local": 2}
SAME = {
    "stage 0": (
        fz.zero(g, clip, adamw, stage=0, accumulate=4),
        (g, fz.accumulate(4), fz.all_reduce("data"), clip, adamw),
        FLAT,
    ),
    "stage 1": (
        fz.zero(g, clip, adamw, stage=1, accumulate=4),
        (g, fz.accumulate(4), fz.shard("data", clip, adamw)),
        FLAT,
    ),
    "stage 2": (
        fz.zero(g, clip, adamw, stage=2, accumulate=4),
        (g, fz.shard("data", fz.accumulate(4), clip, adamw)),
        FLAT,
    ),
    "stage 3": (
        fz.zero(g, clip, adamw, stage=3, accumulate=4),
        (fz.shard("data", g, fz.accumulate(4), clip, adamw),),
        FLAT,
    ),
    "one micro-batch": (fz.zero(g, adamw, stage=2), (g, fz.shard("data", adamw)), FLAT),
    "two axes, 0": (
        fz.zero(g2, adamw, stage=0, axis=("node", "local")),
        (g2, fz.all_reduce("node"), fz.all_reduce("local"), adamw),
        NEST,
    ),
    "two axes, 1": (
        fz.zero(g2, adamw, stage=1, axis=("local", "node"), accumulate=2),
        (g2, fz.accumulate(2), fz.shard("local", fz.shard("node", adamw))),
        NEST,
    ),
    "two axes, 3": (
        fz.zero(g2, adamw, stage=3, axis=("local", "node"), accumulate=2),
        (fz.shard("local", fz.shard("node", g2, fz.accumulate(2), adamw)),),
        NEST,
    ),
    "hpz": (
        fz.hpz(g2, clip, adamw, accumulate=2),
        (fz.shard("local", g2, fz.accumulate(2), fz.shard("node", clip, adamw)),),
        NEST,
    ),
    "hpz, named": (
        fz.hpz(g2, adamw, within="node", across="local"),
        (fz.shard("node", g2, fz.shard("local", adamw)),),
        NEST,
    ),
    "mics": (
        fz.mics(g2, clip, adamw, accumulate=2),
        (fz.shard("local", g2, fz.accumulate(2), fz.all_reduce("node"), clip, adamw),),
        NEST,
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_named_chain_is_the_chain(name):
    named, written, mesh = SAME[name]
    a, b = fz.train_step(*named, mesh=mesh), fz.train_step(*written, mesh=mesh)
    assert str(a) == str(b) and a.grad.layout == b.grad.layout and a.specs(zoo.params()) == b.specs(zoo.params())


def test_a_threshold_keeps_small_leaves_whole_at_every_bracket():
    for stage in (1, 2, 3):
        specs = fz.train_step(*fz.zero(g2, adamw, stage=stage, axis=("local", "node"), threshold=30), mesh=NEST).specs(
            zoo.params()
        )["grads"]
        assert specs["norm"] == fz.P() and specs["embed"] == fz.P(("local", "node"))


def test_a_named_chain_can_be_handed_on_whole():
    assert (
        fz.train_step(fz.zero(g, adamw, stage=2), mesh=FLAT).grad.names
        == fz.train_step(*fz.zero(g, adamw, stage=2), mesh=FLAT).grad.names
    )


@pytest.mark.parametrize("stage", [-1, 4, "2", None])
def test_other_stages_do_not_exist(stage):
    with pytest.raises(ValueError, match="does not exist; write 0, 1, 2 or 3"):
        fz.zero(g, adamw, stage=stage)
