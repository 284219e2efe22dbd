"""Gradients of units as they arrive: uses are summed, and messages leave in one order on every rank, whatever the order
of the backward.
"""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from layouts import structure

import funczero as fz
from funczero.comm.collectives import all_gather
from funczero.comm.edge import Edge
from funczero.core.link import Link
from funczero.core.types import Env
from funczero.gradients.arrivals import Arrivals
from funczero.layout.cut import Rules
from funczero.layout.mesh import connect, plan_mesh
from funczero.layout.slots import Slots
from funczero.layout.where import Where
from funczero.testing import simulate

SMALL = 1 << 15  # elements that are worth a message
LINK = Link(latency=1.0, speed=float(SMALL))  # of float32
LARGE, NARROW = 3, 2  # blocks on either side of SMALL
FULL = torch.float32


def params():
    """Loose leaves, large blocks and small ones, the first of which is frozen in part."""
    large = [{"w": torch.zeros(SMALL // 8, 8), "b": torch.zeros(3)} for _ in range(LARGE)]
    small = [{"w": torch.zeros(5, 3), "b": torch.zeros(3)} for _ in range(NARROW)]
    return {"in": torch.zeros(4, 3), "blocks": [*large, *small]}


def ready(sizes):
    """Arrivals on a live mesh, and the numbers of its units by name."""
    mesh = connect(plan_mesh(sizes))
    s = structure(
        params(), ("blocks",), {a: Rules() for a in sizes}, lambda path: path == f"blocks/{LARGE}/b"
    ).structure
    env = Env(mesh, fz.Policy.parse(None), {a: Edge(a, Rules()) for a in sizes}, link=LINK)
    arrivals = Arrivals(Where.whole(s), tuple(sizes), env, FULL, torch.device("cpu"))
    return arrivals, {u.name: i for i, u in enumerate(s.units) if u.name and not u.frozen}


def gradient(arrivals, unit, seed):
    """Whole numbers in the shapes of a unit's leaves, so that sums are exact in any order."""
    g = torch.Generator().manual_seed(1000 * unit + seed)
    info = arrivals.whole.structure
    return [torch.randint(-9, 9, info.leaves[i].shape, generator=g).to(FULL) for i in info.members[unit]]


def loose(arrivals, seed):
    (unit,) = (u for u, x in enumerate(arrivals.whole.structure.units) if not x.seam and not x.frozen)
    return {unit: gradient(arrivals, unit, seed)}


def messages(arrivals):
    """The units of every scatter so far, as ranks compare them."""
    return [e.units for e in arrivals.env.mesh.ledger.entries if e.verb == "reduce_scatter"]


def whole(found, mesh):
    """Gradients of every leaf, gathered; None of a frozen one."""
    for axis in reversed(found.where.axes):
        found = all_gather(found, axis, mesh)
    return found.leaves()


def one_backward(arrivals, units, seed, order):
    """Units report one gradient each, in some order."""
    for u in units:
        arrivals.use((u,))
    with arrivals.collecting():
        for u in (units[i] for i in order):
            arrivals.arrive(u, gradient(arrivals, u, seed))
        return arrivals.close(loose(arrivals, seed))[:2]


def by_rank(sizes, order_of):
    """One backward on every rank, each in an order of its own: messages, gradients by leaf, and what is left."""
    arrivals, names = ready(sizes)
    mesh = arrivals.env.mesh
    rank = mesh.rank(tuple(sizes))[0]
    found, bad = one_backward(arrivals, list(names.values()), rank, order_of(rank, len(names)))
    assert bad is None and found.where == arrivals.here
    return messages(arrivals), whole(found, mesh), sum(arrivals.uses.values())


def summed(sizes):
    """All ranks' gradients by leaf, added by hand."""
    arrivals, names = ready({a: 1 for a in sizes})
    world = torch.Size(sizes.values()).numel()
    out = [None] * len(arrivals.whole.structure.leaves)
    rest = next(iter(loose(arrivals, 0)))
    for u in (*names.values(), rest):
        each = [gradient(arrivals, u, rank) for rank in range(world)]
        for i, xs in zip(arrivals.whole.structure.members[u], zip(*each, strict=True), strict=True):
            out[i] = sum(xs)
    return out


def equal(xs, ys):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


ORDERS = {
    "as forwards ran": lambda rank, n: range(n),
    "backwards": lambda rank, n: range(n)[::-1],
    "another one on every rank": lambda rank, n: list(permutations(range(n)))[7 * rank + 3],
}


@pytest.mark.parametrize("sizes", [{"data": 2}, {"data": 3}, {"node": 2, "local": 2}], ids=str)
@pytest.mark.parametrize("name", ORDERS)
def test_messages_leave_in_one_order_and_hold_the_ranks_sums(sizes, name):
    first, *others = simulate(sizes)(by_rank, sizes, ORDERS[name])
    world = len(others) + 1
    assert all(other[0] == first[0] for other in others)
    small, *large, loose = dict.fromkeys(first[0])  # the last one first, and small neighbours at once
    assert large == [(u,) for u in range(LARGE, 0, -1)] and loose == (0,)
    assert len(small) == NARROW and small[0] > small[1] > LARGE
    want = summed(sizes)
    assert all(equal(found, want) and left == 0 for _, found, left in (first, *others)), world


def partly(reached):
    """Each rank's backward reaches some units alone."""
    arrivals, names = ready({"data": 2})
    mesh = arrivals.env.mesh
    rank, units = mesh.index("data"), list(names.values())
    mine = [units[i] for i in reached[rank]]
    found, _ = one_backward(arrivals, mine, 0, range(len(mine)))
    return messages(arrivals), whole(found, mesh)


@pytest.mark.parametrize("reached", [((0, 1, 2, 3, 4), ()), ((2,), (0, 4)), ((), ())], ids=str)
def test_a_unit_that_no_backward_reached_sends_zeros_in_its_turn(reached):
    (sent, found), (same, other) = simulate({"data": 2})(partly, reached)
    assert sent == same and len(sent) == LARGE + 2 and equal(found, other)
    arrivals, names = ready({"data": 1})
    for n, u in enumerate(names.values()):
        times = sum(n in mine for mine in reached)
        got = [found[i] for i in arrivals.whole.structure.members[u]]
        assert equal(got, [times * g for g in gradient(arrivals, u, 0)])


# --- one rank ---------------------------------------------------------------------------------------------------------
def of(found, arrivals, unit):
    leaves = found.leaves()
    return [leaves[i] for i in arrivals.whole.structure.members[unit]]


def test_uses_are_summed_in_the_order_in_which_they_arrive_and_leave_after_the_last():
    arrivals, names = ready({"data": 1})
    unit, other = names["blocks/0"], names["blocks/1"]
    for u in (unit, other, unit, unit):
        arrivals.use((u,))
    parts = [[x / 3 for x in gradient(arrivals, unit, seed)] for seed in range(3)]
    with arrivals.collecting():
        for n, part in enumerate(parts):
            assert (unit in arrivals.sums, arrivals.number) == (n > 0, n)
            arrivals.arrive(unit, part)
        found = arrivals.close({}).grads
    want = [(a + b) + c for a, b, c in zip(*parts, strict=True)]  # not in another order: these do not add exactly
    assert equal(of(found, arrivals, unit), want) and not any(x.any() for x in of(found, arrivals, other))


def test_a_leaf_without_a_gradient_is_zero():
    arrivals, names = ready({"data": 1})
    unit = names["blocks/4"]
    arrivals.use((unit,))
    w, _ = gradient(arrivals, unit, 0)
    with arrivals.collecting():
        arrivals.arrive(unit, [w, None])
        found = arrivals.close({}).grads
    got = of(found, arrivals, unit)
    assert torch.equal(got[0], w) and got[1].tolist() == [0, 0, 0]
    frozen = [i for i in range(len(arrivals.whole.structure.leaves)) if arrivals.whole.structure.frozen(i)]
    assert len(frozen) == 1 and found.leaves()[frozen[0]] is None


def test_what_another_backward_does_is_not_booked():
    """As a loss takes a gradient on its way."""
    arrivals, names = ready({"data": 1})
    unit = names["blocks/0"]
    arrivals.use((unit,))
    arrivals.arrive(unit, gradient(arrivals, unit, 0))
    assert arrivals.number == 0 and arrivals.uses == {unit: 1}
    with arrivals.collecting():
        arrivals.arrive(unit, gradient(arrivals, unit, 1))
        found = arrivals.close({}).grads
    assert equal(of(found, arrivals, unit), gradient(arrivals, unit, 1))


def test_a_graph_that_runs_backward_twice_books_its_uses_twice():
    arrivals, names = ready({"data": 1})
    unit = names["blocks/0"]
    arrivals.use((unit,))
    out = []
    for retain in (True, False):
        with arrivals.collecting(retain=retain):
            arrivals.arrive(unit, gradient(arrivals, unit, 0))
            out.append(arrivals.close({}).grads)
        assert arrivals.uses == {unit: int(retain)}
    assert equal(out[0].leaves(), out[1].leaves())


def test_values_that_are_not_finite_are_counted_by_leaf_where_somebody_looks():
    arrivals, names = ready({"data": 1})
    unit = names["blocks/3"]
    w, *_ = gradient(arrivals, unit, 0)
    w[0, :2] = torch.tensor([torch.nan, torch.inf])
    rest = loose(arrivals, 0)
    ((_, (x,)),) = rest.items()
    x[1, 1] = -torch.inf
    for look in (False, True):
        arrivals.use((unit,))
        with arrivals.collecting(look=look):
            arrivals.arrive(unit, [w])
            bad = arrivals.close(rest).bad
        if not look:
            assert bad is None
    paths = {leaf.path: n for leaf, n in zip(arrivals.whole.structure.leaves, bad.tolist(), strict=True) if n}
    assert paths == {"blocks/3/w": 2, "in": 1}


def test_a_sparse_gradient_is_refused_by_path():
    arrivals, names = ready({"data": 1})
    unit = names["blocks/4"]
    arrivals.use((unit,))
    w, b = gradient(arrivals, unit, 0)
    with arrivals.collecting(), pytest.raises(TypeError, match=r"the gradient of 'blocks/4/w' is sparse.*sparse=False"):
        arrivals.arrive(unit, [w.to_sparse(), b])


def test_two_backwards_of_one_tape_do_not_mix():
    """After `close` all is as it was at the start."""
    arrivals, names = ready({"data": 1})
    first, _ = one_backward(arrivals, list(names.values()), 0, range(5))
    second, _ = one_backward(arrivals, list(names.values()), 1, range(5)[::-1])
    again, _ = one_backward(arrivals, list(names.values()), 0, range(5)[::-1])
    assert isinstance(second, Slots) and equal(first.leaves(), again.leaves())
    assert not equal(first.leaves(), second.leaves()) and not arrivals.ready and not arrivals.sums
