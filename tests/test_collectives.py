"""Sums, gathers and scatters by axis name: values on every rank, in the one tree, with every byte counted."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P
from funczero.comm import collectives, launch
from funczero.comm.edge import Edge
from funczero.comm.launch import broadcast
from funczero.core import order
from funczero.layout.cut import Rules
from funczero.layout.lazy import lazy
from funczero.layout.mesh import connect, plan_mesh
from funczero.layout.slots import Slots
from funczero.layout.where import Where
from funczero.testing import simulate

NEST = {"node": 2, "local": 2}


def own(sizes, rules=None):
    """A live mesh and the zoo's structure on it."""
    mesh = connect(plan_mesh(sizes))
    return mesh, lazy(
        zoo.params(), ("blocks",), rules or {a: Rules() for a in sizes}, lambda path: path == "conv", mesh.device
    )


def drawn(where, seed, dtype=torch.float32):
    """Random leaves; the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    return Slots.pack(
        where, [torch.randn(s.shape, generator=g).to(dtype) for s in where.slots], dtype, torch.device("cpu")
    )


def same(a, b):
    return a.where.coords == b.where.coords and all(
        torch.equal(x, y) for x, y in zip(a.buffers, b.buffers, strict=True)
    )


def verbs(world, dtype):
    """Gather undoes cut; a scatter is this rank's part of the tree over ranks, born in dtype and summed in float32."""
    mesh, params = own({"data": world})
    whole, rank = params.at((), torch.float32), mesh.index("data")
    mine = [drawn(whole.where, r, dtype) for r in range(world)]
    scattered = collectives.reduce_scatter(mine[rank], Edge("data", adds=torch.float32), mesh)[0]
    summed = Slots.pack(
        whole.where,
        [order.tree_sum([m.leaves()[i].float() for m in mine]) for i in range(len(mine[0].leaves()))],
        torch.float32,
        mesh.device,
    )
    cut = collectives.cut(whole, "data", mesh)
    return (
        same(collectives.all_gather(cut, "data", mesh), whole),
        same(scattered, collectives.cut(summed, "data", mesh)),
        same(cut, params.at(cut.where.coords, torch.float32)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_verbs_are_what_they_say(run_world, world, dtype):
    assert zoo.everywhere(run_world, world, verbs, world, dtype) == (True, True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_verbs_are_the_same_where_no_message_is_short(monkeypatch, world, dtype):
    monkeypatch.setattr(launch, "DIRECT", 0)
    assert simulate({"data": world})(verbs, world, dtype) == [(True, True, True)] * world


def frozen_empties():
    """Gradients of frozen units have no buffer, and travel nowhere."""
    mesh, params = own({"data": 2})
    x = params.at((), torch.float32).trainable()
    back = collectives.all_gather(
        collectives.reduce_scatter(x, Edge("data", adds=torch.float32), mesh)[0], "data", mesh
    )
    return (
        [b.numel() for b in back.buffers] == [b.numel() for b in x.buffers],
        min(b.numel() for b in x.buffers),
        same(back, x.map(lambda b: 2 * b)),
    )


def test_what_is_frozen_stays_empty(run_world):
    assert zoo.everywhere(run_world, 2, frozen_empties) == (True, 0, True)


def counted():
    """Bytes of one gather and one scatter: payload, to the other ranks."""
    mesh, params = own(NEST)
    place = Where(params.structure, (("node", 2, mesh.index("node")),))
    x, y = params.at(place.inner("local", 2, mesh.index("local")).coords, torch.bfloat16), params.at(
        place.coords, torch.float32
    )
    with fz.count_bytes(mesh) as outer:
        with fz.count_bytes(mesh) as gather:
            collectives.all_gather(x, "local", mesh)
        with fz.count_bytes(mesh) as scatter:
            collectives.reduce_scatter(y, Edge("local", adds=torch.float32), mesh)
    cut = sum(s.length for s, leaf in zip(x.where.slots, params.structure.leaves, strict=True) if leaf.shape)
    return (
        dict(gather) == {("local", "all_gather", "bfloat16"): 2 * cut},
        dict(scatter) == {("local", "reduce_scatter", "float32"): 4 * sum(x.where.lengths)},
        outer == gather + scatter,
    )


def test_every_byte_is_counted_once(run_world):
    assert run_world(4, counted) == [(True, True, True)] * 4


def test_the_innermost_axis_is_gathered_first():
    mesh, params = own({"node": 1, "local": 1})
    x = params.at((("node", 1, 0), ("local", 1, 0)), torch.float32)
    with pytest.raises(
        ValueError,
        match=r"all_gather\('node'\): the innermost axis of these leaves is \('local',\); gather that one first",
    ):
        collectives.all_gather(x, "node", mesh)
    with pytest.raises(ValueError, match="the innermost axis of these leaves is none"):
        collectives.all_gather(params.at((), torch.float32), "node", mesh)


def order_over_ranks():
    """Four float32 values whose sum depends on the tree."""
    mesh = connect(plan_mesh({"data": 4}))
    params = lazy({"w": torch.zeros(4)}, (), {"data": Rules()}, lambda path: False, mesh.device)
    mine = Slots.pack(
        Where.whole(params.structure),
        [torch.full((4,), [1e8, 1.0, -1e8, 1.0][mesh.index("data")])],
        torch.float32,
        mesh.device,
    )
    return collectives.reduce_scatter(mine, Edge("data", adds=torch.float32), mesh)[0].leaves()[0].tolist()


def test_ranks_are_added_in_the_one_tree(run_world):
    want = order.tree_sum(torch.tensor([1e8, 1.0, -1e8, 1.0])).item()
    assert run_world(4, order_over_ranks) == [[want]] * 4 and want != 2.0


def leaves():
    """Every leaf as it is gathered alone, at places with a replica axis; and what rank 3 broadcasts."""
    mesh, params = own(NEST, {a: Rules((("embed|w$", P(None, a)),)) for a in NEST})
    whole, found = drawn(Where.whole(params.structure), 5), []
    whole = whole.map(lambda b: torch.where(b < 0, -0.0, b))
    for axes in (("local",), ("node", "local"), ()):
        part = whole
        for a in axes:
            part = collectives.cut(part, a, mesh)
        each = [collectives.gather_leaf(part, i, mesh) for i in range(len(params.structure.leaves))]
        found.append(
            all(
                x.shape == y.shape and torch.equal(x.view(torch.int32), y.view(torch.int32))
                for x, y in zip(each, whole.leaves())
            )
        )
    with fz.count_bytes(mesh) as sent:
        x = broadcast(torch.tensor([-0.0, mesh.ledger.place]), 3, mesh)
    return found, x.tolist(), x[0].signbit().item(), dict(sent)


def test_one_leaf_is_read_bit_for_bit_with_a_replica_axis_too(run_world):
    for rank, (found, x, negative, sent) in enumerate(run_world(4, leaves)):
        assert found == [True] * 3 and x == [0.0, 3.0] and negative
        assert sent == ({("node+local", "broadcast", "float32"): 8 * 3} if rank == 3 else {})
