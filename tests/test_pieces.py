"""Where leaves lie on the wire of an axis: the row of every rank is that rank's own buffer, and there and back is
nothing.
"""

from __future__ import annotations

from math import ceil, prod

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from layouts import SHAPES, numbered, structure

from funczero import P
from funczero.comm import pieces
from funczero.comm.pieces import Everywhere, Share, Stretch, pairs, plan_of, slot_lengths, travels
from funczero.layout.cut import Rules
from funczero.layout.where import GRAIN, Where

OUTER = st.sampled_from([(), (("out", 2, 0),), (("out", 3, 2),)])


def rules_of(shapes, dim, axes, threshold):
    """The last leaf that has such a dim is cut along it; small leaves stay whole."""
    last = max((i for i, s in enumerate(shapes) if len(s) > dim), default=None)
    rules = () if last is None else ((f"p{last}$", P(*[None] * dim, axes)),)
    return Rules(rules, threshold)


def on_the_wire(where, axis, size, leaves):
    """A unit's leaves laid out for all ranks of an axis: [size, elements]."""
    wire = torch.zeros(size, where.inner(axis, size, 0).lengths[0], dtype=torch.float64)
    here, there = pairs(plan_of(where, 0, axis, size), leaves, wire, None)
    for a, b in zip(there, here, strict=True):
        a.copy_(b)
    same = torch.zeros_like(wire)  # as it is found where all leaves are cut evenly
    for b, a in zip(*pieces.on_the_wire(where, 0, axis, leaves, same), strict=True):
        a.copy_(b)
    assert torch.equal(wire, same)
    return wire


@given(SHAPES, OUTER, st.integers(1, 4), st.integers(0, 2), st.sampled_from([0, 6, 10**6]))
@settings(max_examples=60)
def test_a_row_of_the_wire_is_that_ranks_buffer(shapes, outer, size, dim, threshold):
    rules = {"x": rules_of(shapes, dim, "x", threshold)}
    if outer:
        rules = {"out": Rules(threshold=threshold), **rules}
    params = structure(numbered(shapes), rules=rules)
    here = params.at(outer, torch.float64)
    wire = on_the_wire(here.where, "x", size, here.leaves())
    for q in range(size):
        part = params.at((*outer, ("x", size, q)), torch.float64)
        assert torch.equal(wire[q], part.buffers[0])
        n = travels(part.where, 0, "x")
        cut = [s for s, leaf in zip(part.where.slots, part.where.structure.leaves) if not leaf.cut("x").replicated]
        assert n == max((s.offset + s.length for s in cut), default=0)
        assert sum(slot_lengths(part.where, 0, n)) == n
        assert sum(slot_lengths(part.where, 0, part.where.lengths[0])) == part.where.lengths[0]

        # what arrives is read the other way: the parts that travel from the wire, whole leaves from one's own buffer
        back = torch.zeros(here.where.lengths[0], dtype=torch.float64)
        to, source = pairs(plan_of(here.where, 0, "x", size), here.where.views(0, back), wire[:, :n], part.buffers[0])
        for a, b in zip(to, source, strict=True):
            a.copy_(b)
        assert torch.equal(back, here.buffers[0])
        rows, own = wire[:, :n], part.buffers[0][:n].view(1, -1)
        for stretches in ((rows,), (rows[:q], own, rows[q + 1 :])):
            again = torch.zeros_like(back)
            found = pieces.off_the_wire(here.where, 0, "x", again, stretches, part.buffers[0])
            for a, b in zip(*found, strict=True):
                a.copy_(b)
            assert torch.equal(again, back)


def kinds(shape, rule, size):
    """Which kinds of piece one leaf has on the wire."""
    where = Where.whole(structure({"w": torch.zeros(shape)}, rules={"x": Rules((("w", rule),))}).structure)
    (plan,) = plan_of(where, 0, "x", size)
    return [type(p) for p in plan]


@pytest.mark.parametrize(
    ("shape", "rule", "size", "want"),
    [
        ((8, 3), P("x"), 4, [Share]),  # even rows are one view of the leaf
        ((7, 3), P("x"), 4, [Share, Stretch]),  # 2, 2, 2, 1
        ((5, 3), P("x"), 4, [Share, Stretch]),  # 2, 2, 1, 0
        ((3, 2), P("x"), 1000, [Share]),  # as few on a thousand ranks
        ((3, 8), P(None, "x"), 2, [Share]),
        ((3, 7), P(None, "x"), 4, [Share, Stretch]),
        ((3, 1), P(None, "x"), 4, [Share]),
        ((3, 8), P(), 2, [Everywhere]),
        ((), P(), 2, [Everywhere]),
        ((0, 3), P("x"), 2, []),
    ],
)
def test_a_leaf_has_as_few_pieces_as_its_cut_allows(shape, rule, size, want):
    assert kinds(shape, rule, size) == want


def test_a_plan_is_worked_out_once():
    where = Where.whole(structure({"w": torch.zeros(6)}).structure)
    assert plan_of(where, 0, "x", 3) is plan_of(where, 0, "x", 3) is not plan_of(where, 0, "x", 2)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 4))
def test_what_an_axis_leaves_whole_does_not_travel(cut, whole, size):
    own = structure({"c": torch.ones(cut), "w": torch.ones(whole)}, rules={"x": Rules((("w", P()),))}).structure
    inner = Where(own, (("x", size, 0),))
    padded = ceil(ceil(cut / size) / GRAIN) * GRAIN
    assert travels(inner, 0, "x") == padded
    assert slot_lengths(inner, 0, padded) == (padded,) * (padded > 0)
    assert prod(inner.slots[1].shape) == whole


def test_a_plan_asks_for_no_other_ranks_slots():
    where = Where.whole(structure({"w": torch.zeros(7, 3), "v": torch.zeros(3, 8)}).structure)
    plan_of(where, 0, "x", 1000)
    assert [key for key in where.memo if key[:2] == ("x", 1000)] == [("x", 1000, 0)]
