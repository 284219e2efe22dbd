"""Composition: parts in parts, names of state, the mean, optimizers that rewrite and the one that applies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import zoo

import funczero as fz
from funczero import P, tree
from funczero.core.transform import after
from funczero.core.types import Formula, GradientTransformation, Group, Reading
from funczero.transforms.mean import pointwise

MESH = {"data": 1}
X = {"x": torch.tensor([[1.0, 2.0], [3.0, -4.0]])}


def linear(p, b):
    """Gradient of the sum: the sum of rows."""
    return (b["x"] @ p["w"]).sum(), torch.tensor(float(len(b["x"])))


def source(**kw):
    return fz.value_and_grad(linear, batch=P("data"), **kw)


def one(*parts, batch=X, updates=1, w=(0.0, 0.0), **kw):
    """The masters, metrics and state after some updates."""
    step = fz.train_step(*parts, mesh=MESH, **kw)
    state = step.init({"w": torch.tensor(w)})
    for _ in range(updates):
        state, m = step(state, step.local_rows(batch))
    return step.params(state)["w"].tolist(), m, state


def test_parts_may_stand_in_tuples_lists_and_names():
    tail = fz.chain(fz.clip_by_global_norm(1.0), fz.sgd(1.0))
    assert type(tail) is tuple and fz.chain([tail[0], [tail]], (), tail) == (tail[0], *tail, *tail)
    flat = one(source(), fz.all_reduce("data"), *tail)[0]
    assert (
        one((source(), (fz.all_reduce("data"), [tail])))[0]
        == one([source()], fz.chain(fz.shard("data", tail)))[0]
        == flat
    )


def test_the_mean_is_inserted_once_by_the_first_nonlinear_transform():
    step = fz.train_step(
        source(), fz.accumulate(2), fz.all_reduce("data"), fz.clip_by_global_norm(1.0), fz.sgd(1.0), mesh=MESH
    )
    assert step.grad.names == (
        "value_and_grad(batch=P('data'))",
        "accumulate(2)",
        "all_reduce('data')",
        "mean",
        "clip_by_global_norm(1)",
        "sgd",
    )
    by_hand = fz.train_step(
        source(), fz.accumulate(2), fz.all_reduce("data"), fz.mean, fz.clip_by_global_norm(1.0), fz.sgd(1.0), mesh=MESH
    )
    assert by_hand.grad.names == step.grad.names and [a.mean for a in step.grad.arrows] == [False] * 3 + [True] * 3
    with pytest.raises(fz.ChainError, match="^mean: "):
        fz.train_step(source(), fz.all_reduce("data"), fz.clip_by_global_norm(1.0), fz.mean, fz.sgd(1.0), mesh=MESH)


def test_the_mean_divides_by_the_weight():
    w, m, _ = one(source(), fz.all_reduce("data"), fz.sgd(1.0))
    assert w == [-2.0, 1.0] and m.loss == 0 and m.weight == 2 and m.grad_norm.item() == pytest.approx(5**0.5)


@pytest.mark.parametrize("weight", [1e-300, 1e-30, 3.0, 1e30])
def test_the_factor_survives_odd_weights(weight):
    g = fz.value_and_grad(
        lambda p, b: ((p["w"] * b["x"]).sum() * weight, torch.tensor(weight, dtype=torch.float64)), batch=P("data")
    )
    w, m, _ = one(
        g, fz.all_reduce("data"), fz.sgd(1.0), batch={"x": torch.ones(1, 2, dtype=torch.float64)}, policy="float64"
    )
    assert w == pytest.approx([-1.0, -1.0]) and m.weight.item() == weight


def test_a_weight_of_zero_applies_nothing():
    g = fz.value_and_grad(lambda p, b: ((p["w"] * b["x"]).sum(), torch.zeros(())), batch=P("data"))
    w, m, state = one(g, fz.all_reduce("data"), fz.sgd(1.0))
    assert (w, m.ok.item(), m.empty.item(), m.loss.item(), int(state.updates), int(state.step)) == (
        [0.0, 0.0],
        False,
        True,
        0.0,
        0,
        1,
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


# --- transforms of one's own ------------------------------------------------------------------------------------------
def test_a_function_from_grad_to_grad_is_a_transform():
    """Doubles sums left of the mean: after() keeps names and layouts, and passes None through."""

    def double(g):
        return after(
            g, "double", g.layout, lambda out, state: (out._replace(grads=out.grads.map(lambda b: 2 * b)), state)
        )

    assert one(source(), double, fz.all_reduce("data"), fz.sgd(1.0))[0] == [-4.0, 2.0]
    step = fz.train_step(fz.shard("data", source(), fz.accumulate(2, stream=True), double, fz.sgd(1.0)), mesh=MESH)
    assert "double" in step.grad.names
    state, nothing = step(step.init({"w": torch.zeros(2)}), X)
    assert nothing is None and step.params(step(state, None)[0])["w"].tolist() == [-4.0, 2.0]


def test_pointwise_reads_the_mean_and_forgets_its_norm():
    sign = pointwise("sign", lambda x, factor: torch.sign(x * factor))
    w, m, _ = one(source(), fz.all_reduce("data"), sign, fz.clip_by_global_norm(1.0), fz.sgd(1.0))
    assert w == pytest.approx([-(0.5**0.5), 0.5**0.5]) and m.grad_norm.item() == pytest.approx(
        5**0.5
    )  # of the gradient, before all else
    with pytest.raises(fz.ChainError, match="^sign: the gradient is still a partial sum"):
        fz.train_step(source(), sign, fz.sgd(1.0), mesh={"data": 2})


class Mine(NamedTuple):
    rates: Any = ()


def test_a_formula_owns_what_it_is_given():
    """In place on its arguments, yet a pure step leaves its own alone."""

    def leaf(params, grads, moments, factor):
        for p, g in zip(params, grads, strict=True):
            p.sub_(g * factor)

    lr = torch.tensor(7.0, dtype=torch.float64)
    formula = Formula(
        lambda own, params, ok, donate: Reading([Group({})], None, lr),
        lambda own: [],
        lambda own, rates, factor, ok: (own, [factor]),
        leaf,
    )
    tx = GradientTransformation(lambda p: Mine(), lambda u, s, p: (u, s), formula, "mine", elementwise=True)
    w, m, _ = one(source(), fz.shard("data", tx))
    assert w == [-2.0, 1.0] and m.lr == 7
