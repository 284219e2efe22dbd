"""transforms/map_leaves.py: a function of one gradient, leaf by leaf."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero.testing import simulate, tree_hash

RIGHT = (fz.scale_loss(init=2.0**10), fz.map_leaves(torch.sign, "blocks", elementwise=True), fz.adamw(1e-2))


def trained(stage, size):
    chain = fz.zero(zoo.source(), *RIGHT, stage=stage, accumulate=zoo.FEW // size)
    return tree_hash(zoo.train(chain, {"data": size})[0])


def test_one_hash_over_stages_and_worlds():
    found = {trained(0, 1), trained(3, 1)}
    found |= {h for stage in range(4) for h in simulate({"data": 2})(trained, stage, 2)}
    assert len(found) == 1


def test_it_sees_the_mean_gradient_whole_and_unscaled():
    seen = {}

    def centred(g):
        seen[tuple(g.shape)] = g.clone()
        return g - g.mean()

    chain = (zoo.source(), fz.accumulate(2), fz.all_reduce("data"), fz.scale_loss(init=8.0))
    step = fz.train_step(*chain, fz.map_leaves(centred, "embed"), fz.sgd(0.1), mesh={"data": 1})
    plain = fz.train_step(*chain, fz.sgd(0.1), mesh={"data": 1})
    state, want = step.init(zoo.params()), plain.grads(plain.init(zoo.params()), zoo.batch(0))["embed"]
    found = step.grads(state, zoo.batch(0))
    torch.testing.assert_close(seen[(11, 5)], want, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found["embed"], want - want.mean(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found["conv"], plain.grads(plain.init(zoo.params()), zoo.batch(0))["conv"])


def test_what_cannot_stand_there_is_refused():
    g = zoo.source()
    with pytest.raises(fz.ChainError, match="map_leaves.*nothing says that it works value by value"):
        fz.train_step(g, fz.shard("data", fz.map_leaves(torch.sign), fz.sgd(0.1)), mesh={"data": 2})
    step = fz.train_step(g, fz.all_reduce("data"), fz.map_leaves(torch.sign, "no such"), fz.sgd(0.1), mesh={"data": 1})
    with pytest.raises(ValueError, match="map_leaves.*matches no parameter"):
        step.init(zoo.params())
    step = fz.train_step(g, fz.all_reduce("data"), fz.map_leaves(torch.sum, "embed"), fz.sgd(0.1), mesh={"data": 1})
    with pytest.raises(TypeError, match="map_leaves: of the gradient of 'embed' its function makes torch.float32"):
        step(step.init(zoo.params()), zoo.batch(0))
