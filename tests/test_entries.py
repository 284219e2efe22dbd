"""The log of launches: its last entries, and checksums that reach further back."""

from __future__ import annotations

import pytest

from funczero.world.entries import Context, Entry, Log


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
