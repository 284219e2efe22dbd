"""Units over an axis: how they share messages changes no value, whatever the wire, and memory keeps what it rounds."""

from __future__ import annotations

import pytest
import torch
import zoo
from layouts import structure

import funczero as fz
from funczero import P
from funczero.comm.edge import Edge
from funczero.comm.memory import Held
from funczero.comm.units import gather_units, scatter_units
from funczero.comm.wire import Memory, as_born
from funczero.core.order import tree_sum
from funczero.layout.cut import Rules
from funczero.layout.mesh import connect, plan_mesh
from funczero.layout.slots import Slots
from funczero.testing import simulate

FULL = torch.float32
WIRES = {
    "as born": as_born,
    "cast": fz.cast("bf16"),
    "int8": fz.int8(16),
    "int4, stochastic": fz.int4(32, stochastic=True),
}
CUTS = {"rows": Rules(), "columns": Rules((("w$", P(None, "x")),)), "some whole": Rules((("w$", P()),))}
GROUPS = [[0, 1, 2, 3]], [[0], [1], [2], [3]], [[3, 1], [2, 0]]  # units by message


def own(size, cut):
    """A live axis and the zoo's leaves on it."""
    mesh = connect(plan_mesh({"x": size}))
    return mesh, structure(zoo.params(), ("blocks",), {"x": CUTS[cut]})


def drawn(where, seed):
    """Random leaves; the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    return Slots.pack(where, [torch.randn(s.shape, generator=g) for s in where.slots], FULL, torch.device("cpu"))


def equal(xs, ys):
    return all(torch.equal(a, b) for a, b in zip(xs, ys, strict=True))


def in_messages(groups, launch):
    """Buffers by unit, all messages launched before the first is waited for."""
    flying = [(us, launch(us)) for us in groups]
    found = {u: b for us, f in flying for u, b in zip(us, f.wait(), strict=True)}
    return [found[u] for u in sorted(found)]


def grouped(size, cut, name):
    mesh, params = own(size, cut)
    edge, rank = Edge("x", gather=WIRES[name], scatter=WIRES[name]), mesh.index("x")
    whole = params.at((), FULL)
    part, sums = params.at((("x", size, rank),), FULL), drawn(whole.where, rank)
    leaves = lambda us: [whole.where.views(u, sums.buffers[u]) for u in us]
    gather = lambda us: gather_units(whole.where, us, edge, mesh, [part.buffers[u] for u in us], (7, 1))
    scatter = lambda us: scatter_units(whole.where, us, edge, mesh, leaves(us), (7, 1))
    gathered, scattered = ([in_messages(groups, way) for groups in GROUPS] for way in (gather, scatter))
    assert all(equal(xs, gathered[0]) for xs in gathered) and all(equal(xs, scattered[0]) for xs in scattered)
    every = [drawn(whole.where, r).leaves() for r in range(size)]
    added = Slots.pack(whole.where, [tree_sum(list(xs)) for xs in zip(*every)], FULL, torch.device("cpu"))
    exact = [x[rank] for x in rows_of(added, size)]
    if name == "as born":
        assert equal(gathered[0], whole.buffers) and equal(scattered[0], exact)
    gaps = [rows[rank] == 0 for rows in rows_of(whole.map(torch.ones_like), size)]
    return gathered[0], all(b[g].count_nonzero() == 0 for b, g in zip(scattered[0], gaps))


def rows_of(x, size):
    """By unit: every rank's part of a whole tree, packed as that rank packs it."""
    parts = []
    for q in range(size):
        inner = x.where.inner("x", size, q)
        cut = [
            a[tuple(slice(o, o + n) for o, n in zip(s.start, s.shape, strict=True))]
            for a, s in zip(x.leaves(), inner.slots, strict=True)
        ]
        parts.append(Slots.pack(inner, cut, FULL, torch.device("cpu")).buffers)
    return [list(row) for row in zip(*parts, strict=True)]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", WIRES)
def test_how_units_share_messages_changes_no_value(name, cut):
    for size in (2, 3):
        found = simulate({"x": size})(grouped, size, cut, name)
        assert all(padding for _, padding in found)
        assert all(equal(gathered, found[0][0]) for gathered, _ in found)  # all ranks read the same


def remembered(size):
    """What is read of all ranks' sums, and what they remember of them, is what they had; in quarters, so exactly."""
    mesh, params = own(size, "rows")
    whole_numbers = fz.cast("fp16")._replace(name="ints", pack=lambda x, lengths, key: x.trunc().half())
    wire = whole_numbers._replace(memory=Memory(lambda sent, read, old: sent - read))
    where, rank = params.at((), FULL).where, mesh.index("x")
    mine = drawn(where, rank).map(lambda b: (b * 8).round() / 4)
    errors = drawn(where, 10 + rank).map(lambda b: (b * 2).round() / 4)
    held, units = Held(errors, torch.tensor(2.0)), [0, 1, 2, 3]
    leaves = [where.views(u, mine.buffers[u]) for u in units]
    found = scatter_units(where, units, Edge("x", scatter=wire), mesh, leaves, held=held)
    return found.wait(), Slots(found.errors, where), mine, errors


def test_what_a_wire_takes_from_a_sum_is_remembered_and_nothing_else():
    size = 3
    found = simulate({"x": size})(remembered, size)
    had = [mine.map(lambda b, e: b + 2 * e, errors) for _, _, mine, errors in found]  # in the scale of the loss
    kept = [new.map(lambda b: 2 * b) for _, new, *_ in found]
    sums = rows_of(had[0].map(lambda *bs: sum(bs), *had[1:]), size)
    left = rows_of(kept[0].map(lambda *bs: sum(bs), *kept[1:]), size)
    for rank, (read, *_) in enumerate(found):
        assert all(b.count_nonzero() for b in read)
        assert equal(read, [a[rank] - b[rank] for a, b in zip(sums, left, strict=True)])


def test_a_wire_with_memory_is_given_one():
    def without():
        mesh, params = own(2, "rows")
        x = params.at((), FULL)
        edge = Edge("x", scatter=fz.feedback(fz.int8(16)))
        return scatter_units(x.where, [0], edge, mesh, [x.where.views(0, x.buffers[0])])

    with pytest.raises(RuntimeError, match="is given no memory here, so what it rounds would be lost"):
        simulate({"x": 2})(without)


def by_the_backend():
    """Whole numbers are added to the same bits in any order, in the dtype of the edge."""
    mesh, params = own(2, "columns")
    where = params.at((), FULL).where
    mine = drawn(where, mesh.index("x")).map(lambda b: (b * 4).round()).to(torch.bfloat16)
    out = []
    for sums in ("tree", "backend"):
        leaves = [where.views(u, mine.buffers[u]) for u in (0, 1)]
        out.append(scatter_units(where, (0, 1), Edge("x", sums=sums), mesh, leaves).wait())
    return equal(*out), {b.dtype for b in (*out[0], *out[1])}


def test_the_backends_sums_lie_where_the_trees_do():
    assert simulate({"x": 2})(by_the_backend) == [(True, {FULL})] * 2


def test_over_one_rank_buffers_are_handed_on():
    mesh, params = own(1, "rows")
    x = params.at((("x", 1, 0),), FULL)
    edge = Edge("x", gather=WIRES["int8"], scatter=WIRES["int8"])
    assert all(
        a is b for a, b in zip(gather_units(x.where.outer, [0, 2], edge, mesh, x.buffers[::2]).wait(), x.buffers[::2])
    )
    leaves = [x.where.outer.views(u, b) for u, b in enumerate(x.buffers)]
    assert equal(scatter_units(x.where.outer, range(4), edge, mesh, leaves).wait(), x.buffers) and not mesh.sent
