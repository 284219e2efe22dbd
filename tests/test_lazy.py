"""Whole parameters that are read part by part: ties by identity and by name, shapes without memory."""

from __future__ import annotations

import pytest
import torch
import zoo
from layouts import CPU, structure

from funczero import tree
from funczero.layout.cut import Rules
from funczero.layout.lazy import Fill, lazy


def test_a_tensor_at_two_paths_is_one_leaf_named_by_the_first():
    own = structure(zoo.params(), ("blocks",))
    s = own.structure
    assert (
        len(s.leaves) == len(s.places) - 1
        and s.unflatten(range(len(s.leaves)))["head"]["scale"] == s.unflatten(range(len(s.leaves)))["norm"]
    )
    shared = torch.ones(3)
    across = structure({"blocks": [{"w": shared}, {"w": shared}, {"w": torch.ones(3)}]}, ("blocks",)).structure
    assert [across.units[x.unit].name for x in across.leaves] == ["", "blocks/2"]  # gathered with the rest


def test_ties_by_name_survive_any_tree():
    """As a state_dict or a tree_map leaves them: other tensors, the same values."""
    params = {"embed": torch.arange(6.0), "norm": torch.ones(2), "head": torch.arange(6.0), "third": torch.arange(6.0)}
    ties = {"head": "embed", "third": "head", "absent": "embed", "norm2": "absent"}
    s = lazy(params, (), {}, lambda path: False, CPU, tuple(ties.items())).structure
    assert (
        s.places == (0, 1, 0, 0)
        and [x.path for x in s.leaves] == ["embed", "norm"]
        and tree.names(s.leaves[0].path) == ("embed", "head", "third")
    )
    one = torch.arange(6.0)
    by_identity = lazy(
        {"embed": one, "norm": torch.ones(2), "head": one, "third": one}, (), {}, lambda path: False, CPU
    ).structure
    assert by_identity == s


def test_meta_and_lazy_leaves_are_tied_without_being_read():
    never = Fill((3,), torch.float32, lambda: pytest.fail("it was drawn"))
    params = {"a": never, "b": torch.empty(3, device="meta"), "c": torch.ones(3)}
    assert lazy(params, (), {}, lambda path: False, CPU, (("b", "a"), ("c", "b"))).structure.places == (0, 0, 0)


@pytest.mark.parametrize(
    ("which", "frozen"),
    [
        ("^embed$", [True, False]),
        ("head", [True, False]),
        ("norm", [False, True]),
        (lambda n: n == "head", [True, False]),
    ],
)
def test_every_name_of_a_tied_leaf_matches(which, frozen):
    one = torch.ones(3)
    s = structure({"embed": one, "norm": torch.ones(2), "head": one}, frozen=tree.matcher(which)).structure
    assert [s.frozen(i) for i in range(2)] == frozen


def test_equal_tensors_are_two_leaves():
    assert len(structure({"a": torch.ones(3), "b": torch.ones(3)}).structure.leaves) == 2


def test_meta_tensors_have_specs_and_take_no_memory():
    own = lazy(
        {"w": torch.empty(10**6, 10**4, device="meta")}, (), {"data": Rules()}, lambda path: False, torch.device("meta")
    )
    assert own.at((("data", 4, 1),), torch.float32).leaves()[0].shape == (250_000, 10**4)
