"""comm/differentiable.py: the collectives' bits and places over every cut, and each crossing's transpose."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import zoo

from funczero import P
from funczero.comm import collectives, differentiable
from funczero.comm.adjoint import total, vary
from funczero.comm.edge import Edge
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
SIZES = [{"data": 2}, {"data": 3}, {"node": 2, "local": 2}]


def filled(where, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(s.shape, generator=g).to(dtype) for s in where.slots]
    return Slots.pack(where, leaves, dtype, torch.device("cpu"))


def same(a, b):
    return a.where == b.where and all(torch.equal(x, y) for x, y in zip(a.buffers, b.buffers, strict=True))


def crossed(sizes, cut):
    """For every place where an axis may open: which laws do not hold."""
    mesh, wrong = connect(plan_mesh(sizes)), []
    named = lambda a: CUTS[cut]._replace(
        rules=tuple((r, P(*(a if n == "x" else n for n in p))) for r, p in CUTS[cut].rules)
    )
    structure = lazy(zoo.params(), ("blocks",), {a: named(a) for a in sizes}, lambda path: False, mesh.device).structure
    rank = sum(mesh.index(a) * 10**i for i, a in enumerate(sizes))
    for outer, axis in [((), a) for a in sizes] + [((a,), b) for a in sizes for b in sizes if a != b]:
        here = Where(structure, tuple((a, mesh.axes[a].size, mesh.index(a)) for a in outer))
        inner, edge = here.inner(axis, mesh.axes[axis].size, mesh.index(axis)), Edge(axis)
        own, shared = filled(here, 1 + rank), filled(here, 0)  # of this rank; one for all
        part = collectives.cut(shared, axis, mesh)
        joined = collectives.all_gather(part, axis, mesh)
        for born in (torch.float32, torch.bfloat16):
            sums, _ = collectives.reduce_scatter(own.to(born), edge, mesh)
            found, _ = differentiable.reduce_scatter(own.to(born), edge, mesh)
            wrong += [] if same(sums, found) else [f"reduce_scatter of {born} over {axis} in {outer}"]
        wrong += [] if same(joined, differentiable.all_gather(part, axis, mesh)) else [f"all_gather {axis} in {outer}"]
        sums, _ = collectives.all_reduce(own, edge, mesh)
        wrong += [] if same(sums, differentiable.all_reduce(own, edge, mesh)[0]) else [f"all_reduce {axis} in {outer}"]
        leaves = lambda x: dict(enumerate(x.leaves()))
        out, pull = torch.func.vjp(partial(differentiable.outwards, inner, mesh=mesh), leaves(part))
        back, sums = pull(leaves(own))[0], differentiable.inwards(here, leaves(own), axis, mesh)
        for i, leaf in enumerate(structure.leaves):
            if not torch.equal(out[i], joined.leaves()[i]) or not torch.equal(back[i], sums[i]):
                wrong.append(f"outwards of {leaf.path} over {axis} in {outer}")
        _, pull = torch.func.vjp(partial(differentiable.inwards, here, axis=axis, mesh=mesh), leaves(own))
        for i, x in pull(leaves(part))[0].items():
            if not torch.equal(x, joined.leaves()[i]):
                wrong.append(f"the transpose of inwards of {structure.leaves[i].path} over {axis} in {outer}")
        along = partial(differentiable.over_leaves, here, axes=lambda i, a=axis: (a,), mesh=mesh, fn=vary)
        varied, pull = torch.func.vjp(along, leaves(shared))
        for i, x in pull(leaves(own))[0].items():
            if not torch.equal(varied[i], shared.leaves()[i]) or not torch.equal(x, total(own.leaves()[i], axis, mesh)):
                wrong.append(f"over_leaves of {structure.leaves[i].path} over {axis} in {outer}")
        square = differentiable.dot(inner, leaves(part), leaves(part), mesh)
        want = sum((x.double() ** 2).sum() for x in shared.leaves()) if not outer else None
        if want is not None and abs(square - want) > 1e-9 * want:
            wrong.append(f"dot over {axis}")
    return wrong


@pytest.mark.parametrize(
    ("sizes", "cut"),
    [
        pytest.param(sizes, cut, marks=() if (i + j) % len(SIZES) == 0 else pytest.mark.slow, id=f"{sizes}-{cut}")
        for i, sizes in enumerate(SIZES)
        for j, cut in enumerate(CUTS)
    ],
)
def test_crossings(run_world, sizes, cut):
    for wrong in run_world(torch.Size(sizes.values()).numel(), crossed, sizes, cut):
        assert not wrong, wrong[:5]
