"""Texts and bytes of somebody else: one printable line of bounded length, JSON of bounded size, or one sentence."""

from __future__ import annotations

import json
import random
import sys
import zlib

import pytest

from funczero.world.plain import plain, unpack

TEXTS = {
    "nothing": "",
    "words": "rank 3 left after step 7",
    "letters of the world": "größer 漢字 é",
    "an escape sequence": "a\x1b[31mred\x1b[0m",
    "line ends": "a\r\nb\x85c\u2028d",
    "a mark that turns the line": "abc\u202edef",
    "a lone surrogate": "\ud800",
    "zero bytes": "a\x00b",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("repeat", [1, 1000])
@pytest.mark.parametrize("most", [16, 17, 100, 2000])
def test_a_text_is_one_printable_line_of_bounded_length(text, repeat, most):
    said = plain(text * repeat, most)
    assert len(said) <= most and said.isprintable() and len(said.splitlines()) <= 1
    if (text * repeat).isprintable() and len(text * repeat) <= most:
        assert said == text * repeat
    said.encode()  # a lone surrogate would not do


def test_both_ends_of_a_long_text_stay():
    said = plain("begin" + "x" * 10**6 + "end", 40)
    assert said.startswith("begin") and said.endswith("end") and len(said) == 40


def test_what_was_packed_comes_back():
    for x in (None, [], {"a": [1, 2.5, "x", None, True]}, "漢", [[[]]]):
        text = json.dumps(x).encode()
        assert unpack(zlib.compress(text), len(text)) == x
        if len(text) > 1:
            with pytest.raises(ValueError, match="cut off, or larger than"):
                unpack(zlib.compress(text), len(text) - 1)


def test_a_small_message_may_not_become_a_large_one():
    bomb = zlib.compress(b'"' + b"0" * (1 << 26) + b'"')
    assert len(bomb) < 1 << 17
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        unpack(bomb, 1000)


@pytest.mark.parametrize(
    "data", [b"", b"no zlib", zlib.compress(b"{"), zlib.compress(b"\xff"), zlib.compress(b"1")[:-3]]
)
def test_what_is_no_packed_json_is_one_error_of_one_line(data):
    with pytest.raises(ValueError, match="it is (no packed JSON|cut off)") as caught:
        unpack(data, 1 << 20)
    assert "\n" not in str(caught.value)


def test_deep_json_is_no_recursion_error():
    deep = b"[" * (sys.getrecursionlimit() * 200)
    with pytest.raises(ValueError, match="no packed JSON"):
        unpack(zlib.compress(deep), len(deep))


def test_damaged_bytes_are_refused_or_read_and_never_crash():
    rng, good = random.Random(0), zlib.compress(json.dumps({"a": list(range(50))}).encode())
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        try:
            unpack(bytes(bad), 1000)
        except ValueError as e:
            assert str(e).startswith("it is ")
