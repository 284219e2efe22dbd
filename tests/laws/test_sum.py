"""Apply on a batch is the sum of apply on any split of it: ragged weights, empty micro-batches and micro-batches
without rows included.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import zoo
from hypothesis import given, settings

import funczero as fz
from funczero.core import order

ROWS = 12


def total(outs):
    """Losses, weights and gradients of some applies, added."""
    grads = [torch.stack(xs).sum(0) for xs in zip(*(o.grads.buffers for o in outs), strict=True)]
    return torch.cat([torch.stack([sum(o.loss.sum() for o in outs), sum(o.weight.sum() for o in outs)]), *grads])


def pieces(batch, cuts):
    edges = [0, *sorted(cuts), ROWS]
    return [{n: x[a:b] for n, x in batch.items()} for a, b in zip(edges, edges[1:])]


@pytest.mark.parametrize("units", [(), ("blocks",)], ids=["whole", "blocks"])
@given(cuts=st.lists(st.integers(0, ROWS), max_size=5), t=st.integers(0, 3))
@settings(max_examples=15)
def test_a_batch_is_the_sum_of_its_parts(units, cuts, t):
    sums, batch = zoo.Sums(zoo.source(units=units), mesh={"data": 1}), zoo.batch(
        t + zoo.BAD + 1, torch.float64, ROWS // zoo.ROWS
    )
    torch.testing.assert_close(
        total([sums(b) for b in pieces(batch, cuts)]), total([sums(batch)]), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("k", [2, 3, 4, 6, 12])
def test_accumulate_is_that_sum_with_its_micro_batches_in_order(k):
    """Twelve rows in k micro-batches; k need not be a power of two."""
    one, batch = zoo.Sums(zoo.source(), mesh={"data": 1}), zoo.batch(0, torch.float64, 4)
    out = zoo.Sums(zoo.source(), fz.accumulate(k), mesh={"data": 1})(batch)
    parts = [one(b) for b in zoo.split(batch, k)]
    torch.testing.assert_close(total([out]), total(parts), rtol=1e-12, atol=1e-12)
    assert torch.equal(out.loss, torch.cat([p.loss for p in parts])) and torch.equal(
        out.weight, torch.cat([p.weight for p in parts])
    )


def over_ranks(k, way):
    """The sum that every rank sees, and the sum of all micro-batches taken on one."""
    sums = zoo.Sums(zoo.source(), *way(k), mesh={"data": -1})
    batch = zoo.batch(0, torch.float64, sums.grad.layout.stride)
    out = sums(order.deal(batch, sums.grad.layout, sums.mesh.index))
    alone = zoo.Sums(fz.value_and_grad(zoo.loss_plain, units=("blocks",), replicated=("data",)), mesh={"data": -1})(
        batch
    )
    return (total([out])[2:] - total([alone])[2:]).abs().max().item()


def time_first(k):
    return fz.accumulate(k), fz.all_reduce("data")


def ranks_first(k):
    return fz.all_reduce("data"), fz.accumulate(k)


@pytest.mark.parametrize("way", [time_first, ranks_first])
@pytest.mark.parametrize(("world", "k"), [(2, 4), (3, 2), (4, 2)])
def test_ranks_add_up_like_time(run_world, world, k, way):
    """Three ranks with two micro-batches too: no power of two."""
    assert max(run_world(world, over_ranks, k, way)) < 1e-12
