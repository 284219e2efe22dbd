"""The count of what is sent: sums by axis, verb and form, differences over time, and a table of them."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from funczero.world.sent import Sent

KEYS = st.tuples(
    st.sampled_from(["data", "node"]),
    st.sampled_from(["all_gather", "reduce_scatter"]),
    st.sampled_from(["float32", "int64", "int8(64)"]),
)
NOTES = st.lists(st.tuples(KEYS, st.integers(1, 99), st.integers(0, 99)), max_size=8)


def counted(notes, sent=None):
    sent = Sent() if sent is None else sent
    for note in notes:
        sent.note(*note)
    return sent


@given(NOTES, NOTES)
def test_what_was_sent_since_a_copy_is_what_was_noted_since(before, after):
    sent = counted(before)
    copy = sent.copy()
    counted(after, sent)
    assert sent.since(copy) == counted(after) and sent.since(copy).numbers == counted(after).numbers
    assert copy == counted(before) and copy.numbers == counted(before).numbers  # a copy does not go on


@given(NOTES)
def test_bytes_and_values_are_sums_by_key(notes):
    sent = counted(notes)
    for key in sent:
        assert sent[key] == sum(n for k, n, _ in notes if k == key)
        values = sum(v for k, _, v in notes if k == key)
        assert sent.at_16_bits(key) == (None if key[2] == "int64" else 2 * values)
    assert sum(sent.values()) == sum(n for _, n, _ in notes)


@pytest.mark.parametrize("form", ["int8", "uint8", "int16", "int32", "int64"])
def test_integers_are_no_values_and_wires_that_begin_with_int_are(form):
    sent = counted([(("x", "all_reduce", form), 8, 1), (("x", "all_gather", f"{form}(64)"), 8, 4)])
    assert sent.at_16_bits(("x", "all_reduce", form)) is None
    assert sent.at_16_bits(("x", "all_gather", f"{form}(64)")) == 8


@given(NOTES)
def test_the_table_has_a_line_a_key_and_a_sum_an_axis(notes):
    sent = counted(notes)
    head, *lines = str(sent).splitlines()
    assert head.split() == ["axis", "what", "as", "bytes", "16", "bits", "would", "be"]
    axes = list(dict.fromkeys(a for a, _, _ in sent))
    assert len(lines) == len(sent) + len(axes) and all(line == line.rstrip() for line in lines)
    sums = [line.split() for line in lines if len(line.split()) == 2]
    assert [(a, int(n.replace(",", ""))) for a, n in sums] == [
        (a, sum(n for k, n in sent.items() if k[0] == a)) for a in axes
    ]


def test_nothing_sent_is_a_table_without_lines():
    assert str(Sent()).splitlines() == ["axis  what  as      bytes  16 bits would be"] and not Sent()
