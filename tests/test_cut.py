"""Cuts as values: parts that join to the leaf, the rules that choose them, and kinds and rules of a user's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod

import hypothesis.strategies as st
import pytest
import torch
import zoo
from hypothesis import given
from layouts import CPU, structure

import funczero as fz
from funczero import P
from funczero.comm import collectives
from funczero.comm.edge import Edge
from funczero.layout.cut import Cut, Extent, Rows, Rules, Whole
from funczero.layout.lazy import lazy
from funczero.layout.mesh import connect, plan_mesh
from funczero.layout.where import Where


@dataclass(frozen=True)
class Dealt:
    """A kind of a user's own: the whole leaf on one rank."""

    owner: int
    dim = None
    replicated = False

    def part(self, of: Extent, size: int, index: int) -> Extent:
        """All of it, or nothing."""
        return of if index == self.owner % size else Extent(of.start, (0,) * len(of.shape), of.block)


def of(shape):
    return Extent((0,) * len(shape), shape, shape)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(0, 2),
)
def test_parts_of_nested_cuts_join_and_blocks_are_equal(shape, sizes, dim):
    for cut in (Rows(dim % len(shape)), Dealt(dim)):
        parts = [of(shape)]
        for n in sizes:
            parts = [cut.part(p, n, i) for p in parts for i in range(n)]
        assert sum(prod(p.shape) for p in parts) == prod(shape) and len({p.block for p in parts}) == 1
        assert all(
            n <= b and a + n <= total
            for p in parts
            for a, n, b, total in zip(p.start, p.shape, p.block, shape, strict=True)
            if prod(p.shape)
        )


def test_cuts_are_values():
    assert Rows(0) == Rows(0) != Rows(1) and Whole() == Whole() != Rows(0) and len({Rows(0), Rows(0), Whole()}) == 2
    assert [repr(c) for c in (Rows(1), Whole())] == ["Rows(dim=1)", "Whole()"]  # ranks compare them
    assert all(isinstance(c, Cut) for c in (Rows(0), Whole(), Dealt(0))) and not isinstance(P(), Cut)
    leaf = structure({"w": torch.ones(4, 3), "gain": torch.ones(())}).structure.leaves
    assert leaf[0].cut("data") == Rows(0) and leaf[1].cut("data") == Whole()  # where no bracket says


AXES = {
    "rows": ({"data": Rules()}, P("data")),
    "columns": ({"data": Rules((("w", P(None, "data")),))}, P(None, "data")),
    "whole by rule": ({"data": Rules((("w", P()),))}, P()),
    "whole by size": ({"data": Rules(threshold=13)}, P()),
    "just large enough": ({"data": Rules(threshold=12)}, P("data")),
    "another leaf's rule": ({"data": Rules((("v", P()),))}, P("data")),
    "the first rule": ({"data": Rules((("w", P()), ("", P("data"))))}, P()),
    "twice the same dim": ({"node": Rules(), "local": Rules()}, P(("node", "local"))),
    "the inner follows the outer": (
        {"node": Rules((("w", P(None, "node")),)), "local": Rules()},
        P(None, ("node", "local")),
    ),
    "the outer binds the inner": ({"node": Rules((("w", P("node", "local")),)), "local": Rules()}, P("node", "local")),
    "the inner by itself": ({"node": Rules(), "local": Rules((("w", P(None, "local")),))}, P("node", "local")),
    "the outer whole, so the inner": ({"node": Rules((("w", P()),)), "local": Rules()}, P()),
}


@pytest.mark.parametrize("name", AXES)
def test_rules_say_which_dim_an_axis_cuts(name):
    rules, want = AXES[name]
    own = structure({"w": torch.ones(4, 3)}, rules=rules).structure
    assert Where(own, tuple((a, 2, 0) for a in rules)).spec(0) == want


def widest(path, shape):
    """A rule of a user's own: the largest dim, but norms stay whole."""
    if "norm" in path or not shape:
        return P()
    d = max(range(len(shape)), key=shape.__getitem__)
    return P(*[None] * d, "data")


def test_a_rule_may_be_a_function_of_path_and_shape():
    params = {"w": torch.ones(2, 3), "v": torch.ones(4, 3), "norm": torch.ones(9), "gain": torch.ones(())}
    specs = fz.train_step(fz.shard("data", zoo.source(units=()), *zoo.tx(), rules=widest), mesh={"data": 2}).specs(
        params
    )
    assert specs["params"] == {"w": P(None, "data"), "v": P("data"), "norm": P(), "gain": P()}
    asked = []
    structure(params, rules={"data": Rules(lambda path, shape: asked.append((path, shape)))})
    assert sorted(asked) == sorted((n, tuple(x.shape)) for n, x in params.items())


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        (P(None, "data"), Rows(1)),
        (P(), Whole()),
        (Rows(1), Rows(1)),
        (Whole(), Whole()),
        (Dealt(1), Dealt(1)),
        (None, Rows(0)),
    ],
)
def test_what_a_function_may_answer(answer, want):
    leaf = structure({"w": torch.ones(4, 3)}, rules={"data": Rules(lambda path, shape: answer)}).structure.leaves[0]
    assert leaf.cut("data") == want


def test_a_threshold_holds_where_a_function_says_nothing():
    rules = {"data": Rules(lambda path, shape: Rows(0) if path == "small" else None, threshold=10)}
    leaves = structure(
        {"small": torch.ones(3), "other": torch.ones(3), "large": torch.ones(10)}, rules=rules
    ).structure.leaves
    assert {leaf.path: leaf.cut("data") for leaf in leaves} == {"small": Rows(0), "other": Whole(), "large": Rows(0)}


REFUSED = {
    "shard('data'): rules=rule gave 'data' for parameter 'w' of shape (4, 3);"
    " return a P, as P('data'), or None for the default": (TypeError, "data", {}),
    "shard('data'): Rows(dim=2) cuts dim 2, but parameter 'w' has shape (4, 3);"
    " write a dim it has": (ValueError, Rows(2), {}),
    "shard('data'): Rows(dim=-1) cuts dim -1, but parameter 'w' has shape (4, 3);"
    " write a dim it has": (ValueError, Rows(-1), {}),
    "shard('data'): rule Rows(dim=0) cuts dim 0 of 'w' over 'data', but an outer bracket's rule says otherwise;"
    " change one of them": (ValueError, Rows(0), {"node": Rules((("w", P("node", "data")),))}),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_function_may_not_answer(words):
    kind, answer, outer = REFUSED[words]

    def rule(path, shape):
        return answer

    with pytest.raises(kind) as e:
        structure({"w": torch.ones(4, 3)}, rules={**outer, "data": Rules(rule)})
    assert str(e.value) == words


def trained(stage):
    """Weights by cuts of a user's own, under a nest of two brackets, against those of rows."""
    dealt = lambda path, shape: Dealt(len(path)) if len(shape) > 1 else None
    found = []
    for rules in ((), widest, dealt):
        g, tx = zoo.source(units=("blocks",)), zoo.tx()
        parts = {1: (g, fz.shard("data", *tx, rules=rules)), 3: (fz.shard("data", g, *tx, rules=rules),)}[stage]
        found.append(zoo.bits(zoo.train(parts, {"data": 2}, updates=2)))
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_a_cut_changes_no_bit(run_world, stage):
    assert len(set(zoo.everywhere(run_world, 2, trained, stage))) == 1


def exchanged():
    """Both ways of a leaf that one rank has whole, and what a gather sent."""
    mesh = connect(plan_mesh({"data": 2}))
    own = lazy(
        {"w": torch.arange(40.0).view(5, 8), "b": torch.arange(3.0)},
        (),
        {"data": Rules(lambda path, shape: Dealt(1))},
        lambda path: False,
        CPU,
    )
    whole = own.at((), torch.float32)
    part = collectives.cut(whole, "data", mesh)
    summed, _ = collectives.reduce_scatter(whole, Edge("data"), mesh)
    joined = collectives.all_gather(part, "data", mesh)
    shapes = [tuple(x.shape) for x in part.leaves()]
    same = [torch.equal(2 * a, b) for a, b in zip(part.buffers, summed.buffers, strict=True)]
    return shapes, reduce(bool.__and__, same), torch.equal(joined.buffers[0], whole.buffers[0])


def test_a_leaf_dealt_to_one_rank_travels_both_ways(run_world):
    first, second = run_world(2, exchanged)
    assert first == ([(0, 0), (0,)], True, True) and second == ([(5, 8), (3,)], True, True)


@dataclass(frozen=True)
class Overlapping(Dealt):
    """No cut: all ranks have the whole leaf, and it does not say so."""

    def part(self, of: Extent, size: int, index: int) -> Extent:
        """All of it."""
        return of


def overlapping():
    mesh = connect(plan_mesh({"data": 2}))
    own = lazy({"w": torch.ones(2)}, (), {"data": Rules(lambda path, shape: Overlapping(0))}, lambda path: False, CPU)
    with pytest.raises(ValueError) as e:
        collectives.reduce_scatter(own.at((), torch.float32), Edge("data"), mesh)
    return str(e.value)


def test_parts_that_are_not_the_leaf_are_refused(run_world):
    what = "Overlapping(owner=0) gives the ranks of 'data' parts of shapes [(2,), (2,)], which do not make up its (2,)"
    assert (
        zoo.everywhere(run_world, 2, overlapping)
        == f"parameter 'w': {what}; a cut's blocks are equal and its parts are the leaf, once"
    )
