"""<gather x, y> = <x, reduce_scatter y>, exactly, over every cut: odd leaves, other dims, leaves that stay whole,
nested axes.
"""

from __future__ import annotations

import pytest
import torch
import zoo

from funczero import P
from funczero.comm import collectives
from funczero.comm.edge import Edge
from funczero.comm.integers import sum_integers
from funczero.layout.cut import Rules
from funczero.layout.lazy import lazy
from funczero.layout.mesh import connect, plan_mesh
from funczero.layout.slots import Slots
from funczero.layout.where import Where

CUTS = {
    "rows": Rules(),
    "columns": Rules((("embed|w$", P(None, "x")), ("conv", P(None, None, "x")))),
    "some whole": Rules((("embed", P()),), threshold=8),
}
SIZES = [{"data": 2}, {"data": 3}, {"data": 4}, {"node": 2, "local": 2}]


def renamed(rules, axis):
    return rules._replace(rules=tuple((r, P(*(axis if n == "x" else n for n in p))) for r, p in rules.rules))


def integers(where, seed):
    """Small whole numbers in every slot: their products and sums are exact."""
    g = torch.Generator().manual_seed(seed)
    return Slots.pack(
        where,
        [torch.randint(-8, 9, s.shape, generator=g).double() for s in where.slots],
        torch.float64,
        torch.device("cpu"),
    )


def inner_product(x, y, mesh):
    """Over all ranks; what an axis does not cut lies on each of its ranks and counts once."""
    first = [all(mesh.index(a) == 0 for a in x.where.replicas(i)) for i in range(len(x.leaves()))]
    mine = sum(
        ((a * b).sum() for a, b, f in zip(x.leaves(), y.leaves(), first, strict=True) if f),
        torch.zeros((), dtype=torch.float64),
    )
    return int(sum_integers(mine.long().view(1), tuple(mesh.axes), mesh))


def products(sizes, cut):
    """For every place where an axis may open: both inner products, and whether gathering what was cut gives it back."""
    mesh, out = connect(plan_mesh(sizes)), []
    rules = {a: renamed(CUTS[cut], a) for a in sizes}
    structure = lazy(zoo.params(torch.float64), ("blocks",), rules, lambda path: False, mesh.device).structure
    places = [((), a) for a in sizes] + [((a,), b) for a in sizes for b in sizes if a != b]
    rank = sum(mesh.index(a) * 10**i for i, a in enumerate(sizes))
    for outer, axis in places:
        here = Where(structure, tuple((a, mesh.axes[a].size, mesh.index(a)) for a in outer))
        y = integers(here, 1 + rank)  # another one on every rank: a partial sum
        x = (
            collectives.cut(integers(Where.whole(structure), 0), outer[0], mesh)
            if outer
            else integers(Where.whole(structure), 0)
        )
        x = collectives.cut(x, axis, mesh)  # the same wherever it is replicated
        gathered = collectives.all_gather(x, axis, mesh)
        scattered, _ = collectives.reduce_scatter(y, Edge(axis, adds=torch.float64), mesh)
        out.append((inner_product(gathered, y, mesh), inner_product(x, scattered, mesh)))
        again = collectives.all_gather(collectives.cut(gathered, axis, mesh), axis, mesh)
        assert all(torch.equal(a, b) for a, b in zip(again.buffers, gathered.buffers, strict=True))
    return out


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gather_and_reduce_scatter_are_adjoint(run_world, sizes, cut):
    world = torch.Size(sizes.values()).numel()
    for found in run_world(world, products, sizes, cut):
        assert all(a == b for a, b in found) and any(a for a, _ in found)
