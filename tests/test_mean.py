"""The mean: taken once, by the weight, on any number of ranks the same bits; what is right of it reads values."""

from __future__ import annotations

import pytest
import torch
import zoo
from linear import MESH, one, source

import funczero as fz
from funczero import P
from funczero.core.types import Seed
from funczero.testing import simulate
from funczero.transforms.mean import global_norm, pointwise


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


# --- what is right of it ----------------------------------------------------------------------------------------------
def test_pointwise_reads_the_mean_and_forgets_its_norm():
    sign = pointwise("sign", lambda x, factor: torch.sign(x * factor))
    w, m, _ = one(source(), fz.all_reduce("data"), sign, fz.clip_by_global_norm(1.0), fz.sgd(1.0))
    assert w == pytest.approx([-(0.5**0.5), 0.5**0.5]) and m.grad_norm.item() == pytest.approx(
        5**0.5
    )  # of the gradient, before all else
    with pytest.raises(fz.ChainError, match="^sign: the gradient is still a partial sum"):
        fz.train_step(source(), sign, fz.sgd(1.0), mesh={"data": 2})


# --- on many ranks ----------------------------------------------------------------------------------------------------
def meaned(sizes, way, look=False):
    """The mean of the zoo's batch at update 0 (at BAD where it looks), each rank with its rows, as plain values."""
    local = zoo.MICROS
    for n in sizes.values():
        local //= n
    g, axes = zoo.source(tuple(sizes), units=()), list(sizes)
    verb = fz.all_reduce if way == "reduced" else fz.reduce_scatter
    sums = zoo.Sums(g, fz.accumulate(local), *map(verb, reversed(axes)), fz.mean, mesh=sizes)
    index, size = sums.mesh.rank(tuple(axes))
    rows = {n: x.chunk(size)[index] for n, x in zoo.batch(zoo.BAD if look else 0, torch.float64).items()}
    seed = Seed(torch.ones((), dtype=torch.float64), 0, look=look)
    out, _ = sums.grad.apply(sums.views, sums.state, rows, seed)
    again = global_norm(out.grads, out.factor, sums.grad.layout, sums.grad.env)
    bad = None if out.bad is None else (out.grads.where.structure.leaves[out.bad[0]].path, int(out.bad[1]))
    named = [out.loss, out.weight, out.factor, out.norm, out.ok.double(), again]
    return [x.item() for x in named], bad, out.logs["rows"].tolist()


MESHES = [{"data": 2}, {"data": 4}, {"data": 8}, {"node": 2, "local": 2}]


@pytest.mark.parametrize("way", ["reduced", "scattered"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_mean_has_the_same_bits_on_any_number_of_ranks(sizes, way):
    want = meaned({"data": 1}, "reduced")
    found = simulate(sizes)(meaned, sizes, way)
    assert found == [want] * len(found)
    (loss, weight, factor, norm, ok, again), bad, rows = want
    assert loss == pytest.approx(sum(row[0] for row in rows) / weight) and weight == sum(row[1] for row in rows)
    assert ok and factor == 1 / weight and norm == again and bad is None and len(rows) == zoo.MICROS


def test_the_norm_is_that_of_the_mean_gradient_by_hand():
    want = zoo.reference(updates=1)
    (loss, _, _, norm, *_), _, _ = meaned({"data": 1}, "reduced")
    assert loss == pytest.approx(want[1][0], rel=1e-14) and norm == pytest.approx(want[2][0], rel=2**-32)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_first_leaf_that_is_not_finite_is_named_with_its_rank_alike_on_all(sizes):
    found, *others = simulate(sizes)(meaned, sizes, "scattered", True)
    world = len(others) + 1
    row = (4 * zoo.ROWS + 1) % (zoo.MICROS * zoo.ROWS)  # where the zoo's batch overflows
    (_, _, _, norm, ok, _), (path, rank), _ = found
    assert (path, rank) == ("embed", row // (zoo.MICROS * zoo.ROWS // world)) and norm == torch.inf and not ok
    assert all(other[1] == found[1] for other in others)


# --- where it cannot stand --------------------------------------------------------------------------------------------
BAD = {
    "mean: the mean is already taken, here or by a nonlinear transform left of it; leave this one out": (
        fz.all_reduce("data"),
        fz.mean,
        fz.mean,
    ),
    "mean: the gradient is still a partial sum over mesh axes ['data']; put all_reduce('data') or shard('data', ": (
        fz.mean,
    ),
    "clip_by_global_norm(1): the gradient is still a partial sum over mesh axes ['data']": (
        fz.clip_by_global_norm(1.0),
        fz.all_reduce("data"),
    ),
    "clip_by_global_norm(1): the update is already applied; put it further left": (
        fz.shard("data", fz.sgd(1.0)),
        fz.clip_by_global_norm(1.0),
    ),
}


@pytest.mark.parametrize("why", BAD)
def test_sums_are_not_read_as_values(why):
    with pytest.raises(fz.ChainError) as e:
        fz.train_step(source(), *BAD[why], mesh={"data": 2})
    assert str(e.value).startswith(why)
