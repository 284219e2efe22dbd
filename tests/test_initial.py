"""The first state of a step: masters, views and every transform's own, cut from whole parameters."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P, tree
from funczero.step.initial import check_widening, initial, read_lazily
from funczero.testing import simulate, tree_hash

MESH = {"data": -1}


def held(stage, policy):
    """What a fresh state is made of: dtypes, whether views are kept, and its parameters."""
    step = zoo.make(stage, policy=policy)
    state = step.init(zoo.params(), key=11)
    kind = None if state.views is None else str(state.views.buffers[0].dtype)
    return (
        kind,
        str(state.params.buffers[0].dtype),
        int(state.step),
        int(state.updates),
        int(state.key),
        tree_hash(step.params(state)) == tree_hash(zoo.params()),
    )


@pytest.mark.parametrize("stage", range(4))
def test_a_state_holds_masters_and_wider_views_only(run_world, stage):
    policy = "compute=bfloat16"
    kind = "torch.bfloat16" if stage in (1, 2) else None
    for world in (1, 2):
        assert zoo.everywhere(run_world, world, held, stage, policy) == (kind, "torch.float32", 0, 0, 11, True)


def test_parameters_are_copied_and_cast_to_the_policy():
    params = {"w": torch.ones(3, dtype=torch.bfloat16), "v": torch.ones(2)}
    g = fz.value_and_grad(lambda p, b: ((p["w"].sum() + p["v"].sum()) * b["x"].sum(), torch.ones(())), batch=P("data"))
    step = fz.donate(fz.train_step(g, fz.all_reduce("data"), fz.sgd(1.0), mesh=MESH))
    state, _ = step(step.init(params), {"x": torch.ones(1)})
    assert (
        params["w"].dtype == torch.bfloat16
        and params["w"].tolist() == [1.0] * 3
        and step.params(state)["w"].dtype == torch.float32
    )
    assert step.params(state)["w"].tolist() == [0.0] * 3


def test_any_tree_of_parameters_comes_back_as_it_was():
    for params in (
        torch.ones(2),
        [torch.ones(2), (torch.ones(1), {"a": torch.ones(())})],
        {"x": {"y": [torch.ones(3)]}},
    ):
        g = fz.value_and_grad(
            lambda p, b: (sum(x.sum() for x in tree.leaves(p)) * b["x"].sum(), torch.ones(())), batch=P("data")
        )
        step = fz.train_step(fz.shard("data", g, fz.sgd(1.0)), mesh=MESH)
        state, _ = step(step.init(params), {"x": torch.ones(1)})
        assert tree.flatten(step.params(state))[1] == tree.flatten(params)[1] and all(
            (x == 0).all() for x in tree.leaves(step.params(state))
        )


# --- without memory, and from what is not there yet -------------------------------------------------------------------
def forms(stage, policy):
    """The first state of real parameters, of lazy ones, and of shapes alone, as (dtype, shape) by path; and by hash."""
    step = zoo.make(stage, policy=policy, right=(fz.scale_loss(), *zoo.tx()))
    grad, source = step.running(), step.source
    state = step.init(zoo.params(), key=3)
    drawn = fz.init(tree.map(lambda x: fz.leaf(tuple(x.shape), lambda key, shape: x.clone()), zoo.params()))
    drawn["head"]["scale"] = drawn["norm"]
    lazily = step.init(drawn, key=3)
    seen = {}
    meta = tree.map(lambda x: seen.setdefault(id(x), x.to("meta")), zoo.params())
    shapes = initial(grad, read_lazily(source, grad, meta, torch.device("meta")), 3)
    form = lambda s: {path: (x.dtype, tuple(x.shape)) for path, x in tree.paths(s)}
    values = [x for path, x in tree.paths(shapes) if path in ("step", "updates", "key")]
    big = [x for x in tree.tensors(shapes) if x.dim()]
    return (
        tree_hash(state._asdict()) == tree_hash(lazily._asdict()),
        form(state) == form(shapes),
        all(x.is_meta for x in big) and len(values) == 3,
    )


@pytest.mark.parametrize("policy", [None, "compute=bfloat16"])
@pytest.mark.parametrize("stage", range(4))
def test_a_state_of_shapes_and_one_of_leaves_to_be_drawn_have_the_form_of_a_real_one(stage, policy):
    for size in (1, 3):
        assert simulate({"data": size})(forms, stage, policy) == [(True, True, True)] * size


WIDE = [
    ("float32", torch.float64, False),
    ("float32", torch.float32, True),
    ("float32", torch.bfloat16, True),
    ("params=bfloat16,compute=bfloat16", torch.float32, False),
    ("params=bfloat16,compute=bfloat16", torch.float16, True),
    ("float64", torch.float64, True),
]


@pytest.mark.parametrize(("policy", "dtype", "fits"), WIDE, ids=str)
def test_a_parameter_is_not_wider_than_its_master(policy, dtype, fits):
    params, policy = {"a": torch.zeros(1).bfloat16(), "b": [torch.zeros(2, dtype=dtype)]}, fz.Policy.parse(policy)
    if fits:
        return check_widening(params, policy)
    with pytest.raises(TypeError) as e:
        check_widening(params, policy)
    have, keep = (str(d).removeprefix("torch.") for d in (dtype, policy.params))
    words = f"init: parameter 'b/0' is {have}, but the policy keeps masters in {keep}; write policy='{have}'"
    assert str(e.value).startswith(words)
