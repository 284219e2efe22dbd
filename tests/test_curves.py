"""What schedules are made of: rises and cycles by their formulas, at every update and in float64."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from funczero.optim.count import Count
from funczero.optim.curves import check_numbers, check_updates, cycle_of, rise_of


def at(curve, *updates):
    """Values after so many updates, as a schedule is asked for them."""
    out = [torch.as_tensor(curve(torch.tensor(n).as_subclass(Count))) for n in updates]
    assert {x.dim() for x in out} == {0}
    return [x.item() for x in out]


@pytest.mark.parametrize("kind", ["log", "linear"])
@given(warmup=st.integers(1, 50))
def test_a_rise_goes_from_zero_to_one_and_stays(kind, warmup):
    found = at(rise_of("s", warmup, kind), *range(2 * warmup + 5))
    n = max(2, warmup)
    rise = {"log": lambda u: math.log(max(u, 1)) / math.log(n), "linear": lambda u: max(u - 1, 0) / n}[kind]
    assert found == pytest.approx([rise(u) if u - 1 < n else 1.0 for u in range(len(found))], rel=1e-15)
    assert found[:2] == [0.0, 0.0] and all(a <= b + 1e-15 for a, b in zip(found, found[1:], strict=False))
    assert set(found[n + 1 :]) == {1.0}


@pytest.mark.parametrize("kind", ["cosine", "", None, "Log"])
def test_a_rise_is_log_or_linear(kind):
    with pytest.raises(ValueError, match=f"^s: kind={kind!r} is neither 'log' nor 'linear'"):
        rise_of("s", 3, kind)


@given(st.integers(1, 20), st.none() | st.integers(1, 20))
def test_a_cycle_rises_to_one_and_falls_to_zero_in_straight_lines(first, second):
    cycle = cycle_of("s", first, second, 0, None, 0, 0)
    b = first if second is None else second
    assert cycle.end == first + b
    up, down = ([k / n for k in range(n + 1)] for n in (first, b))
    found = at(cycle.height, *range(first + b))
    assert found == pytest.approx([*up, *reversed(down[:-1])][: first + b], abs=1e-12)
    assert at(cycle.height, *range(first + b, 2 * (first + b))) == pytest.approx(found, abs=1e-12)  # and again
    assert at(cycle.decay, 0, first + b, 99) == [1.0] * 3


def test_a_cycle_without_a_second_half_is_a_saw():
    assert at(cycle_of("s", 4, 0, 0, None, 0, 0).height, *range(9)) == pytest.approx(
        [0, 0.25, 0.5, 0.75, 0, 0.25, 0.5, 0.75, 0], abs=1e-12
    )


@given(st.integers(1, 6), st.integers(1, 6))
def test_stairs_are_the_line_rounded_down_to_a_step(stairs, width):
    first = stairs * width
    found = at(cycle_of("s", first, first, stairs, None, 0, 0).height, *range(2 * first))
    want = [k // width / stairs for k in range(first)] + [(first - k) // width / stairs for k in range(first)]
    assert found == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_after_the_cycle_the_tail_grows_by_the_rate_in_so_many_updates(rate):
    cycle = cycle_of("s", 3, 5, 0, None, 4, rate)
    assert at(cycle.decay, 8, 12, 10, 16) == pytest.approx([1, 1 + rate, 1 + rate / 2, 1 + 2 * rate])


BAD = [
    (dict(first=0), "^s: first=0 must be positive and second=0 not negative"),
    (dict(first=3, second=-1), "second=-1 not negative"),
    (dict(first=[3]), r"^s: first=\[3\] is not a number; make one schedule for every group"),
    (dict(first=3, first_stairs=1.5), "^s: first_stairs=1.5"),
    (dict(first=3, second_stairs=-1), "^s: second_stairs=-1"),
    (dict(first=3, decay_steps=-1), "^s: decay_steps=-1"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=lambda x: str(x)[:30])
def test_a_cycle_that_cannot_be_is_named(change, words):
    given_ = dict(first=3, second=None, first_stairs=0, second_stairs=None, decay_steps=0, decay_rate=0) | change
    with pytest.raises((TypeError, ValueError), match=words):
        cycle_of("s", **given_)


def test_numbers_and_updates_are_checked_by_name():
    assert check_numbers("s", a=-1.0, b=2) == 2
    for bad in (math.nan, math.inf, "1", None, [1], True):
        with pytest.raises((TypeError, ValueError), match="^s: b="):
            check_numbers("s", a=1, b=bad)
    check_updates("s", a=1, b=10**9)
    for bad in (0, -1, 1.0, True, None, "3"):
        with pytest.raises(ValueError, match=f"^s: b={bad!r} is not a positive whole number of updates"):
            check_updates("s", a=1, b=bad)
