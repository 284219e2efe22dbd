"""The order of sums: every micro-batch once, the same tree over time and over ranks."""

from __future__ import annotations

from math import prod

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from funczero.core import order
from funczero.core.types import Layout

ORDERS = st.lists(st.tuples(st.sampled_from(["accumulate", "node", "local"]), st.integers(1, 4)), max_size=5).filter(
    lambda o: all(sum(n == a for n, _ in o) <= 1 for a in ("node", "local"))
)


def ranks(axes):
    """Every rank's coordinates."""
    out = [{}]
    for a, n in axes.items():
        out = [r | {a: i} for r in out for i in range(n)]
    return out


@given(ORDERS)
def test_every_micro_batch_is_dealt_once(steps):
    layout = Layout(order=tuple(steps))
    axes = {a: n for a, n in steps if a != "accumulate"}
    mine = [order.indices(layout, at.get) for at in ranks(axes)]
    assert sorted(i for m in mine for i in m) == list(range(layout.stride))
    assert {len(m) for m in mine} == {prod(n for a, n in steps if a == "accumulate")}


@given(ORDERS)
def test_rows_are_dealt_by_index(steps):
    layout = Layout(order=tuple(steps))
    batch = {"x": torch.arange(2 * layout.stride)}
    for at in ranks({a: n for a, n in steps if a != "accumulate"}):
        want = [2 * i + j for i in order.indices(layout, at.get) for j in (0, 1)]
        assert order.deal(batch, layout, at.get)["x"].tolist() == want


@pytest.mark.parametrize(
    ("steps", "rank", "want"),
    [
        ((("accumulate", 4), ("data", 2)), 1, [4, 5, 6, 7]),  # ZeRO-1: r * k + j
        ((("data", 2), ("accumulate", 4)), 1, [1, 3, 5, 7]),  # ZeRO-3: j * W + r
        ((("accumulate", 2), ("data", 2), ("accumulate", 2)), 1, [2, 3, 6, 7]),
    ],
)
def test_the_first_sum_is_the_fastest_digit(steps, rank, want):
    assert order.indices(Layout(order=steps), {"data": rank}.get) == want


def values(n):
    return torch.randn(n, 7, generator=torch.Generator().manual_seed(n)) * torch.logspace(-6, 6, n)[:, None]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 31, 32])
def test_a_counter_over_time_is_the_tree_over_ranks(n):
    """Bitwise in float32, for powers of two; for other numbers each is its own fixed order."""
    xs, counter = list(values(n)), ()
    for j, x in enumerate(xs):
        counter = order.push(counter, j, x, torch.add)
        assert len(counter) == (j + 1).bit_count()
    assert torch.equal(order.close(counter, torch.add), order.tree_sum(values(n))) or n & (n - 1)
    torch.testing.assert_close(
        order.close(counter, torch.add).double(), values(n).double().sum(0), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(("k", "w"), [(4, 2), (2, 4), (8, 2), (2, 2)])
def test_a_tree_of_trees_is_the_tree(k, w):
    """k in time, then w over ranks, and the other way round: the bits of k * w at once, when the rows are dealt by
    index.
    """
    xs = values(k * w)
    time_first = order.tree_sum(torch.stack([order.tree_sum(xs[r * k : (r + 1) * k]) for r in range(w)]))
    ranks_first = order.tree_sum(torch.stack([order.tree_sum(xs[j * w : (j + 1) * w]) for j in range(k)]))
    assert torch.equal(time_first, order.tree_sum(xs)) and torch.equal(ranks_first, order.tree_sum(xs))


def test_another_order_gives_other_bits():
    """The negative control of the tests above."""
    xs = values(8)
    assert not torch.equal(order.tree_sum(xs), order.tree_sum(xs[[0, 2, 4, 6, 1, 3, 5, 7]]))


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 12, 20, 64, 100])
def test_many_parts_are_added_in_the_tree_of_a_list_of_them(n):
    parts = torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) * 10.0 ** torch.arange(-2, 3)
    assert torch.equal(order.tree_sum(parts), order.tree_sum(list(parts)))
