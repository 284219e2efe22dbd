"""Sums of integers over any axes, and the ranks' comparison that rides in them."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch

import funczero as fz
from funczero.comm.integers import sum_and_compare, sum_integers
from funczero.layout.mesh import connect, plan_mesh
from funczero.testing import simulate
from funczero.world.ledger import DivergenceError

NEST = {"node": 2, "local": 2}
CUBE = {"a": 2, "one": 1, "b": 3}
AXES = list(chain.from_iterable(combinations(CUBE, n) for n in range(len(CUBE) + 1)))


def integers():
    """Sums over every set of axes, of a rank's own number, short and long, and the bytes sent."""
    mesh, out = connect(plan_mesh(NEST)), {}
    rank = mesh.index("node") * 2 + mesh.index("local")
    for axes in ((), ("node",), ("local",), ("node", "local"), ("local", "node")):
        for n in (3, 10_000):
            with fz.count_bytes(mesh) as sent:
                total = sum_integers(torch.full((n,), 10**rank), axes, mesh)
            out[axes, n] = total.unique().item(), dict(sent)
    return out


def test_integers_sum_over_any_axes(run_world):
    want = {
        (): (1, 10, 100, 1000),
        ("node",): (101, 1010, 101, 1010),
        ("local",): (11, 11, 1100, 1100),
        ("node", "local"): (1111,) * 4,
        ("local", "node"): (1111,) * 4,
    }
    found = run_world(4, integers)
    for (axes, n), _ in found[0].items():
        assert tuple(f[axes, n][0] for f in found) == want[axes]
        (key, sent), *more = found[0][axes, n][1].items() or [(("", "all_reduce", "int64"), 0)]
        size = {0: 1, 1: 2, 2: 4}[len(axes)]
        assert not more and key == ("+".join(axes), "all_reduce", "int64")
        assert sent == (
            8 * n * (size - 1) if n == 3 else 2 * 8 * n * (size - 1) // size
        )  # a short message to every rank; else a ring's


def number(place):
    """A rank's own digit, so that a sum says whose values are in it."""
    return 10 ** (3 * place["a"] + place["b"])


def along(mesh, axes):
    """The sum by hand over those ranks that this one meets along some axes."""
    own = {a: mesh.index(a) for a in CUBE}
    places = [{"a": i, "one": 0, "b": j} for i in range(2) for j in range(3)]
    return sum(number(p) for p in places if all(p[a] == own[a] for a in CUBE if a not in axes))


def compared(axes):
    """A sum in which ranks compare, of two parts, after a launch that all have made."""
    mesh = connect(plan_mesh(CUBE))
    own = number({a: mesh.index(a) for a in CUBE})
    alike = torch.tensor([own, -own]), torch.arange(5) * own
    if axes != tuple(CUBE):  # over the other axes parts are the same
        alike = tuple(sum_integers(x, tuple(a for a in CUBE if a not in axes), mesh) for x in alike)
    mesh.ledger.note("tried", "a")
    with fz.count_bytes(mesh) as sent:
        total, agree = sum_and_compare(alike, axes, mesh)
    assert agree is None and not mesh.ledger.entries and not mesh.ledger.sealed
    assert list(sent) == [("a+b", "all_reduce", "int64")]
    return total.tolist()


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_parts_come_one_after_another_and_replicas_count_once(axes):
    every = sum(10**i for i in range(6))
    assert simulate(CUBE)(compared, axes) == [[every, -every, *(i * every for i in range(5))]] * 6


def summed(axes):
    mesh = connect(plan_mesh(CUBE))
    x = torch.tensor([number({a: mesh.index(a) for a in CUBE})])
    return sum_integers(x, axes, mesh).item() == along(mesh, axes)


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_a_sum_holds_every_rank_along_its_axes_once(axes):
    assert simulate(CUBE)(summed, axes) == [True] * 6


def apart(odd):
    """What every rank raises where one has launched something else."""
    mesh = connect(plan_mesh({"data": 3}))
    with_odd = mesh.index("data") == odd
    mesh.ledger.note("tried", "data", "float32", 8 if with_odd else 4)
    with pytest.raises(DivergenceError) as e:
        sum_and_compare([torch.ones(2, dtype=torch.int64)], ("data",), mesh)
    mesh.ledger.note("tried", "data")  # and ranks that go on alike agree again
    return str(e.value), sum_and_compare([torch.ones(2, dtype=torch.int64)], ("data",), mesh)[0].tolist()


@pytest.mark.parametrize("odd", [0, 2])
def test_a_rank_that_launched_otherwise_is_told_before_the_sum_is_used(odd):
    found = simulate({"data": 3})(apart, odd)
    assert len(set(map(str, found))) == 1 and found[0][0].startswith(
        f"rank {odd} launched tried over 'data' of 8 bytes"
    )
    assert found[0][1] == [3, 3]


def given(axes, rows):
    """Ranks of `replicated` axes compare the rows that they were given."""
    mesh = connect(plan_mesh(NEST))
    mesh.ledger.replicated = axes
    mesh.ledger.mix_rows([rows[mesh.index("node")][mesh.index("local")]])
    return sum_and_compare([torch.ones(1, dtype=torch.int64)], tuple(NEST), mesh)[0].tolist()


@pytest.mark.parametrize(
    ("axes", "rows", "odd"),
    [
        ((), [[1, 2], [3, 4]], None),
        (("local",), [[1, 1], [2, 2]], None),
        (("local",), [[1, 1], [2, 3]], (3, 2)),
        (("node",), [[1, 2], [1, 2]], None),
        (("node",), [[1, 2], [1, 1]], (3, 1)),
        (("node", "local"), [[1, 1], [1, 1]], None),
        (("node", "local"), [[1, 1], [2, 2]], (2, 0)),
    ],
)
def test_replicas_are_given_the_same_rows_and_others_need_not_be(axes, rows, odd):
    if odd is None:
        assert simulate(NEST)(given, axes, rows) == [[4]] * 4
        return
    with pytest.raises(DivergenceError, match=f"rank {odd[0]} was given other rows than rank {odd[1]} "):
        simulate(NEST)(given, axes, rows)


def test_one_rank_has_nothing_to_compare():
    mesh, parts = connect(plan_mesh({"one": 1})), [torch.arange(3), torch.arange(2)]
    total, agree = sum_and_compare(parts, ("one",), mesh)
    assert total.tolist() == [0, 1, 2, 0, 1] and agree is None and not mesh.sent
    assert sum_and_compare(parts[:1], ("one",), mesh)[0] is parts[0]
