"""What a rate may be: how it is checked when it is given, and its value at an update, as an exact double."""

from __future__ import annotations

import math

import pytest
import torch
from optimizers import masters

import funczero as fz
from funczero.optim.count import COUNTED
from funczero.optim.rate import checked, is_plain, is_rules, lasting, one_for_all, value_at

SCHEDULE = fz.schedules.warmup_cosine(1e-2, 2, 8)

# (rate, one number or schedule?, rules?)
KINDS = [
    (0.1, True, False),
    (1, True, False),
    (SCHEDULE, True, False),
    (True, False, False),
    (float, False, False),
    ("0.1", False, False),
    (torch.tensor(0.1), False, False),
    ([], False, False),
    ([("", 0.1)], False, True),
    ((("a", 0.1), ("", SCHEDULE)), False, True),
    ([("a", 0.1), "b"], False, False),
    ([["a", 0.1]], False, False),
    ([(0, 0.1)], False, False),
    ({"w": 0.1}, False, False),
    ([0.1, 0.2], False, False),
]


@pytest.mark.parametrize(("rate", "plain", "rules"), KINDS, ids=lambda x: str(x)[:24])
def test_a_rate_is_plain_or_rules_or_a_tree_or_none(rate, plain, rules):
    assert (is_plain(rate), is_rules(rate)) == (plain, rules)


def test_numbers_become_floats_and_schedules_stay_wherever_they_stand():
    assert type(checked("sgd", "lr", 1)) is float and checked("sgd", "lr", SCHEDULE) is SCHEDULE
    assert checked("sgd", "lr", [("a", 1), ("", SCHEDULE)]) == (("a", 1.0), ("", SCHEDULE))
    found = checked("sgd", "lr", {"w": 1, "b": [SCHEDULE, 0.5]})
    assert found == {"w": 1.0, "b": [SCHEDULE, 0.5]} and type(found["w"]) is float
    assert checked("sgd", "lr", checked("sgd", "lr", found)) == found


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, True, "0.1", None], ids=str)
def test_what_is_no_rate_is_named_where_it_stands(bad):
    for rate, where in ((bad, ""), ([("a", bad)], "the rule 'a' of lr"), ({"w": [0.1, bad]}, "lr at 'w/1'")):
        if bad is None and isinstance(rate, dict):
            continue  # a None is no leaf of a tree
        with pytest.raises((TypeError, ValueError)) as e:
            checked("sgd", "lr", rate)
        assert str(e.value).startswith("sgd: ") and where in str(e.value) and "lr=" in str(e.value)


@pytest.mark.parametrize("beta", [0.0, 0.5, SCHEDULE], ids=["0", "half", "schedule"])
def test_a_beta_is_one_number_below_one_or_a_schedule(beta):
    assert one_for_all("adamw", "b1", beta) == beta
    for bad in (1.0, -0.1, [0.9], {"w": 0.9}, [("", 0.9)], float):
        with pytest.raises((TypeError, ValueError), match="^adamw: b1="):
            one_for_all("adamw", "b1", bad)


def test_a_second_beta_does_not_move():
    with pytest.raises(TypeError, match=r"write one number in \[0, 1\); only lr and weight_decay go by rules or trees"):
        one_for_all("adamw", "b2", SCHEDULE, moves=False)


# --- its value at an update -------------------------------------------------------------------------------------------
def test_a_number_is_itself_at_any_update():
    assert all(value_at("sgd", "lr", 0.1, torch.tensor(float(n))) == 0.1 for n in (0, 7, COUNTED))


def test_the_last_update_that_a_float32_count_tells_apart_is_the_last_one():
    slow = lambda u: u / COUNTED
    assert value_at("sgd", "lr", slow, torch.tensor(COUNTED - 1.0)) == (COUNTED - 1) / COUNTED
    assert value_at("sgd", "lr", slow, torch.tensor(COUNTED)) == 1.0  # an int64 count goes on


NONE = [
    (torch.zeros(2), TypeError, "return one number of at least 0"),
    (torch.tensor(True), TypeError, "return one number of at least 0"),
    (torch.tensor(1j), TypeError, "return one number of at least 0"),
    ("fast", TypeError, "after 3 applied updates the schedule's value"),
    (-1e-9, ValueError, "after 3 applied updates the schedule's value"),
    (torch.tensor(math.nan), ValueError, "after 3 applied updates the schedule's value"),
    (1.0, ValueError, "is not below 1"),
]


@pytest.mark.parametrize(("value", "error", "words"), NONE, ids=lambda x: str(x)[:20])
def test_a_schedule_that_gives_no_number_is_told_at_its_update(value, error, words):
    with pytest.raises(error, match=words):
        value_at("adamw", "b1", lambda u: value, torch.tensor(3.0), high=1.0)


@pytest.mark.parametrize(
    ("eps", "dtype", "fine"),
    [
        (1e-8, torch.float32, True),
        (1e-8, torch.float16, False),
        (1e-8, torch.bfloat16, True),
        (1e-46, torch.float32, False),
        (1e-46, torch.float64, True),
        (0.0, torch.float16, True),  # nobody asked for one
    ],
    ids=str,
)
def test_an_eps_lasts_in_the_dtype_of_the_masters(eps, dtype, fine):
    params = {"w": torch.zeros(2, dtype=dtype)}
    if fine:
        return lasting("adamw", eps, params)
    with pytest.raises(ValueError, match=f"adamw: eps={eps:g} is 0 in {str(dtype)[6:]}, the dtype of the masters"):
        lasting("adamw", eps, params)


def test_a_count_at_its_end_is_told():
    with pytest.raises(OverflowError, match="sgd: 16777216 applied updates are the end of a float32 count"):
        value_at("sgd", "lr", lambda u: 0.1, torch.tensor(2.0**24))


def test_rates_are_exact_doubles():
    """A schedule may return a Python number, which is never rounded to float32; and an unmodified get_lr gives its own
    numbers.
    """

    def get_lr(it, learning_rate=6e-4, warmup_iters=5, lr_decay_iters=50, min_lr=6e-5):
        if it < warmup_iters:
            return learning_rate * (it + 1) / (warmup_iters + 1)
        if it > lr_decay_iters:
            return min_lr
        decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
        coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
        return min_lr + coeff * (learning_rate - min_lr)

    for n in range(60):
        assert value_at("adamw", "lr", get_lr, torch.tensor(float(n))) == get_lr(n)
    table = [0.1, 0.3]
    for schedule, want in [
        (lambda u: 0.1, 0.1),
        (lambda u: table[u], 0.3),
        (lambda u: u / 3, 1 / 3),
        (lambda u: torch.cos(u) ** 2, math.cos(1) ** 2),
        (lambda u: u, 1.0),
    ]:
        assert masters(fz.sgd(schedule), updates=2)[1][1].lr.item() == want


def test_a_schedule_is_handed_an_int64_count():
    seen = []

    def schedule(updates):
        seen.append((updates.dtype, updates.dim(), int(updates)))
        return 0.1

    masters(fz.adamw(schedule), updates=3)
    assert seen == [(torch.int64, 0, n) for n in range(3)]  # read once an update
