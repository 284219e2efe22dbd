"""Rows and slots: every element in one place, buffers of one length on all ranks, parts that join to what was cut."""

from __future__ import annotations

from math import prod

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from layouts import MESHES, SHAPES, numbered, ranks, structure

from funczero import P
from funczero.layout.cut import Rules
from funczero.layout.where import GRAIN, Where


@given(SHAPES, MESHES, st.integers(0, 2), st.sampled_from([0, 6, 10**6]))
def test_every_element_lies_on_one_rank_and_parts_join(shapes, sizes, dim, threshold):
    params = numbered(shapes)
    rules = {f"axis{a}": Rules(((f"p{dim}", P(*[None] * dim, f"axis{a}")),), threshold) for a in range(len(sizes))}
    shapes_that_hold = all(len(s) > dim for i, s in enumerate(shapes) if i == dim)
    own = structure(params, rules=rules if shapes_that_hold else {})
    parts = [own.at(c, torch.float64) for c in ranks(sizes)]
    assert len({p.where.lengths for p in parts}) == 1
    for i, x in enumerate(params.values()):
        copies = prod(n for a, n in enumerate(sizes) if own.structure.leaves[i].cut(f"axis{a}").replicated)
        seen = sorted(v for p in parts for v in p.leaves()[i].flatten().tolist())
        assert seen == sorted(x.flatten().tolist() * copies)
        for p in parts:
            slot = p.where.slots[i]
            assert torch.equal(
                p.leaves()[i], x[tuple(slice(a, a + n) for a, n in zip(slot.start, slot.shape, strict=True))]
            )


@given(SHAPES, MESHES)
def test_slots_are_padded_with_zeros_and_do_not_overlap(shapes, sizes):
    for c in ranks(sizes):
        part = structure(numbered(shapes)).at(c, torch.float64)
        edges = sorted((s.offset, s.offset + s.length) for s in part.where.slots)
        assert all(a % GRAIN == b % GRAIN == 0 for a, b in edges) and all(
            b <= c for (_, b), (c, _) in zip(edges, edges[1:])
        )
        assert sum(map(prod, (x.shape for x in part.leaves()))) == sum(int((b != 0).sum()) for b in part.buffers)
        assert part.where.gaps == tuple(bool((b == 0).any()) for b in part.buffers)


@pytest.mark.parametrize(
    ("rows", "world", "want"),
    [(5, 2, [3, 2]), (5, 4, [2, 2, 1, 0]), (1, 3, [1, 0, 0]), (0, 2, [0, 0]), (8, 4, [2, 2, 2, 2])],
)
def test_a_rank_holds_the_ceiling_and_late_ranks_what_is_left(rows, world, want):
    own = structure({"w": torch.ones(rows, 3)})
    assert [Where(own.structure, (("data", world, r),)).slots[0].shape[0] for r in range(world)] == want


def test_an_inner_bracket_cuts_the_outer_part_again():
    """Five rows: 3 and 2; then 2, 1 and 2, 0: the ceiling is the structure's, not the rank's."""
    own = structure({"w": torch.arange(5.0).view(5, 1)})
    parts = {
        (i, j): own.at((("a", 2, i), ("b", 2, j)), torch.float32).leaves()[0].flatten().tolist()
        for i in range(2)
        for j in range(2)
    }
    assert parts == {(0, 0): [0, 1], (0, 1): [2], (1, 0): [3, 4], (1, 1): []}


def test_leaves_without_dims_stay_whole():
    own = structure({"gain": torch.tensor(2.0)})
    where = Where(own.structure, (("data", 4, 3),))
    assert (
        where.spec(0) == P()
        and where.replicas(0) == ("data",)
        and own.at(where.coords, torch.float32).leaves()[0] == 2.0
    )


def test_what_is_cut_over_all_axes_comes_first():
    """So that a gather sends a prefix of the buffer."""
    rules = {"node": Rules((("^a", P()),)), "local": Rules((("^[ab]", P()),))}
    own = structure({n: torch.ones(32) for n in ("a", "b", "c")}, rules=rules).structure
    where = Where(own, (("node", 2, 0), ("local", 2, 0)))
    assert where.sections == ((((), 0, 16), (("local",), 16, 32), (("node", "local"), 32, 64)),)
    assert [where.slots[i].offset for i in (2, 1, 0)] == sorted(s.offset for s in where.slots)
