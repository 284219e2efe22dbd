"""Pytrees: paths, maps, rows and rules."""

from __future__ import annotations

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import ones

from funczero import tree


class Pair(NamedTuple):
    left: object
    right: object


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (3, [""]),
        ({"b": 1, "a": [2, (3, 4)]}, ["b", "a/0", "a/1/0", "a/1/1"]),
        (Pair(1, {"w": 2}), ["left", "right/w"]),
        ({"blocks.0.w": 1}, ["blocks.0.w"]),
        ({}, []),
    ],
)
def test_every_leaf_has_a_path(value, names):
    assert [n for n, _ in tree.paths(value)] == names
    assert [x for _, x in tree.paths(value)] == tree.leaves(value)


def test_where_chooses_leaf_by_leaf_and_leaves_others_alone():
    new, old = {"w": ones(2), "n": 3}, {"w": torch.zeros(2), "n": 3}
    for ok, want in ((True, 1.0), (False, 0.0)):
        got = tree.where(torch.tensor(ok), new, old)
        assert got["w"].tolist() == [want] * 2 and got["n"] == 3


def test_a_clone_shares_no_memory():
    x = {"w": ones(2), "n": None, "s": "text"}
    y = tree.clone(x)
    y["w"].zero_()
    assert x["w"].sum() == 2 and y["n"] is None and y["s"] == "text" and tree.tensors(x) == [x["w"]]


def test_the_first_rule_that_matches_counts():
    rules = [("bias$", 0.0), ("head", 2.0), ("", 1.0)]
    assert [tree.rule(rules, p, None) for p in ("head/bias", "head/w", "w")] == [0.0, 2.0, 1.0]
    assert tree.rule([("x", 1)], "w", 7) == 7


@pytest.mark.parametrize(("which", "hits"), [(None, []), ("a$", ["a", "b/a"]), (str.isalpha, ["a", "c"])])
def test_a_matcher_is_a_regex_a_predicate_or_nothing(which, hits):
    assert [p for p in ("a", "b/a", "c") if tree.matcher(which)(p)] == hits


def test_a_path_with_other_names_is_its_first():
    path = tree.Path("embed", "head")
    for same in (path, copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert (
            same == "embed"
            and hash(same) == hash("embed")
            and f"{same!r} {same}" == "'embed' embed"
            and tree.names(same) == ("embed", "head")
        )
    assert tree.rule([("head", 1), ("", 2)], path, None) == 1 and tree.rule([("head", 1), ("", 2)], "embed", None) == 2
    assert tree.unmatched("head", [path, "norm"]) == tree.unmatched(
        "^$", [path]
    ) == "" and "the regex 'tail' matches no parameter" in tree.unmatched("tail", [path])


def test_floats_go_out_and_come_back():
    t = {"a": [torch.ones(2), torch.tensor(3)], "b": None, "c": torch.zeros((), dtype=torch.float64)}
    found, join = tree.floats(t)
    assert list(found) == ["a/0", "c"]
    again = join({k: x + 1 for k, x in found.items()})
    assert again["a"][0].tolist() == [2.0, 2.0] and again["a"][1] is t["a"][1] and again["b"] is None
    with pytest.raises(KeyError, match="floats: 'c' is missing or too many"):
        join({"a/0": torch.ones(2)})
