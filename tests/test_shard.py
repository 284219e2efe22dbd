"""The bracket: what it holds, where it opens, what it says, what it keeps whole."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P
from funczero.transforms.chain import Bracket, Source

PLACES = {
    1: (lambda g, a, t: (g, a, fz.shard("data", t)), (), ("data",)),
    2: (lambda g, a, t: (g, fz.shard("data", a, t)), (), ("data",)),
    3: (lambda g, a, t: (fz.shard("data", g, a, t),), ("data",), ("data",)),
}


@pytest.mark.parametrize("stage", PLACES)
def test_where_it_opens_says_what_is_sharded(stage):
    chain, rest, masters = PLACES[stage]
    specs = fz.train_step(*chain(zoo.source(), fz.accumulate(2), fz.adamw(1e-3)), mesh={"data": 4}).specs(zoo.params())
    of = lambda axes: P(*axes) if axes else P()
    assert specs["views"]["embed"] == of(rest) and specs["params"]["embed"] == specs["grads"]["embed"] == specs[
        "adamw"
    ].mu["embed"] == of(masters)
    assert all(specs[n]["gain"] == P() for n in ("views", "params", "grads"))


def test_with_a_gradient_inside_it_is_a_source_and_else_a_bracket():
    g = zoo.source()
    assert isinstance(fz.shard("data", g, fz.adamw(1e-3)), Source) and isinstance(
        fz.shard("data", fz.adamw(1e-3)), Bracket
    )
    assert (
        fz.shard("a", fz.shard("b", g)).axes == ("a", "b")
        and fz.shard("a", (fz.chain(g, fz.adamw(1e-3)),)).transforms[0].name == "adamw"
    )


def held(**how):
    """Per stage, elements of each kind held by this rank."""
    out = {}
    for stage, (chain, _, _) in PLACES.items():
        step = fz.train_step(*chain(zoo.source(), fz.accumulate(2), fz.adamw(1e-3)), mesh={"data": 2})
        state = step.init(zoo.params())
        count = lambda s: None if s is None else sum(x.numel() for x in s.leaves())
        out[stage] = (
            count(state.params),
            count(state.views),
            count(state.chain["adamw"].mu),
            [None if state.views is None else str(state.views.buffers[0].dtype)],
        )
    return out


def test_each_rank_holds_its_part_once(run_world):
    """Logical elements add up to the whole, what is not cut lies on both."""
    whole = sum(x.numel() for x in {id(x): x for x in torch.utils._pytree.tree_leaves(zoo.params())}.values())
    a, b = run_world(2, held)
    for stage in PLACES:
        assert a[stage][0] + b[stage][0] == whole + 1 == a[stage][2] + b[stage][2]  # gain is on both
        assert a[stage][1] == b[stage][1] == (None if stage == 3 else whole)


def test_nests_are_cut_outermost_first():
    g2 = zoo.source(("node", "local"))
    mesh = {"node": 2, "local": 4}
    both = fz.train_step(fz.shard("local", fz.shard("node", g2, *zoo.tx())), mesh=mesh)
    assert both.grad.layout.sharded == ("local", "node") == both.grad.layout.rest and both.specs(zoo.params())["grads"][
        "embed"
    ] == P(("local", "node"))
    hpz = fz.train_step(fz.shard("local", g2, fz.accumulate(2), fz.shard("node", *zoo.tx())), mesh=mesh)
    assert hpz.grad.layout.rest == ("local",) and hpz.grad.layout.order == (
        ("local", 4),
        ("accumulate", 2),
        ("node", 2),
    )
    specs = hpz.specs(zoo.params())
    assert (specs["views"]["embed"], specs["adamw"].nu["embed"]) == (P("local"), P(("local", "node")))


def test_a_chain_is_printed_as_it_nests():
    g = fz.value_and_grad(zoo.loss_plain, batch=P("data"))
    step = fz.train_step(
        g, fz.shard("data", fz.accumulate(2), fz.adamw(1e-3)), mesh={"data": 4}, policy="compute=bfloat16"
    )
    device = step.grad.env.mesh.device.type
    assert str(step) == "\n".join([
        f"train_step on data=4 ({device}), params=float32,compute=bfloat16,accumulate=float32",
        "  value_and_grad(batch=P('data'))  -> sum, unreduced over ['data']",
        "  shard('data',                    -> sum, sharded over ['data'], of 4 micro-batches",
        "    accumulate(2)                  -> sum, sharded over ['data'], of 8 micro-batches",
        "    mean                           -> mean, sharded over ['data'], of 8 micro-batches",
        "    adamw                          -> new parameters, sharded over ['data'], of 8 micro-batches",
        "  )                                -> new parameters, of 8 micro-batches",
    ])  # fmt: skip
    rest = str(fz.train_step(fz.shard("data", g, fz.adamw(1e-3)), mesh={"data": 3}))
    assert (
        "note: parameters are gathered whole in every forward; name their blocks with value_and_grad(...,"
        " units=('blocks',)) to hold two at a time"
        in rest
    )
    assert (
        "note: {'data': 3} is no power of two: the same bits at every run of this world, other bits in other worlds"
        in rest
    )
