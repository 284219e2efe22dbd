"""What every transform is made of: what passes through it, what it adds to a chain's state, and how it is refused."""

from __future__ import annotations

from itertools import count

import pytest
import torch
import zoo

import funczero as fz
from funczero import P
from funczero.core.transform import after, around, refuse, slot_name
from funczero.core.types import Env, Grad, Layout, Seed
from funczero.layout.mesh import plan_mesh

SEED = Seed(torch.ones(()), 7)


def source(out, log=None):
    """A gradient that gives `out` and writes down the seeds that it sees; its own state counts its calls."""

    def apply(views, state, batch, seed):
        if log is not None:
            log.append((views, batch, seed))
        return out, {**state, "source": state["source"] + 1}

    env = Env(plan_mesh({"data": 1}), fz.Policy.parse(None), {})
    return Grad(lambda params: {"source": 0}, lambda views, key: views, apply, Layout(), ("source",), env)


def tag(g, name, kind, **kw):
    """A transform that writes its name behind what it is given, and counts its own calls."""
    fn = lambda out, state, *carried: ([*out, (name, *carried)], {**state, name: state[name] + 1})
    init = lambda params: {name: len(params)}
    if kind == "after":
        return after(g, name, g.layout, fn, init, **kw)
    return around(g, name, g.layout, lambda views, seed, state: (seed, (views, seed.key)), fn, init)


KINDS = pytest.mark.parametrize("kind", ["after", "around"])


@KINDS
def test_transforms_run_from_left_to_right_and_each_has_its_own_state(kind):
    g = tag(tag(source([]), "first", "after"), "second", kind)
    assert g.init([1, 2, 3]) == {"source": 0, "first": 3, "second": 3}
    out, state = g.apply("views", g.init([1]), "batch", SEED)
    assert [name for name, *_ in out] == ["first", "second"] and state == {"source": 1, "first": 2, "second": 2}
    assert out[1][1:] == ((("views", 7),) if kind == "around" else ())


@KINDS
def test_nothing_yet_passes_through_and_moves_what_lies_left_of_it_alone(kind):
    g = tag(tag(source(None), "first", kind), "second", kind)
    assert g.apply("views", g.init([1]), "batch", SEED) == (None, {"source": 1, "first": 1, "second": 1})


def test_a_seed_goes_from_right_to_left():
    seen, by = [], lambda n: {"seed": lambda s, state: s._replace(key=s.key * 10 + n + state["source"])}
    g = tag(tag(source([], seen), "first", "after", **by(1)), "second", "after", **by(2))
    g.apply("views", {"source": 0, "first": 0, "second": 0}, "batch", SEED)
    assert seen == [("views", "batch", SEED._replace(key=721))]


def test_what_is_carried_past_the_left_is_each_calls_own():
    """around() hands on the seed of its first half, and its value to the second; two calls do not share it."""
    numbers, seen = count(), []
    before = lambda views, seed, state: (seed._replace(index=seed.index + 5), next(numbers))
    g = around(source([], seen), "a", Layout(), before, lambda out, state, carried: ([*out, carried], state))
    outer = around(g, "b", Layout(), before, lambda out, state, carried: ([*out, carried], state))
    found = [outer.apply("views", {"source": 0}, "batch", SEED)[0] for _ in range(2)]
    assert found == [[1, 0], [3, 2]] and [seed.index for *_, seed in seen] == [10, 10]


@KINDS
def test_a_chain_remembers_names_and_layouts_and_the_one_before_stays(kind):
    g = source([])
    right = Layout(phase="value")
    fn = lambda out, state, *carried: (out, state)
    make = {"after": lambda: after(g, "t", right, fn), "around": lambda: around(g, "t", right, lambda *x: x[1:], fn)}
    new = make[kind]()
    assert (new.names, new.layout, new.arrows) == (("source", "t"), right, (right,))
    assert (g.names, g.layout, g.arrows) == (("source",), Layout(), ()) and new.env is g.env
    assert new.init([1]) == g.init([1])


def test_a_refusal_shows_the_chain_up_to_the_place_where_it_was_written():
    error = refuse(tag(source([]), "first", "after"), "second", "this cannot be; write that")
    assert isinstance(error, fz.ChainError)
    assert str(error) == "second: this cannot be; write that\n  source | first | second  <- here"


@pytest.mark.parametrize(
    ("names", "want"),
    [
        ((), "clip"),
        (("clip",), "clip#2"),
        (("clip(1.0)", "adamw", "clip(2.0)"), "clip#3"),
        (("clipped", "shard('data', clip(1))"), "clip"),  # a whole word before the brackets
    ],
)
def test_state_of_a_second_one_of_a_kind_has_a_number(names, want):
    g = source([])
    assert slot_name(g._replace(names=names), "clip") == want


def test_names_of_state_do_not_depend_on_what_else_stands_in_the_chain():
    names = ["adamw", "adamw", "clip"]
    g, kept = source([]), []
    for name in ["x", *names, "y", *names]:
        kept.append(slot_name(g, name))
        g = tag(g, name, "after")
    assert kept == ["x", "adamw", "adamw#2", "clip", "y", "adamw#3", "adamw#4", "clip#2"]


# --- in a step --------------------------------------------------------------------------------------------------------
def linear(p, b):
    """Gradient of the sum: the sum of rows."""
    return (b["x"] @ p["w"]).sum(), torch.tensor(float(len(b["x"])))


def test_a_function_from_grad_to_grad_is_a_transform():
    """Doubles sums left of the mean: after() keeps names and layouts, and passes None through."""

    def double(g):
        return after(
            g, "double", g.layout, lambda out, state: (out._replace(grads=out.grads.map(lambda b: 2 * b)), state)
        )

    grad, x = fz.value_and_grad(linear, batch=P("data")), {"x": torch.tensor([[1.0, 2.0], [3.0, -4.0]])}
    step = fz.train_step(grad, double, fz.all_reduce("data"), fz.sgd(1.0), mesh={"data": 1})
    state, _ = step(step.init({"w": torch.zeros(2)}), x)
    assert step.params(state)["w"].tolist() == [-4.0, 2.0]
    step = fz.train_step(fz.shard("data", grad, fz.accumulate(2, stream=True), double, fz.sgd(1.0)), mesh={"data": 1})
    assert "double" in step.grad.names
    state, nothing = step(step.init({"w": torch.zeros(2)}), x)
    assert nothing is None and step.params(step(state, None)[0])["w"].tolist() == [-4.0, 2.0]


def test_a_transform_that_changes_nothing_changes_no_bit():
    """`after` and `around` with the identity, at any place of a chain."""
    same = lambda g: after(g, "same", g.layout, lambda out, state: (out, state))
    both = lambda g: around(g, "both", g.layout, lambda views, s, state: (s, None), lambda out, state, _: (out, state))
    clip, adamw = zoo.tx()
    chains = [
        (zoo.source(), fz.all_reduce("data"), clip, adamw),
        (zoo.source(), same, fz.all_reduce("data"), both, clip, same, adamw),
        (zoo.source(), both, fz.shard("data", same, clip, both, adamw), same),
    ]
    assert len({zoo.bits(zoo.train(parts, {"data": 1}, updates=2)) for parts in chains}) == 1
