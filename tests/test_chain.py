"""Composition: parts in parts, names of state, the mean, optimizers that rewrite and the one that applies."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import zoo
from linear import MESH, X, one, source

import funczero as fz
from funczero import tree


def test_parts_may_stand_in_tuples_lists_and_names():
    tail = fz.chain(fz.clip_by_global_norm(1.0), fz.sgd(1.0))
    assert type(tail) is tuple and fz.chain([tail[0], [tail]], (), tail) == (tail[0], *tail, *tail)
    flat = one(source(), fz.all_reduce("data"), *tail)[0]
    assert (
        one((source(), (fz.all_reduce("data"), [tail])))[0]
        == one([source()], fz.chain(fz.shard("data", tail)))[0]
        == flat
    )


# --- optimizers -------------------------------------------------------------------------------------------------------
@dataclass
class Trace:
    """optax's pair by hand: decayed sums of gradients; its updates are the next one's gradient."""

    decay: float
    name: str = "trace"

    def init(self, params):
        return tree.map(torch.zeros_like, params)

    def update(self, grads, state, params):
        new = tree.map(lambda t, g: self.decay * t + g, state, grads)
        return new, new


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_optimizer_that_is_not_the_last_rewrites_the_gradient(stage):
    """trace, then sgd, is sgd with momentum."""
    two, _, state = one(*fz.zero(source(), fz.lift(Trace(0.5)), fz.sgd(0.1), stage=stage), updates=3)
    assert two == one(*fz.zero(source(), fz.sgd(0.1, momentum=0.5), stage=stage), updates=3)[0]
    assert set(state.chain) == {"trace", "sgd"} and state.chain["trace"]["w"].tolist() == pytest.approx([3.5, -1.75])


def test_a_skip_moves_neither_optimizer():
    start = fz.train_step(*fz.zero(source(), fz.lift(Trace(0.5)), fz.sgd(0.1), stage=1), mesh=MESH)
    state, _ = start(start.init({"w": torch.zeros(2)}), X)
    new, m = start(state, {"x": torch.full((2, 2), torch.nan)})
    assert not m.ok and zoo.tree_hash([new.params, new.chain, new.updates]) == zoo.tree_hash(
        [state.params, state.chain, state.updates]
    )


def test_an_undeclared_pair_is_welcome_where_nothing_is_cut():
    class Half:
        def init(self, params):
            return {"n": torch.zeros(())}

        def update(self, grads, state, params):
            return tree.map(lambda g: -g / 2, grads), {"n": state["n"] + 1}

    w, _, state = one(source(), fz.all_reduce("data"), Half(), updates=2)
    assert w == [-2.0, 1.0] and state.chain["Half"]["n"] == 2
    assert one(source(), fz.shard("data", Half()))[0] == [-1.0, 0.5]  # an axis of size 1 cuts nothing


def test_state_is_flat_and_named_by_kind():
    """A second one of a kind has a number; brackets and places leave no trace, so names are alike at every stage."""
    tail = (
        fz.scale_loss(weight=2),
        fz.lift(Trace(0.5)),
        fz.lift(Trace(0.9)),
        fz.adamw(1.0),
        fz.sgd(1.0, momentum=0.5),
        fz.sgd(1.0),
    )
    names = [[*one(*fz.zero(source(), *tail, stage=s))[2].chain] for s in range(4)]
    assert names == [["scale_loss", "trace", "trace#2", "adamw", "sgd", "sgd#2"]] * 4
    _, m, state = one(fz.shard("data", source(), fz.accumulate(2, stream=False), fz.sgd(1.0)))
    assert [*state.chain] == ["sgd"]


def test_paths_of_a_state_carry_no_bracket():
    paths = {
        s: [
            n
            for n, _ in tree.paths(
                zoo.train(fz.zero(zoo.source(), *zoo.tx(scale=True), stage=s), MESH, updates=1)[2].chain
            )
        ]
        for s in (0, 3)
    }
    assert paths[0] == paths[3] and {"scale_loss/scale", "adamw/count", "adamw/mu/buffers/0"} <= set(paths[0])


def test_a_second_optimizer_applies_alone():
    """Only the last one moves the masters."""
    assert one(source(), fz.all_reduce("data"), fz.sgd(1.0), fz.sgd(1.0))[0] == [2.0, -1.0]  # p - (-g)
