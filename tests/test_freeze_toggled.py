"""A freeze that is toggled in mid-run: a state handed to a step with another one."""

from __future__ import annotations

import logging

import pytest
import torch
import zoo

import funczero as fz
from funczero.testing import tree_hash

RIGHT = (fz.adamw(1e-2),)


def made(stage, *freeze):
    return fz.train_step(*fz.zero(zoo.source(), *freeze, *RIGHT, stage=stage), mesh={"data": 1})


@pytest.mark.parametrize("stage", [0, 3])
def test_moments_that_stay_are_kept_and_those_that_thaw_begin_at_zero(stage, caplog):
    part, whole = made(stage, fz.freeze("embed|conv")), made(stage)
    state, _ = part(part.init(zoo.params()), zoo.batch(0))
    logging.getLogger("absl").propagate = True
    with caplog.at_level(logging.WARNING):
        thawed = fz.reshard(state, whole)
    assert "begins as in step.init" in caplog.text and "embed" in caplog.text
    kept, now = (s.chain["adamw"].mu.present() for s in (state, thawed))
    paths = [leaf.path for leaf in thawed.params.where.structure.leaves]
    for i, x in now.items():
        still = [j for j, leaf in enumerate(state.params.where.structure.leaves) if leaf.path == paths[i] and j in kept]
        assert torch.equal(x, kept[still[0]]) if still else not x.count_nonzero()
        assert bool(still) == (paths[i] not in ("embed", "conv"))
    assert tree_hash(whole.params(thawed)) == tree_hash(part.params(state))
    further, _ = whole(thawed, zoo.batch(1))
    assert not torch.equal(whole.params(further)["embed"], part.params(state)["embed"])
    again = fz.reshard(further, part)
    last, _ = part(again, zoo.batch(2))
    assert torch.equal(part.params(last)["embed"], whole.params(further)["embed"])
