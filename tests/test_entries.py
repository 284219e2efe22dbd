"""One launch with its call: as words, as what is compared, as JSON; and all of them as a log."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from funczero.world.entries import BEGINS, UPDATE, Context, Entry, Log

NUMBERS = st.integers(-(2**62), 2**62)
WORDS = st.text(max_size=8)
SCALARS = st.lists(st.integers(0, 9) | st.floats(allow_nan=False), max_size=3).map(tuple)
TEXTS = st.lists(WORDS, max_size=3).map(tuple)
UNITS = st.lists(st.integers(0, 9), max_size=4).map(tuple)
CONTEXTS = st.builds(Context, WORDS, NUMBERS, NUMBERS, SCALARS, NUMBERS, TEXTS, WORDS, TEXTS)
ENTRIES = st.builds(Entry, CONTEXTS, WORDS, WORDS, WORDS, NUMBERS, UNITS, WORDS)


@given(ENTRIES)
@settings(max_examples=25)
def test_an_entry_is_read_as_it_was_written(entry):
    assert Entry.read(json.loads(json.dumps(entry))) == entry


@given(ENTRIES, ENTRIES)
@settings(max_examples=25)
def test_what_is_only_said_is_not_compared(entry, other):
    """Rows of a ragged batch, names of scalars and of units, and words."""
    said = entry.context._replace(names=other.context.names, rows=other.context.rows, units=other.context.units)
    assert entry._replace(context=said, text=other.text).compared == entry.compared


FIELDS = [("verb", "v"), ("axis", "a"), ("dtype", "d"), ("nbytes", 1), ("units", (7, 7, 7, 7, 7))]
CALLS = [("call", "c"), ("step", -1), ("key", -1), ("scalars", (0.5,) * 4), ("spec", -1)]


@given(ENTRIES, st.sampled_from(FIELDS), st.sampled_from(CALLS))
@settings(max_examples=40)
def test_all_else_is(entry, field, call):
    for other in (
        entry._replace(**{field[0]: field[1]}),
        entry._replace(context=entry.context._replace(**{call[0]: call[1]})),
    ):
        assert (other.compared == entry.compared) == (other == entry)


def test_an_entry_says_what_was_launched():
    context = Context(UPDATE, 3, rows="8", units=("", "blocks/0", "blocks/1"))
    launched = "launched all_gather{} over 'data' of 64 bytes of float32 in step(state, batch) with 8 rows at step 3"
    assert str(Entry(context, "all_gather", "data", "float32", 64)) == launched.format("")
    assert str(Entry(context, "all_gather", "data", "float32", 64, (0,))) == launched.format("")
    assert str(Entry(context, "all_gather", "data", "float32", 64, (0, 2))) == launched.format(
        " of 'the rest', 'blocks/1'"
    )
    assert str(Entry(Context(""), "left", text="after step 3")) == "left after step 3"


LAUNCHED = Entry(
    Context(UPDATE, 3, units=("", "blocks/0", "blocks/1", "blocks/2")), "all_gather", "data", "float32", 64
)
SAID = [
    (Entry(Context(""), BEGINS, "'w'", "float32 (2, 3)", 9), "begins with 'w' of float32 (2, 3)"),
    (Entry(Context(""), BEGINS, "key", "7"), "begins with key of 7"),
    (Entry(Context(""), "raised", text="ValueError: x"), "raised ValueError: x"),
    (Entry(Context("train_step"), "connect", "data=2"), "launched connect over 'data=2' in train_step at step 0"),
    (LAUNCHED._replace(units=(0, 2)), "launched all_gather of 'the rest', 'blocks/1' over 'data' of 64 bytes of"),
    (
        LAUNCHED._replace(units=(1, 2, 3, 0)),
        "launched all_gather of 'blocks/0', 'blocks/1', 'blocks/2' ... over 'data'",
    ),
    (LAUNCHED._replace(units=(9,)), "launched all_gather of '9' over 'data'"),  # of a tree that is not named here
]


@pytest.mark.parametrize(("entry", "words"), SAID)
def test_every_kind_of_entry_has_its_words(entry, words):
    assert str(entry).startswith(words)


# --- the log ----------------------------------------------------------------------------------------------------------
@given(st.lists(NUMBERS, max_size=20), st.lists(NUMBERS, max_size=20))
def test_two_logs_have_one_checksum_if_and_only_if_the_same_was_launched_in_the_same_order(xs, ys):
    a, b = Log(tail=4), Log(tail=8)
    for log, numbers in ((a, xs), (b, ys)):
        for n in numbers:
            log.append(LAUNCHED, n)
    assert (a.sum == b.sum) == ([hash(x) for x in xs] == [hash(y) for y in ys]) and (a.count, b.count) == (
        len(xs),
        len(ys),
    )


def test_a_log_remembers_the_last_ones_with_their_numbers_and_sums():
    log, sums = Log(tail=3), []
    for n in range(7):
        log.append(LAUNCHED._replace(nbytes=n), n)
        sums.append(log.sum)
    assert [(n, total, e.nbytes) for n, total, e in log.entries] == [(n + 1, sums[n], n) for n in (4, 5, 6)]


def logged(count: int, **sizes: int) -> tuple[Log, list[int]]:
    """A log after so many launches, and the checksum after each."""
    log, sums = Log(**sizes), []
    for n in range(count):
        log.append(Entry(Context("a call", step=n), "all_gather"), 3 * n)
        sums.append(log.sum)
    return log, sums


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 9, 16, 100])
def test_sums_are_remembered_as_far_back_as_there_is_room_and_no_other_is_told(count):
    log, sums = logged(count, sums=8, tail=2)
    told = {n: sums[n - 1] for n in range(max(1, count + 2 - 8), count + 1)}
    assert {n: log.sum_at(n) for n in range(-20, count + 20) if log.sum_at(n) is not None} == told
    assert log.count == count and len(told) == min(count, 7)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_last_entries_have_their_number_and_checksum(count):
    log, sums = logged(count, sums=8, tail=2)
    numbers = list(range(max(0, count - 2), count))
    assert [(n, total, e.context.step) for n, total, e in log.entries] == [(i + 1, sums[i], i) for i in numbers]


def test_equal_launches_have_equal_checksums_and_one_that_differs_changes_all_after_it():
    one, other = logged(5)[1], logged(5)[1]
    assert one == other
    odd = Log()
    for n in range(5):
        odd.append(Entry(Context("a call"), "all_gather"), 3 * n + (n == 2))
    assert [odd.sum_at(n + 1) == one[n] for n in range(5)] == [True, True, False, False, False]
