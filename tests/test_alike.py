"""What ranks begin with, as numbers and in words: the same where it is the same, and another where it is not."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
import torch
import zoo
from hypothesis import given

import funczero as fz
from funczero.layout.mesh import connect, plan_mesh
from funczero.step.alike import WORDS, begin, checksum, settings
from funczero.testing import simulate
from funczero.world.ledger import DivergenceError

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def drawn(seed, n, dtype):
    return torch.randint(0, 2**30, (n,), generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- a tensor as a number ---------------------------------------------------------------------------------------------
@given(
    st.integers(0, 99), st.sampled_from([0, 1, 3, 7, 8, 64, WORDS, 2 * WORDS + 5, 9 * WORDS]), st.sampled_from(DTYPES)
)
def test_a_checksum_is_of_the_bits_however_they_lie(seed, n, dtype):
    x = drawn(seed, n, dtype)
    apart = torch.zeros(n, 3, dtype=dtype)[:, 1].copy_(x)  # not contiguous
    shifted = torch.cat([x[:1], x])[1:] if n else x  # at an odd place of its memory
    assert checksum(x) == checksum(x.clone()) == checksum(apart) == checksum(shifted)
    assert checksum(x).dtype == torch.int64 and not checksum(x).dim()


@given(st.integers(0, 99), st.sampled_from([1, 3, 64, WORDS, 2 * WORDS + 5]), st.data())
def test_one_bit_anywhere_and_two_values_that_change_places_give_another_number(seed, n, data):
    x = drawn(seed, n, torch.float32)
    i, bit = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, 31))
    other = x.clone()
    other.view(torch.int32)[i] ^= 1 << bit if bit < 31 else -(2**31)
    assert checksum(other) != checksum(x)
    j = data.draw(st.integers(0, n - 1))
    swapped = x.clone()
    swapped[[i, j]] = x[[j, i]]
    assert (checksum(swapped) == checksum(x)) == torch.equal(swapped, x)


def test_signs_of_zeros_kinds_of_nan_and_lengths_count():
    pairs = [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.zeros(3), torch.zeros(4)),
        (torch.zeros(4), torch.zeros(2).double()[:1]),
        (torch.tensor([torch.nan]), torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)),
    ]
    for x, y in pairs:
        assert checksum(x) == checksum(x.clone()) and checksum(x) != checksum(y)


# --- a chain in words -------------------------------------------------------------------------------------------------
def chain(**change):
    """A chain with many numbers; what is given is written otherwise."""
    own = dict(scale=4.0, window=8, limit=1.0, lr=1e-2, b1=0.9, eps=1e-8, wd=0.1, steps=10, nesterov=False, rule="b")
    own |= change
    rate = fz.schedules.warmup_cosine(own["lr"], 2, own["steps"])
    both = [(own["rule"], fz.adamw(rate, b1=own["b1"], eps=own["eps"], weight_decay=own["wd"]))]
    both += [("", fz.sgd(0.1, 0.9, nesterov=own["nesterov"]))]
    return (
        zoo.source(),
        fz.accumulate(2),
        fz.shard(
            "data",
            fz.scale_loss(init=own["scale"], window=own["window"]),
            fz.clip_by_global_norm(own["limit"]),
            fz.partition(both),
        ),
    )


def test_the_same_chain_has_the_same_words_and_no_address_in_them():
    lines = settings(chain())
    assert lines == settings(list(chain())) == settings([chain()]) and len(lines) >= 5
    assert not any(re.search("0x[0-9a-f]{6}| at 0", line) for line in lines), lines


@pytest.mark.parametrize(
    "change", [{"scale": 2.0}, {"window": 9}, {"limit": 2.0}, {"eps": 1e-6}, {"nesterov": True}], ids=str
)
def test_any_number_that_a_part_was_built_with_changes_one_line(change):
    before, after = settings(chain()), settings(chain(**change))
    assert len(before) == len(after)
    assert len([i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]) == 1


@pytest.mark.parametrize("change", [{"lr": 2e-2}, {"b1": 0.8}, {"wd": 0.0}, {"steps": 11}], ids=str)
def test_rates_are_leaves_of_the_state_and_compared_there(change):
    assert settings(chain()) == settings(chain(**change))


# --- ranks ------------------------------------------------------------------------------------------------------------
def begun(change):
    """What each of three ranks hears where the last one begins otherwise."""
    mesh = connect(plan_mesh({"data": 3}))
    params, key = zoo.params(), 7
    if mesh.index("data") == 2:
        if change == "a value":
            params["blocks"][1]["w"][2, 3] += 1e-6
        elif change == "a tied value":
            params["norm"][0] = 9.0
        elif change == "a dtype":
            params["embed"] = params["embed"].double()
        elif change == "a shape":
            params["one"] = torch.zeros(2)
        elif change == "a lazy leaf's shape":
            params["one"] = fz.leaf((3,))
        elif change == "the key":
            key = 8
        elif change == "a leaf more":
            params["zzz"] = torch.zeros(1)
    try:
        begin(params, None, key, mesh)
    except DivergenceError as e:
        return str(e)
    return mesh.ledger.context.call


ALIKE = {
    "a value": "rank 2 begins with another value of 'blocks/1/w' than ranks 0, 1; every rank must begin alike",
    "a tied value": "rank 2 begins with another value of 'norm' than ranks 0, 1; every rank must begin alike",
    "a dtype": (
        "rank 2 begins with another value of 'embed' than ranks 0, 1: float64 (11, 5) instead of float32 (11, 5);"
    ),
    "a shape": "rank 2 begins with another value of 'one' than ranks 0, 1: float32 (2,) instead of float32 (1,); every",
    "a lazy leaf's shape": "rank 2 begins with another value of 'one' than ranks 0, 1: float32 (3,) instead of float32",
    "the key": "rank 2 begins with another value of key than ranks 0, 1: 8 instead of 7; every rank must begin alike",
    "a leaf more": "rank 2 begins with 'zzz' of float32 (1,), while ranks 0, 1 ",
}


@pytest.mark.parametrize("change", ALIKE)
def test_a_rank_that_begins_otherwise_is_named_with_the_leaf_on_all(change):
    (said,) = set(simulate({"data": 3})(begun, change))
    assert said.startswith(ALIKE[change]), said


def test_ranks_that_begin_alike_go_on_in_the_call_they_were_in():
    assert simulate({"data": 3})(begun, "nothing") == ["no call"] * 3


def test_one_rank_compares_nothing():
    mesh = connect(plan_mesh({"data": 1}))
    begin(zoo.params(), None, 0, mesh)
    assert not mesh.sent and not mesh.ledger.sum
