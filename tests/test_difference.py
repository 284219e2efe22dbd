"""The sentence where ranks differ: the odd one of many is named, with what to write instead; ranks alike have none."""

from __future__ import annotations

import re

import pytest

from funczero.world.difference import first_difference, ranks_in_words
from funczero.world.entries import BEGINS, UPDATE, Context, Entry

USUAL = Context(UPDATE, 3, 7, (0.1, 5), 11, ("adamw.lr", "adamw.count"), "8", ("", "blocks/0", "blocks/1"))
GATHER = Entry(USUAL, "all_gather", "data", "float32", 64, (1,))
TEXTS = {11: "train_step\n  adamw(0.1)", 12: "train_step\n  adamw(0.2)"}
CASES = {  # what the odd rank did instead: how the sentence goes on after "rank 2 "
    "another unit": (
        GATHER._replace(units=(2,)),
        (
            "launched all_gather of 'blocks/1' .* while ranks 0, 1, 3 launched all_gather of 'blocks/0' .*; .* the same"
            " units in the same order; where that depends on its rows, name their list: .*conditional="
        ),
    ),
    "gradients where others gather": (
        GATHER._replace(verb="reduce_scatter", units=(0, 1, 2)),
        "launched reduce_scatter of .* while ranks 0, 1, 3 launched all_gather of 'blocks/0' .*conditional=",
    ),
    "another collective": (GATHER._replace(verb="all_reduce"), "launched all_reduce .*; .* the same collectives"),
    "another dtype": (GATHER._replace(dtype="bfloat16"), "launched all_gather .* of bfloat16 .*; .*same collectives"),
    "another key": (
        GATHER._replace(context=USUAL._replace(key=8)),
        "has 8 as the key in .* at step 3, while ranks 0, 1, 3 have 7; every rank must hold the same state and rates",
    ),
    "another rate": (GATHER._replace(context=USUAL._replace(scalars=(0.2, 5))), "has 0.2 as adamw.lr in .* have 0.1; "),
    "another step": (GATHER._replace(context=USUAL._replace(step=4)), ".* at step 4, while .* at step 3; "),
    "another call": (
        GATHER._replace(context=USUAL._replace(call="step.eval")),
        ".* in step.eval .*; every rank must make the same calls: step.eval on all ranks or on none",
    ),
    "another chain": (
        GATHER._replace(context=USUAL._replace(spec=12)),
        r".*; every rank must build the same chain .* one has '  adamw\(0.2\)' where others have '  adamw\(0.1\)'",
    ),
    "an error": (
        Entry(Context(""), "left", text="with ValueError: x"),
        "left with ValueError: x, while .*; an error on",
    ),
    "an early end": (Entry(Context(""), "left", text="after step 2"), "left after step 2, while .* as many batches"),
    "another beginning": (
        Entry(USUAL, BEGINS, "'w1'", "3", 5),
        "begins with 'w1' of 3, while ",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_odd_one_of_four_is_named(case):
    odd, words = CASES[case]
    same = [GATHER, GATHER._replace(verb="reduce_scatter")]
    tails = {r: [*same, odd if r == 2 else GATHER, *same] for r in range(4)}
    text = first_difference(tails, TEXTS)
    assert re.match(f"rank 2 {words}", text), text
    assert "\n" not in text


def test_of_two_the_one_that_ended_is_odd():
    left = Entry(Context(""), "left", text="after step 2")
    for tails in ({0: [GATHER], 1: [left]}, {0: [left], 1: [GATHER]}):
        odd = next(r for r, t in tails.items() if t == [left])
        assert first_difference(tails, {}).startswith(f"rank {odd} left after step 2, while rank {1 - odd} launched ")


def test_what_is_not_compared_makes_no_difference():
    """Rows of a ragged batch, the names of scalars and units, and words."""
    other = USUAL._replace(rows="3", names=("a", "b"), units=("x",))
    assert first_difference({0: [GATHER], 1: [GATHER._replace(context=other)]}, {}) == ""


@pytest.mark.parametrize("tails", [{}, {0: [GATHER]}, {0: [], 1: []}, {0: [GATHER] * 3, 1: [GATHER] * 3}], ids=len)
def test_ranks_alike_have_no_sentence(tails):
    assert first_difference(tails, {}) == ""


def test_one_that_launched_less_is_named_with_what_the_other_launched_next():
    more = GATHER._replace(verb="reduce_scatter")
    assert first_difference({0: [GATHER, more], 1: [GATHER]}, {}).startswith("rank ")
    assert "reduce_scatter" in first_difference({0: [GATHER, more], 1: [GATHER]}, {})


def test_many_ranks_in_words():
    assert [ranks_in_words(list(range(n))) for n in (1, 2)] == ["rank 0", "ranks 0, 1"]
    assert ranks_in_words(list(range(100))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 ..."
