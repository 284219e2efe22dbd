"""Rows and slots: every element in one place, buffers of one length on all ranks, and parts that join to what was cut."""
from __future__ import annotations

from math import prod

import hypothesis.strategies as st
import pytest
import torch
import zoo
from hypothesis import given

from funczero import P, tree
from funczero.layout.spec import GRAIN, Fill, Rules, Slots, Where, lazy

CPU = torch.device("cpu")
SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4)
MESHES = st.lists(st.integers(1, 4), max_size=2)


def structure(params, units=(), rules=None, frozen=lambda path: False):
    return lazy(params, units, rules or {}, frozen, CPU)


def numbered(shapes):
    """Leaves whose elements are all different."""
    start = [sum(prod(s) for s in shapes[:i]) for i in range(len(shapes))]
    return {f"p{i}": torch.arange(prod(s), dtype=torch.float64).add(a + 1).view(s) for i, (s, a) in enumerate(zip(shapes, start, strict=True))}


def ranks(sizes):
    """Coordinates of every rank of a nest of brackets."""
    out = [()]
    for a, n in enumerate(sizes):
        out = [(*c, (f"axis{a}", n, i)) for c in out for i in range(n)]
    return out


@given(SHAPES, MESHES, st.integers(0, 2), st.sampled_from([0, 6, 10**6]))
def test_every_element_lies_on_one_rank_and_parts_join(shapes, sizes, dim, threshold):
    params = numbered(shapes)
    rules = {f"axis{a}": Rules(((f"p{dim}", P(*[None] * dim, f"axis{a}")),), threshold) for a in range(len(sizes))}
    shapes_that_hold = all(len(s) > dim for i, s in enumerate(shapes) if i == dim)
    own = structure(params, rules=rules if shapes_that_hold else {})
    parts = [own.at(c, torch.float64) for c in ranks(sizes)]
    assert len({p.where.lengths for p in parts}) == 1
    for i, x in enumerate(params.values()):
        copies = prod(n for a, n in enumerate(sizes) if own.structure.leaves[i].dim(f"axis{a}") is None)
        seen = sorted(v for p in parts for v in p.leaves()[i].flatten().tolist())
        assert seen == sorted(x.flatten().tolist() * copies)
        for p in parts:
            slot = p.where.slots[i]
            assert torch.equal(p.leaves()[i], x[tuple(slice(a, a + n) for a, n in zip(slot.start, slot.shape, strict=True))])


@given(SHAPES, MESHES)
def test_slots_are_padded_with_zeros_and_do_not_overlap(shapes, sizes):
    for c in ranks(sizes):
        part = structure(numbered(shapes)).at(c, torch.float64)
        edges = sorted((s.offset, s.offset + s.length) for s in part.where.slots)
        assert all(a % GRAIN == b % GRAIN == 0 for a, b in edges) and all(b <= c for (_, b), (c, _) in zip(edges, edges[1:]))
        assert sum(map(prod, (x.shape for x in part.leaves()))) == sum(int((b != 0).sum()) for b in part.buffers)
        assert part.where.gaps == tuple(bool((b == 0).any()) for b in part.buffers)


@pytest.mark.parametrize(("rows", "world", "want"), [(5, 2, [3, 2]), (5, 4, [2, 2, 1, 0]), (1, 3, [1, 0, 0]), (0, 2, [0, 0]), (8, 4, [2, 2, 2, 2])])
def test_a_rank_holds_the_ceiling_and_late_ranks_what_is_left(rows, world, want):
    own = structure({"w": torch.ones(rows, 3)})
    assert [Where(own.structure, (("data", world, r),)).slots[0].shape[0] for r in range(world)] == want


def test_an_inner_bracket_cuts_the_outer_part_again():
    """Five rows: 3 and 2; then 2, 1 and 2, 0: the ceiling is the structure's, not the rank's."""
    own = structure({"w": torch.arange(5.0).view(5, 1)})
    parts = {(i, j): own.at((("a", 2, i), ("b", 2, j)), torch.float32).leaves()[0].flatten().tolist() for i in range(2) for j in range(2)}
    assert parts == {(0, 0): [0, 1], (0, 1): [2], (1, 0): [3, 4], (1, 1): []}


def test_units_hold_what_is_opened_together():
    s = structure(zoo.params(), ("blocks",), frozen=lambda path: path.endswith("/b")).structure
    assert [(u.name, u.seam, u.frozen) for u in s.units] == [
        ("", False, False), *((f"blocks/{i}", True, f) for i in range(3) for f in (False, True)), ("", False, True),
    ]  # fmt: skip
    assert [[s.leaves[i].path for i in m] for m in s.members][1:3] == [["blocks/0/w", "blocks/0/v"], ["blocks/0/b"]]
    assert sum(map(len, s.members)) == len(s.leaves) and s.frozen(s.members[2][0])


def test_a_module_s_names_make_units_too():
    names = {f"layers.{i}.{n}": torch.ones(2) for i in range(2) for n in ("w", "b")} | {"head": torch.ones(1)}
    assert [u.name for u in structure(names, ("layers",)).structure.units] == ["", "layers.0", "layers.1"]


def test_a_tensor_at_two_paths_is_one_leaf_named_by_the_first():
    own = structure(zoo.params(), ("blocks",))
    s = own.structure
    assert len(s.leaves) == len(s.places) - 1 and s.unflatten(range(len(s.leaves)))["head"]["scale"] == s.unflatten(range(len(s.leaves)))["norm"]
    shared = torch.ones(3)
    across = structure({"blocks": [{"w": shared}, {"w": shared}, {"w": torch.ones(3)}]}, ("blocks",)).structure
    assert [across.units[x.unit].name for x in across.leaves] == ["", "blocks/2"]  # gathered with the rest


def test_ties_by_name_survive_any_tree():
    """As a state_dict or a tree_map leaves them: other tensors, the same values."""
    params = {"embed": torch.arange(6.0), "norm": torch.ones(2), "head": torch.arange(6.0), "third": torch.arange(6.0)}
    ties = {"head": "embed", "third": "head", "absent": "embed", "norm2": "absent"}
    s = lazy(params, (), {}, lambda path: False, CPU, tuple(ties.items())).structure
    assert s.places == (0, 1, 0, 0) and [x.path for x in s.leaves] == ["embed", "norm"] and tree.names(s.leaves[0].path) == ("embed", "head", "third")
    one = torch.arange(6.0)
    by_identity = lazy({"embed": one, "norm": torch.ones(2), "head": one, "third": one}, (), {}, lambda path: False, CPU).structure
    assert by_identity == s


def test_meta_and_lazy_leaves_are_tied_without_being_read():
    never = Fill((3,), torch.float32, lambda: pytest.fail("it was drawn"))
    params = {"a": never, "b": torch.empty(3, device="meta"), "c": torch.ones(3)}
    assert lazy(params, (), {}, lambda path: False, CPU, (("b", "a"), ("c", "b"))).structure.places == (0, 0, 0)


@pytest.mark.parametrize(("which", "frozen"), [("^embed$", [True, False]), ("head", [True, False]), ("norm", [False, True]), (lambda n: n == "head", [True, False])])
def test_every_name_of_a_tied_leaf_matches(which, frozen):
    one = torch.ones(3)
    s = structure({"embed": one, "norm": torch.ones(2), "head": one}, frozen=tree.matcher(which)).structure
    assert [s.frozen(i) for i in range(2)] == frozen


def test_a_rule_finds_a_tied_leaf_by_any_name():
    one = torch.ones(4, 4)
    own = structure({"embed": one, "head": one}, rules={"data": Rules((("head", P(None, "data")),))}).structure
    assert Where(own, (("data", 2, 0),)).spec(0) == P(None, "data")


def test_equal_tensors_are_two_leaves():
    assert len(structure({"a": torch.ones(3), "b": torch.ones(3)}).structure.leaves) == 2


AXES = {
    "rows": ({"data": Rules()}, P("data")),
    "columns": ({"data": Rules((("w", P(None, "data")),))}, P(None, "data")),
    "whole by rule": ({"data": Rules((("w", P()),))}, P()),
    "whole by size": ({"data": Rules(threshold=13)}, P()),
    "just large enough": ({"data": Rules(threshold=12)}, P("data")),
    "another leaf's rule": ({"data": Rules((("v", P()),))}, P("data")),
    "the first rule": ({"data": Rules((("w", P()), ("", P("data"))))}, P()),
    "twice the same dim": ({"node": Rules(), "local": Rules()}, P(("node", "local"))),
    "the inner follows the outer": ({"node": Rules((("w", P(None, "node")),)), "local": Rules()}, P(None, ("node", "local"))),
    "the outer binds the inner": ({"node": Rules((("w", P("node", "local")),)), "local": Rules()}, P("node", "local")),
    "the inner by itself": ({"node": Rules(), "local": Rules((("w", P(None, "local")),))}, P("node", "local")),
    "the outer whole, so the inner": ({"node": Rules((("w", P()),)), "local": Rules()}, P()),
}


@pytest.mark.parametrize("name", AXES)
def test_rules_say_which_dim_an_axis_cuts(name):
    rules, want = AXES[name]
    own = structure({"w": torch.ones(4, 3)}, rules=rules).structure
    assert Where(own, tuple((a, 2, 0) for a in rules)).spec(0) == want


def test_leaves_without_dims_stay_whole():
    own = structure({"gain": torch.tensor(2.0)})
    where = Where(own.structure, (("data", 4, 3),))
    assert where.spec(0) == P() and where.replicas(0) == ("data",) and own.at(where.coords, torch.float32).leaves()[0] == 2.0


def test_what_is_cut_over_all_axes_comes_first():
    """So that a gather sends a prefix of the buffer."""
    rules = {"node": Rules((("^a", P()),)), "local": Rules((("^[ab]", P()),))}
    own = structure({n: torch.ones(32) for n in ("a", "b", "c")}, rules=rules).structure
    where = Where(own, (("node", 2, 0), ("local", 2, 0)))
    assert where.sections == ((((), 0, 16), (("local",), 16, 32), (("node", "local"), 32, 64)),)
    assert [where.slots[i].offset for i in (2, 1, 0)] == sorted(s.offset for s in where.slots)


def test_packing_takes_none_as_zero_and_frozen_units_as_empty():
    own = structure({"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(4)}, frozen="c".__eq__)
    packed = own.structure.whole.pack([None, torch.full((2,), 2.0), None], torch.float32, CPU)
    assert [None if x is None else x.tolist() for x in packed.leaves()] == [[0, 0, 0], [2, 2], None] and packed.buffers[1].numel() == 0
    assert tree.leaves(packed.tree())[2].shape == (0,)


def test_a_slots_is_a_pytree_of_buffers():
    x = structure(zoo.params(), ("blocks",)).at((), torch.float32)
    assert all(a is b for a, b in zip(tree.leaves(x), x.buffers, strict=True))
    doubled = tree.map(lambda b: b * 2, x)
    assert isinstance(doubled, Slots) and torch.equal(doubled.tree()["embed"], 2 * zoo.params()["embed"])
    assert x.to(torch.float32) is x and x.to(torch.bfloat16).buffers[0].dtype == torch.bfloat16


def test_meta_tensors_have_specs_and_take_no_memory():
    own = lazy({"w": torch.empty(10**6, 10**4, device="meta")}, (), {"data": Rules()}, lambda path: False, torch.device("meta"))
    assert own.at((("data", 4, 1),), torch.float32).leaves()[0].shape == (250_000, 10**4)
