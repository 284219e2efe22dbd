"""A parameter before its unit is opened: it has a shape and no values, and any use is refused with the correction."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F

import funczero as fz
from funczero import P, tree
from funczero.gradients.ref import Ref

SHAPE = (6, 6)


def params():
    return {"in": torch.ones(4, 6), "blocks": [{"w": torch.ones(SHAPE), "b": torch.ones(6)} for _ in range(2)]}


def closed(look, **kw):
    """`look(params, batch)` inside the loss of a step whose blocks are units; what it returned."""
    seen = []

    def loss(p, b):
        seen.append(look(p, b))
        h = fz.layers(lambda q, x: torch.tanh(x @ q["w"] + q["b"]), p["blocks"], b["x"].to(p["in"].dtype) @ p["in"])
        return h.sum(), torch.tensor(1.0)

    grad = fz.value_and_grad(loss, batch=P("data"), units="blocks")
    step = fz.train_step(fz.shard("data", grad, *kw.pop("more", ()), fz.sgd(0.1)), mesh={"data": 1}, **kw)
    step(step.init(params()), {"x": torch.ones(2, 4)})
    return seen[0]


def test_leaves_inside_units_are_closed_and_those_outside_are_tensors():
    found = closed(lambda p, b: {path: type(x) for path, x in tree.paths(p)})
    assert found == {path: torch.Tensor if path == "in" else Ref for path, _ in tree.paths(params())}


def test_it_tells_what_is_known_of_a_leaf():
    def look(p, b):
        ref = p["blocks"][1]["w"]
        return ref.path, ref.shape, ref.dtype, ref.device, ref.requires_grad, ref.is_floating_point(), repr(ref)

    path, shape, dtype, device, learns, floating, text = closed(look, policy="compute=bfloat16,accumulate=float32")
    assert (path, shape, dtype, device) == ("blocks/1/w", SHAPE, torch.bfloat16, torch.device("cpu"))
    assert learns and floating and text == "<closed parameter 'blocks/1/w' (6, 6) torch.bfloat16>"


def test_a_frozen_one_needs_no_gradient():
    look = lambda p, b: [x["w"].requires_grad for x in p["blocks"]]
    assert closed(look, more=(fz.freeze("blocks/0"),)) == [False, True]


USES = {
    "a method": lambda ref, x: ref.sum(),
    "an attribute": lambda ref, x: ref.grad,
    "data": lambda ref, x: ref.data,
    "a function": lambda ref, x: torch.exp(ref),
    "of torch.nn": lambda ref, x: F.linear(x, ref),
    "as a second argument": lambda ref, x: torch.add(x, ref),
    "in a list": lambda ref, x: torch.stack([x, ref]),
    "a method of another": lambda ref, x: x.mul(ref),
}
UNKNOWN = {  # operators that python itself looks for on the type
    "an item": lambda ref, x: ref[0],
    "a matmul": lambda ref, x: operator.matmul(ref, ref),
    "a length": lambda ref, x: len(ref),
    "a loop": lambda ref, x: list(ref),
    "a sum from the left": lambda ref, x: ref + 1,
    "a number": lambda ref, x: float(ref),
}


@pytest.mark.parametrize("name", USES)
def test_any_use_as_a_tensor_names_the_leaf_and_what_to_write(name):
    def look(p, b):
        with pytest.raises(TypeError) as e:
            USES[name](p["blocks"][1]["w"], b["x"])
        return str(e.value)

    assert (
        closed(look)
        == "parameter 'blocks/1/w' is inside a unit that is not open; run its blocks with fz.layers(block,"
        " params[...], x)"
        " or open it with fz.gather(params[...])"
    )


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_python_looks_for_on_the_type_is_no_value_either(name):
    def look(p, b):
        with pytest.raises(TypeError):
            UNKNOWN[name](p["blocks"][1]["w"], b["x"])

    closed(look)


def test_it_is_one_leaf_of_a_tree_and_has_no_special_attributes():
    def look(p, b):
        ref = p["blocks"][0]["w"]
        doubled = tree.map(lambda x: (x,), p)
        return [x is ref for x in tree.leaves(doubled)].count(True), hasattr(ref, "__array__"), callable(ref)

    assert closed(look) == (1, False, False)


def test_a_parameter_with_a_dotted_name_is_a_modules():
    """The remedy is that of fz.stateless."""
    seen = []

    def loss(p, b):
        with pytest.raises(TypeError) as e:
            p["blocks.0.w"].sum()
        seen.append(str(e.value))
        return fz.gather(p["blocks.0.w"]).sum(), torch.tensor(1.0)

    step = fz.train_step(
        fz.shard("data", fz.value_and_grad(loss, batch=P("data"), units="blocks"), fz.sgd(0.1)), mesh={"data": 1}
    )
    step(step.init({"blocks.0.w": torch.ones(3)}), {"x": torch.ones(1)})
    assert "leave its list out of fz.stateless(..., units=[...])" in seen[0]
