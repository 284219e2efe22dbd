"""Clipping reads the mean, and its norm is the whole tree's."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P, tree
from funczero.layout.processes import world_size

MESH = {"data": 1}
TARGET = torch.tensor([3.0, -4.0])


def step_of(*right, mesh=None):
    """A gradient of (3, -4) a row."""
    g = fz.value_and_grad(
        lambda p, b: ((p["w"] * TARGET).sum() * len(b["x"]), torch.tensor(float(len(b["x"])))), batch=P("data")
    )
    return fz.train_step(g, fz.all_reduce("data"), *right, fz.sgd(1.0), mesh=mesh or MESH)


def moved(*right):
    step = step_of(*right)
    state, m = step(step.init({"w": torch.zeros(2)}), {"x": torch.ones(4)})
    return (-step.params(state)["w"]).tolist(), m.grad_norm.item()


CASES = {
    "above the norm": ((fz.clip_by_global_norm(6.0),), [3.0, -4.0]),
    "at the norm": ((fz.clip_by_global_norm(5.0),), [3.0, -4.0]),
    "below": ((fz.clip_by_global_norm(2.5),), [1.5, -2.0]),
    "with DeepSpeed's eps": ((fz.clip_by_global_norm(2.5, eps=5.0),), [0.75, -1.0]),
    "twice": ((fz.clip_by_global_norm(2.5), fz.clip_by_global_norm(1.0)), [0.6, -0.8]),
    "twice, the second wider": ((fz.clip_by_global_norm(1.0), fz.clip_by_global_norm(2.0)), [0.6, -0.8]),
    "values": ((fz.clip_by_value(3.5),), [3.0, -3.5]),
    "values, then the norm": ((fz.clip_by_value(3.0), fz.clip_by_global_norm(1.0)), [0.5**0.5, -(0.5**0.5)]),
    "the norm, then values": ((fz.clip_by_global_norm(2.5), fz.clip_by_value(1.75)), [1.5, -1.75]),
    "after a scale": ((fz.scale_loss(weight=4), fz.clip_by_global_norm(2.5)), [1.5, -2.0]),
    "values after a scale": ((fz.scale_loss(weight=4), fz.clip_by_value(3.5)), [3.0, -3.5]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_the_clipped_gradient_and_the_norm_that_before(name):
    right, want = CASES[name]
    got, norm = moved(*right)
    assert got == pytest.approx(want, rel=1e-6) and norm == pytest.approx(5.0, rel=1e-9)


def norms():
    """By stage: the norm that a clip used after a transform that rewrote the gradient, as bits of the masters."""
    k = zoo.MICROS // world_size()
    right = (fz.clip_by_value(0.004), fz.clip_by_global_norm(0.02), fz.adamw(1e-2))
    return [
        zoo.bits(zoo.train(fz.zero(zoo.source(), *right, stage=s, accumulate=k), {"data": -1}, updates=4))
        for s in range(4)
    ]


def test_a_rewritten_gradient_is_measured_again_over_all_ranks(run_world):
    alone = norms()
    assert len(set(alone)) == 1 and zoo.everywhere(run_world, 2, norms) == alone


def test_the_norm_is_torchs_own():
    step = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=3), mesh=MESH)
    _, m = step(step.init(zoo.params()), zoo.batch(0))
    p = zoo.params()
    unique = list({id(x): x.requires_grad_() for x in tree.leaves(p)}.values())
    loss, weight = zoo.loss_plain(p, zoo.batch(0))
    (loss / weight).backward()
    want = torch.nn.utils.get_total_norm([x.grad for x in unique if x.grad is not None])
    assert m.grad_norm.item() == pytest.approx(want.item(), rel=1e-5)


def test_a_gradient_of_zero_is_left_alone():
    g = fz.value_and_grad(lambda p, b: (p["w"].sum() * 0, torch.ones(())), batch=P("data"))
    step = fz.train_step(g, fz.all_reduce("data"), fz.clip_by_global_norm(1.0), fz.sgd(1.0), mesh=MESH)
    state, m = step(step.init({"w": torch.ones(2)}), {"x": torch.ones(1)})
    assert m.ok and m.grad_norm == 0 and step.params(state)["w"].tolist() == [1.0, 1.0]


NONSENSE = {
    "a string": "1",
    "a bool": True,
    "nan": float("nan"),
    "inf": float("inf"),
    "None": None,
    "a tensor": torch.tensor(1.0),
    "a list": [1.0],
    "negative": -1.0,
    "zero": 0,
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_limit_that_is_no_positive_number_is_refused_when_built(kind):
    for make, who in (
        (fz.clip_by_global_norm, "clip_by_global_norm: limit="),
        (fz.clip_by_value, "clip_by_value: limit="),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            make(NONSENSE[kind])
        assert str(caught.value).startswith(who) and "\n" not in str(caught.value)
    if kind != "zero":
        with pytest.raises((TypeError, ValueError), match="clip_by_global_norm: eps="):
            fz.clip_by_global_norm(1.0, eps=NONSENSE[kind])


@pytest.mark.parametrize("kind", NONSENSE)
@pytest.mark.parametrize("what", ["init", "weight", "floor", "window", "hysteresis"])
def test_a_loss_scale_of_no_positive_number_is_refused_when_built(what, kind):
    if (what, kind) == ("weight", "None"):
        return  # it is measured
    with pytest.raises((TypeError, ValueError)) as caught:
        fz.scale_loss(**{what: NONSENSE[kind]})
    assert (
        str(caught.value).startswith("scale_loss: ")
        and f"{what}=" in str(caught.value)
        and "\n" not in str(caught.value)
    )


@pytest.mark.parametrize("what", ["dynamic", "consecutive"])
def test_a_word_is_no_flag_of_a_loss_scale(what):
    with pytest.raises(
        TypeError, match=f"scale_loss: {what}='false' is a string and neither True nor False; write one of them"
    ):
        fz.scale_loss(**{what: "false"})
    with pytest.raises(
        TypeError, match=r"scale_loss: window=1.5 is a float and no whole number; write an int of at least"
    ):
        fz.scale_loss(window=1.5)
