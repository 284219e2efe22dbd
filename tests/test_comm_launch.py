"""One flat buffer over one axis: what arrives where, bit for bit, and every byte in closed form."""

from __future__ import annotations

from math import prod

import pytest
import torch

import funczero as fz
from funczero.comm.launch import (
    DIRECT,
    SHORT,
    broadcast,
    launch_backend_scatter,
    launch_backend_sum,
    launch_exchange,
    launch_gather,
    sum_over,
    wait,
)
from funczero.layout.mesh import connect, plan_mesh
from funczero.testing import simulate

SIZES = {"a": 2, "b": 3}
SAFE = ("_allgather_base", "allreduce", "alltoall_base", "broadcast", "reduce_scatter_tensor_coalesced")
BOTH = pytest.mark.parametrize("axis", SIZES)
SHORT_AND_LONG = pytest.mark.parametrize("n", [0, 5, DIRECT // 2], ids=["empty", "short", "long"])


def values(rank, n, dtype=torch.float32):
    """A rank's own, small whole numbers with a zero of either sign: sums are exact in any order."""
    x = torch.arange(n).remainder(7).add(10 * rank).to(dtype)
    x[: 2 * n : 2] *= -1
    return x


def live(axis="a"):
    """The mesh of six ranks; those that meet at this one along an axis, in order; this one's place among them."""
    mesh = connect(plan_mesh(SIZES))
    i, j = mesh.index("a"), mesh.index("b")
    ranks, at = ([3 * k + j for k in range(2)], i) if axis == "a" else ([3 * i + k for k in range(3)], j)
    return mesh, ranks, at


def same(x, y):
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def sent(mesh, launch):
    """What a launch gives, complete, and the bytes that it counted."""
    with fz.count_bytes(mesh) as found:
        out = wait(launch())
    return out, dict(found)


def gathered(axis, n, dtype):
    mesh, ranks, at = live(axis)
    for m in (mesh, mesh._replace(near=frozenset())):
        out, found = sent(m, lambda m=m: launch_gather(values(ranks[at], n, dtype), axis, m))
        assert same(out, torch.stack([values(r, n, dtype) for r in ranks]))
        name = str(dtype).removeprefix("torch.")
        assert found == {(axis, "all_gather", name): (len(ranks) - 1) * n * dtype.itemsize} or not n


@SHORT_AND_LONG
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_a_gather_has_every_ranks_values_in_their_order(axis, n, dtype):
    simulate(SIZES)(gathered, axis, n, dtype)


def exchanged(axis, n):
    mesh, ranks, at = live(axis)
    rows = lambda r: torch.stack([values(100 * r + q, n) for q in range(len(ranks))])
    out, found = sent(mesh, lambda: launch_exchange(rows(ranks[at]), axis, mesh))
    assert same(out, torch.stack([rows(r)[at] for r in ranks]))
    assert found == {(axis, "reduce_scatter", "float32"): (len(ranks) - 1) * n * 4} or not n
    assert same(wait(launch_exchange(out, axis, mesh)), rows(ranks[at]))


@SHORT_AND_LONG
@BOTH
def test_an_exchange_transposes_and_twice_is_nothing(axis, n):
    simulate(SIZES)(exchanged, axis, n)


def added(axis):
    mesh, ranks, at = live(axis)
    size, n = len(ranks), 6
    out, found = sent(mesh, lambda: launch_backend_sum(values(ranks[at], n), axis, mesh))
    assert torch.equal(out, sum(values(r, n) for r in ranks))
    assert found == {(axis, "all_reduce", "float32"): 2 * 4 * n * (size - 1) // size}
    rows = lambda r: values(r, n * size).view(size, n)
    out, found = sent(mesh, lambda: launch_backend_scatter(rows(ranks[at]), axis, mesh, ()))
    assert torch.equal(out.view(-1), sum(rows(r) for r in ranks)[at])
    assert found == {(axis, "reduce_scatter", "float32"): 4 * n * (size - 1)}


@BOTH
def test_the_backends_own_sums_are_sums(axis):
    simulate(SIZES)(added, axis)


def integers(axis, n, noted):
    mesh, ranks, at = live(axis)
    x, before, size = values(ranks[at], n, torch.int64), mesh.ledger.sum, len(ranks)
    out, found = sent(mesh, lambda: sum_over(x, axis, size, mesh.axes[axis].group, mesh, noted))
    assert torch.equal(out, sum(values(r, n, torch.int64) for r in ranks))
    ring = 2 * 8 * n * (size - 1) // size
    assert found == {(axis, "all_reduce", "int64"): 8 * n * (size - 1) if n < 10 else ring}
    assert (mesh.ledger.sum != before) is noted


@pytest.mark.parametrize("n", [3, SHORT // 8], ids=["short", "long"])
@BOTH
@pytest.mark.parametrize("noted", [True, False])
def test_a_sum_of_integers_is_counted_always_and_compared_where_it_is_not_yet(axis, n, noted):
    simulate(SIZES)(integers, axis, n, noted)


def told(root):
    mesh, *_ = live()
    rank = mesh.rank(("a", "b"))[0]
    x = values(rank, 5).view(5, 1).expand(5, 2).mT  # not contiguous
    with fz.count_bytes(mesh) as found:
        out = broadcast(x, root, mesh)
    assert same(out, values(root, 5).expand(2, 5).contiguous())
    assert dict(found) == ({("a+b", "broadcast", "float32"): 40 * 5} if rank == root else {})


@pytest.mark.parametrize("root", [0, 4])
def test_a_broadcast_is_the_roots_values_bit_for_bit(root):
    simulate(SIZES)(told, root)


def test_what_a_wire_packed_is_counted_by_its_name():
    def packed():
        mesh, *_ = live()
        x = torch.zeros(8, dtype=torch.uint8)
        with fz.count_bytes(mesh) as found:
            wait(launch_gather(x, "a", mesh, form="int4(8)", values=12))
            wait(launch_exchange(x[:6].view(3, 2), "b", mesh, form="int4(8)", values=3))
        keys = ("a", "all_gather", "int4(8)"), ("b", "reduce_scatter", "int4(8)")
        assert dict(found) == dict(zip(keys, (8, 4), strict=True))
        assert [found.at_16_bits(k) for k in keys] == [2 * 12, 2 * 3 * 2]

    simulate(SIZES)(packed)


def test_units_axes_and_sizes_are_what_ranks_compare():
    def checksums():
        mesh, *_ = live()
        launches = [
            lambda: launch_gather(torch.zeros(4), "a", mesh, (1,)),
            lambda: launch_gather(torch.zeros(4), "a", mesh, (2,)),
            lambda: launch_gather(torch.zeros(4), "b", mesh, (1,)),
            lambda: launch_gather(torch.zeros(5), "a", mesh, (1,)),
            lambda: launch_gather(torch.zeros(4).bfloat16(), "a", mesh, (1,)),
            lambda: launch_exchange(torch.zeros(2, 2), "a", mesh, (1,)),
        ]
        out = []
        for launch in (*launches, launches[0]):
            mesh.ledger.sum = 0
            wait(launch())
            out.append(mesh.ledger.sum)
        return out

    first, *others = simulate(SIZES)(checksums)
    assert all(x == first for x in others)
    assert first[0] == first[-1] and len(set(first)) == len(first) - 1


def test_over_one_rank_nothing_is_sent():
    mesh, x = connect(plan_mesh({"one": 1})), torch.arange(6.0)
    before = mesh.ledger.sum
    with fz.count_bytes(mesh) as found:
        assert launch_gather(x, "one", mesh).data_ptr() == x.data_ptr()
        assert launch_exchange(x.view(1, 6), "one", mesh).data_ptr() == x.data_ptr()
        assert broadcast(x, 0, mesh) is x
    assert not found and mesh.ledger.sum == before and prod(mesh.sizes().values()) == 1


def launched():
    """The names by which torch knows what was launched, of every kind and length."""
    near = connect(plan_mesh({"data": -1}))
    size, _, group = near.axes["data"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for n, mesh in ((1, near), (DIRECT, near), (DIRECT, near._replace(near=frozenset()))):
            x = torch.ones(n)
            wait(launch_gather(x, "data", mesh))
            wait(launch_exchange(x.expand(size, -1).contiguous(), "data", mesh))
            wait(launch_backend_scatter(x.expand(size, -1).contiguous(), "data", mesh, ()))
            wait(launch_backend_sum(x, "data", mesh))
            sum_over(x.int(), "data", size, group, mesh, True)
            broadcast(x, 0, mesh)
    return {e.name for e in profile.events() if e.name.startswith("c10d::")}


def test_no_message_has_a_name_that_breaks_gloos_memory(run_world):
    # torch 2.13: beside any other message, gloo's "ALLGATHER_COALESCED" ends a process within seconds. Its form of
    # reduce_scatter_tensor_coalesced is made of all-reduces.
    for names in run_world(2, launched):
        assert names == {f"c10d::{n}_" for n in SAFE}, names
