"""The number of applied updates: how schedules count in float64, and what a formula keeps of a skipped update."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from funczero.optim.count import Count, counted, zero

COUNTS = st.integers(0, 2**40)
BOTH = st.floats(1e-6, 1e6)
OPERATIONS = [operator.add, operator.sub, operator.mul, operator.truediv]


def count(n):
    return torch.tensor(n).as_subclass(Count)


@given(COUNTS, BOTH, st.sampled_from(OPERATIONS))
def test_arithmetic_with_numbers_is_pythons(n, x, op):
    """From either side, and in chains; where plain torch would round to float32. x / n is torch's x * (1 / n)."""
    found, other = op(count(n), x), op(x, count(n + 1))
    assert type(found) is type(other) is torch.Tensor and found.dtype == other.dtype == torch.float64
    assert found.item() == op(float(n), x)
    assert other.item() == (op(x, float(n + 1)) if op is not operator.truediv else x * (1 / (n + 1)))
    assert (op(count(n), x) * 3 + count(n)).item() == op(float(n), x) * 3 + float(n)


@given(COUNTS, st.integers(1, 2**20))
def test_whole_numbers_stay_counts(n, k):
    for found, want in ((count(n) + k, n + k), (count(n) * 2, 2 * n), (count(n) // k, n // k), (count(n) % k, n % k)):
        assert isinstance(found, Count) and found.dtype == torch.int64 and found.item() == want
    assert isinstance(count(n).clamp(min=1), Count) and (count(n) / k).item() == n / k


FUNCTIONS = [(torch.log1p, math.log1p), (torch.cos, math.cos), (torch.sqrt, math.sqrt), (torch.exp, math.exp)]


@pytest.mark.parametrize(("ours", "pythons"), FUNCTIONS, ids=lambda f: f.__name__)
def test_functions_are_computed_in_float64(ours, pythons):
    for n in (0, 1, 7, 100):
        assert ours(count(n)).dtype == torch.float64 and ours(count(n)).item() == pytest.approx(pythons(n), rel=1e-15)


def test_a_count_compares_indexes_and_chooses_as_a_number_does():
    n = count(2)
    assert [10, 20, 30][n] == 30 and n < 3 and n == 2 and int(n) == 2
    assert torch.where(n < 3, 0.1, 0.2).item() == pytest.approx(0.1) and range(5)[n] == 2
    both = torch.where(n < 3, n / 3, 1.0)
    assert both.dtype == torch.float64 and both.item() == 2 / 3


class State(NamedTuple):
    count: Any
    moment: Any = None


def test_a_skipped_update_is_not_counted_and_all_groups_share_what_is_read():
    state, factor = State(zero({"w": torch.ones(2)}), "kept"), torch.tensor(0.5, dtype=torch.float64)
    for ok, want in ((True, 1), (False, 1), (True, 2)):
        ok = torch.tensor(ok)
        state, groups = counted(state, [{"lr": 1.0}, {"lr": 2.0}], factor, ok)
        assert state.count == want and state.count.dtype == torch.float32 and state.moment == "kept"
        assert [(g.ok is ok, g.rates["lr"]) for g in groups] == [(True, 1.0), (True, 2.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_factor_comes_in_the_gradients_dtype(dtype):
    _, (own,) = counted(State(zero({})), [{}], torch.tensor(0.1, dtype=torch.float64), torch.tensor(True))
    factor, nothing = own.of([torch.ones(2, dtype=dtype)])
    assert factor.dtype == nothing.dtype == dtype and factor == torch.tensor(0.1, dtype=dtype) and nothing == 0
    assert own.of([])[0] == 0.1 and own.of([])[0].dtype == torch.float64  # a rank that holds nothing


def test_a_count_begins_where_the_parameters_lie():
    assert zero({"w": torch.ones(2, device="meta")}).is_meta and zero(()).device.type == "cpu"
    assert zero({"w": torch.ones(2)}).item() == 0 and zero([torch.ones(2).double()]).dtype == torch.float32
