"""Exact sums of squares: the same integers however leaves are cut, and the norm to 2**-32."""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from funczero.comm.norm import BINS, folds, norm_of, norm_on_device, square_bins
from funczero.kernels.squares.reference import CHUNK, LOW, WIDTH, add_on_device

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def exact(x):
    """The root of the exact sum."""
    return math.sqrt(sum(Fraction(v) ** 2 for v in x.double().tolist()))


def wild(seed, n, dtype, spread):
    """Values over many binary orders."""
    g = torch.Generator().manual_seed(seed)
    limit = {torch.float16: 4, torch.float64: spread}.get(dtype, min(spread, 15))
    return (
        torch.randn(n, generator=g, dtype=torch.float64)
        * 10.0 ** (torch.rand(n, generator=g, dtype=torch.float64) * 2 * limit - limit)
    ).to(dtype)


@given(
    st.integers(0, 10**6),
    st.sampled_from(DTYPES),
    st.integers(0, 200),
    st.lists(st.integers(0, 200), max_size=4),
    st.sampled_from([0, 3, 15, 60]),
)
@settings(max_examples=80)
def test_any_cut_and_any_order_give_the_same_norm(seed, dtype, n, cuts, spread):
    x = wild(seed, n, dtype, spread)
    whole = norm_of(square_bins(x), folds(dtype))
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    parts = sum((square_bins(x[a:b]) for a, b in zip(edges, edges[1:])), torch.zeros(1 + BINS, dtype=torch.int64))
    shuffled = square_bins(x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))])
    assert norm_of(parts, folds(dtype)) == norm_of(shuffled, folds(dtype)) == whole
    assert whole.dtype == torch.float64 and whole.item() == pytest.approx(
        exact(x), rel=2**-32 if dtype != torch.float64 else 2**-52
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accelerators_add_the_same_integers(dtype):
    """The path without a sync, run here on the CPU."""
    for seed in range(20):
        x, out = wild(seed, 300, dtype, 30), torch.zeros(1 + BINS, dtype=torch.int64)
        add_on_device(out, x.double() ** 2, folds(dtype))
        assert torch.equal(out, square_bins(x))
        for of in (0, 1 << 32):
            want, parts = norm_of(out, folds(dtype)), [square_bins(part, of=of) for part in x.split(30)]
            assert norm_on_device(out, folds(dtype)).item() == pytest.approx(want.item(), rel=2**-51)
            assert norm_on_device(sum(parts), folds(dtype)) == norm_on_device(square_bins(x, of=of), folds(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1 - 2**-7, 2**-15 * (1 - 2**-7), -1.0 - 2**-7])
def test_more_values_than_64_bits_hold_are_counted(dtype, value):
    """A chunk of values, whose squares lie just below a bin's end, in it and just above it, 2**27 times."""
    scale, times, of = 2.0**14 if dtype == torch.float16 else 2.0**16, 1 << 27, 1 << 45
    x = torch.full((CHUNK,), value * scale, dtype=torch.float64).to(dtype)
    bins = square_bins(x, of=of)
    assert (bins.abs() < 1 << 63 - 27).all()
    want = abs(x[0].double().item()) * 2.0**22.5
    assert norm_of(bins * times, folds(dtype)).item() == pytest.approx(want, rel=2**-33)
    assert norm_on_device(bins * times, folds(dtype)).item() == pytest.approx(want, rel=2**-33)
    out = torch.zeros_like(bins)
    add_on_device(out, x.double() ** 2, folds(dtype))
    assert torch.equal(out, bins)


@pytest.mark.parametrize("of", [0, 1 << 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_alone_add_what_they_add_beside_much_larger_ones(dtype, of):
    """A square counts from half a unit of the lowest bin that counts, whatever its own chunk's highest bin is."""
    for seed in range(12):
        for spread in (2, 5, 8, 15, 60):
            x = wild(seed, 40, dtype, spread)
            whole = norm_of(square_bins(x), folds(dtype))
            for size in (1, 7):
                assert norm_of(sum(square_bins(part, of=of) for part in x.split(size)), folds(dtype)) == whole


@pytest.mark.parametrize("order", range(-3, 36))
def test_half_a_unit_is_rounded_to_even_on_either_side_of_a_bin(order):
    """Squares at, just below and just above 2**order, added to one that makes their last bin count."""
    x = 2.0 ** (order / 2) * torch.tensor([1 - 2**-20, 1.0, 1 + 2**-20], dtype=torch.float64)
    for value in [*x.unbind(), torch.tensor(2.0 ** (order // 2), dtype=torch.float64)]:
        for large in (2.0**16, 2.0**20, 2.0**32, 2.0**33):
            pair = torch.tensor([large, value]).float()
            assert norm_of(square_bins(pair)) == norm_of(square_bins(pair[:1]) + square_bins(pair[1:]))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_counted_and_spoils_no_bin(bad):
    x = torch.ones(100)
    x[17] = bad
    assert square_bins(x)[0] == 1 and square_bins(torch.ones(100))[0] == 0
    many = torch.ones(3 * CHUNK)
    many[[0, CHUNK + 1]] = bad
    assert square_bins(many)[0] == 2 and square_bins(many)[1:].sum() == square_bins(torch.ones(CHUNK))[1:].sum()


@pytest.mark.parametrize("x", [torch.zeros(0), torch.zeros(5), torch.zeros(3, 0)])
def test_nothing_has_no_norm(x):
    assert norm_of(square_bins(x)) == 0 and square_bins(x).sum() == 0


@pytest.mark.parametrize("value", [1e-38, 2**-149, 3e38, 1.0, 1e-20])
def test_the_whole_range_of_fp32_counts(value):
    x = torch.full((10,), value)
    assert norm_of(square_bins(x)).item() == pytest.approx(float(x[0].double()) * 10**0.5, rel=2**-32)


def test_float64_beyond_the_bins_is_zero_or_an_overflow():
    assert norm_of(square_bins(torch.tensor([2.0 ** (LOW // 2 - 40)], dtype=torch.float64)), 3) == 0
    assert square_bins(torch.tensor([2.0 ** ((LOW + WIDTH * BINS) // 2)], dtype=torch.float64))[0] == 1


def test_a_million_values_are_as_exact_as_ten():
    """Where a plain float32 norm is off by parts in a million."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1_000_003, generator=g) * torch.logspace(-4, 4, 1_000_003)
    assert norm_of(square_bins(x)).item() == pytest.approx(math.sqrt(math.fsum((x.double() ** 2).tolist())), rel=2**-33)


def test_tiny_squares_under_a_large_one_are_lost_alike_everywhere():
    """Below 2**-33 of the largest square a value no longer counts, wherever it lies."""
    x = torch.cat([torch.tensor([2.0**33]), torch.full((1000,), 2.0**-33)])
    alone = square_bins(x[:1]) + square_bins(x[1:])
    assert norm_of(alone) == norm_of(square_bins(x)) == 2.0**33
