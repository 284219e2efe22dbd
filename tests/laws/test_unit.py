"""accumulate(1), and reductions or brackets over an axis of size 1, are the identity: the same tensors, no bytes,
nothing allocated.
"""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P
from funczero.comm import collectives
from funczero.comm.edge import Edge
from funczero.comm.integers import sum_integers
from funczero.core.types import Seed
from funczero.layout.mesh import connect, plan_mesh

ONE = {"node": 1, "local": 1}


def test_accumulating_one_is_the_gradient_itself():
    g = zoo.Sums(zoo.source(), mesh={"data": 1}).grad
    assert fz.accumulate(1)(g) is g


def test_a_stream_of_one_is_no_identity():
    """It waits for the call that hands over."""
    step = fz.train_step(
        zoo.source(), fz.accumulate(1, stream=True), fz.all_reduce("data"), *zoo.tx(), mesh={"data": 1}
    )
    state, m = step(step.init(zoo.params()), zoo.batch(0))
    assert m is None and int(state.step) == 0
    assert int(step(state, None)[1].updates) == 1


@pytest.mark.parametrize("verb", ["all_gather", "reduce_scatter", "cut"])
def test_collectives_over_one_rank_return_what_they_were_given(verb):
    sums = zoo.Sums(zoo.source(), mesh={"data": 1})
    mesh, x = sums.mesh, sums.views
    if verb == "all_gather":
        x = collectives.cut(x, "data", mesh)
    got = getattr(collectives, verb)(x, Edge("data", adds=torch.float64) if verb == "reduce_scatter" else "data", mesh)
    got = got[0] if verb == "reduce_scatter" else got  # and the memory of a wire that has one
    assert all(a is b for a, b in zip(got.buffers, x.buffers, strict=True))
    assert got.where.axes == (() if verb == "all_gather" else ("data",))


def test_integers_over_one_rank_are_not_sent():
    x, mesh = torch.arange(3), connect(plan_mesh(ONE))
    assert sum_integers(x, ("node", "local"), mesh) is x and not mesh.sent


def gradients():
    """Chains of linear transforms over axes of size 1; the gradient alone first."""
    g = zoo.source(tuple(ONE))
    ar, rs, ag, sh = fz.all_reduce, fz.reduce_scatter, fz.all_gather, fz.shard
    return [
        (g,),
        (g, ar("node"), ar("local")),
        (g, rs("local"), rs("node"), ag("node"), ag("local")),
        (sh("local", sh("node", g)),),
        (sh("node", g, ar("local")),),
    ]


def test_reductions_and_brackets_over_one_rank_allocate_nothing():
    """The buffers of the gradient are those that the backward packed: passing them on counts no byte and no tensor."""
    made = []
    for parts in gradients():
        sums = zoo.Sums(*parts, mesh=ONE)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            sums(zoo.batch(0, torch.float64))
        made.append(sum(e.self_cpu_memory_usage for e in seen.events() if e.self_cpu_memory_usage > 0))
        assert not sums.mesh.sent
    assert len(set(made)) == 1, made


def test_views_at_rest_over_one_rank_are_the_masters():
    g = fz.shard("node", fz.shard("local", zoo.source(tuple(ONE)), *zoo.tx()))
    step = fz.train_step(g, mesh=ONE)
    state = step.init(zoo.params())
    whole = step.running().view(state.params)
    assert state.views is None and all(a is b for a, b in zip(whole.buffers, state.params.buffers, strict=True))


def test_axes_of_one_change_no_bit():
    """A flat world and one with idle axes around it."""
    hashes = {
        zoo.bits(zoo.train(parts, {"data": 1}, s)) for parts, s in zoo.flat_chains(zoo.source(), 4, zoo.tx()).values()
    }
    hashes |= {
        zoo.bits(zoo.train(parts, ONE, s))
        for parts, s in zoo.nested_chains(zoo.source(tuple(ONE)), 4, zoo.tx()).values()
    }
    assert len(hashes) == 1


def test_a_seed_of_one_is_the_gradient():
    """The backward of S * loss and S in place of one are the same bits, S a power of two."""
    sums, batch = zoo.Sums(fz.value_and_grad(zoo.loss_plain, batch=P("data")), mesh={"data": 1}), zoo.batch(
        0, torch.float64
    )
    one, many = (
        sums.grad.apply(sums.views, {}, batch, Seed(torch.tensor(s, dtype=torch.float64), 0))[0].grads.buffers
        for s in (1.0, 2.0**20)
    )
    assert all(torch.equal(a * 2.0**20, b) for a, b in zip(one, many, strict=True))
