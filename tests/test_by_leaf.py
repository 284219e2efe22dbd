"""Which part of a rate moves which leaf: rules and trees are one thing, and a leaf that none moves is named."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
import torch
import zoo
from hypothesis import given
from layouts import structure
from optimizers import F32, F64, by_path, masters

import funczero as fz
from funczero import tree
from funczero.optim.by_leaf import Leaves, form_of, parts_of, reported, values_of

PATHS = [n for n, _ in tree.paths(zoo.params())]
TIED = {"norm", "head/scale"}
REGEXES = st.sampled_from(["blocks", "blocks/1", "/w$", "/b$", "embed", "norm", "scale", "head", "gain|one", "unused"])
RULES = st.lists(st.tuples(REGEXES, st.integers(1, 9).map(float)), max_size=4).map(lambda rules: [*rules, ("", 0.5)])


def leaves(kind, units=("blocks",)):
    """The zoo's leaves: of the tree that a user gave, or of buffers."""
    return Leaves(zoo.params() if kind == "tree" else structure(zoo.params(), units).at((), F32))


def said(own, rate):
    """By path: the number that a rate says; None where it cannot be said of these leaves."""
    try:
        spots = own.spots("tried", rate)
    except ValueError:
        return None
    return {path: parts_of(rate)[spot] for names, spot in zip(own.names, spots, strict=True) for path in names}


def first_rule(rules, path):
    """By hand: the first rule that is found in any name of a leaf."""
    names = TIED if path in TIED else {path}
    return next(rate for regex, rate in rules if any(re.search(regex, n) for n in names))


KINDS = pytest.mark.parametrize("kind", ["tree", "slots"])


@given(RULES)
def test_rules_say_of_a_leaf_what_the_first_that_is_found_says_and_trees_say_the_same(rules):
    want = {path: first_rule(rules, path) for path in PATHS}
    found = [said(leaves(kind), rules) for kind in ("tree", "slots")]
    assert found[0] == found[1] and found[0] in (None, want)
    assert all(said(leaves(kind), by_path(want.__getitem__)) == want for kind in ("tree", "slots"))
    counts = {regex for path in PATHS for regex, rate in [next(r for r in rules if first_rule([r, ("", 0)], path))]}
    if len(counts) == len(rules):  # every rule is the first for some leaf
        assert found[0] == want


@KINDS
def test_a_number_and_a_schedule_are_one_part_for_all_leaves(kind):
    for rate in (0.1, lambda updates: 0.1):
        assert set(leaves(kind).spots("tried", rate)) == {0} and parts_of(rate) == [rate]
        assert form_of(rate) is None and reported(rate) == 0 and values_of(None, "kept") == ["kept"]


@KINDS
def test_a_tied_leaf_is_one_with_both_names(kind):
    own = leaves(kind)
    assert sorted(map(sorted, own.names)) == sorted([*([p] for p in PATHS if p not in TIED), sorted(TIED)])
    assert own.held == len(PATHS) - 1
    if kind == "tree":  # in the order of the tree, a tied one at both of its places
        assert [own.names[place][0] for _, place in own.moved()].count("norm") == 2
    else:  # an empty leaf does not move
        moved = {own.names[i][0] for i, _ in own.moved()}
        assert moved == set(PATHS) - {"empty", "head/scale"}


def test_frozen_leaves_do_not_move_and_those_of_another_optimizer_have_no_name():
    params = structure(zoo.params(), ("blocks",), frozen=lambda path: "blocks/1" in path).at((), F32)
    own = Leaves(params)
    assert not any("blocks/1" in own.names[i][0] for i, _ in own.moved()) and own.held == len(PATHS) - 1
    assert said(own, [("blocks/1", 1.0), ("", 2.0)])["blocks/1/w"] == 1.0


FORMS = [
    (0.1, None, 0),
    ([("a", 0.1), ("", 0.2)], ("a", ""), 1),
    ([("", 0.2)], ("",), 0),
    ([("a", 0.1), ("b", 0.3)], ("a", "b"), 1),  # no rule for all: the last one stands for it
    ([("a", 0.1), ("a", 0.3), ("b", 0.2)], ("a", "b"), 1),  # of equal regexes the first counts
    ([(".*", 0.1), ("b", 0.3)], (".*", "b"), 0),
]


@pytest.mark.parametrize(("rate", "form", "shown"), FORMS)
def test_what_is_kept_of_a_rate_is_in_the_order_of_its_parts(rate, form, shown):
    assert form_of(rate) == form and reported(rate) == shown
    parts = parts_of(rate)
    kept = parts[0] if form is None else dict(zip(form, parts, strict=True))
    assert values_of(form, kept) == parts


def test_a_tree_is_kept_as_it_was_given_and_not_reported():
    rate = {"a": 1.0, "b": [2.0, 3.0]}
    assert reported(rate) is None and parts_of(rate) == [1.0, 2.0, 3.0]
    assert values_of(form_of(rate), {"a": 4.0, "b": [5.0, 6.0]}) == [4.0, 5.0, 6.0]


# --- in a step --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lr", "error", "words"),
    [
        ([("blocks", 1.0)], ValueError, "lr: no rule matches parameter 'embed'; end the rules with"),
        ({"embed": 1.0}, TypeError, "lr: dict is neither a number, a schedule, rules"),
        (
            [("blocks", 1.0), ("haed", 2.0), ("", 0.1)],
            ValueError,
            "adamw: lr: the rule 'haed' is found in no parameter's path; correct it or leave it out",
        ),
        (
            [("", 0.1), ("conv", 0.0)],
            ValueError,
            (
                "adamw: lr: the rule 'conv' never counts, because a rule before it takes 'conv' and all else that it"
                " matches; put it first"
            ),
        ),
        (
            by_path(lambda n: 0.5 if n == "head/scale" else 1.0),
            ValueError,
            "adamw: lr: the tree says two things of one tied parameter, norm = head/scale; write the same",
        ),
    ],
)
def test_rates_that_fit_no_leaf_are_named_at_init(lr, error, words):
    """In the fused form and in the plain one, as rate and as decay, alike."""
    for tx in (
        fz.adamw(lr),
        fz.lift((fz.adamw(lr).init, fz.adamw(lr).update), elementwise=True),
        fz.adamw(0.1, weight_decay=lr),
        fz.from_torch("RMSprop", 0.1, lr),
    ):
        step = fz.train_step(*fz.zero(zoo.source(), tx, stage=1), mesh={"data": 1})
        with pytest.raises(error) as caught:
            step.init(zoo.params())
        assert words.split(": lr: ")[-1].removeprefix("lr: ") in str(caught.value)


def test_a_rule_may_name_a_tied_leaf_by_any_of_its_paths():
    for dtype in (F32, F64):
        by_first, by_second = ([(path, 0.0), ("", 0.1)] for path in ("^norm$", "^head/scale$"))
        runs = [
            masters(tx, dtype=dtype)[0]
            for r in (by_first, by_second)
            for tx in (fz.sgd(r), fz.lift((fz.sgd(r).init, fz.sgd(r).update), elementwise=True))
        ]
        assert all(torch.equal(run[n], zoo.params(dtype)["norm"]) for run in runs for n in ("norm", "head/scale"))
        assert all(not torch.equal(run["gain"], zoo.params(dtype)["gain"]) for run in runs)


def test_a_rule_that_says_what_holds_anyway_is_welcome():
    """Recipes name norms and biases, whichever come first."""
    rule = [("norm", 0.0), ("blocks/.*/b$", 0.0), ("blocks/0/b", 0.0), ("", 0.1), (".*", 0.2)]
    masters(fz.adamw(0.1, weight_decay=rule), updates=1)
