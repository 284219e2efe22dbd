"""Which blocks of a forward travel together, and what a backward gathers with each."""

from __future__ import annotations

import pytest
import torch

from funczero.gradients.course import Course

LENGTHS = [10, 4, 4, 4, 4, 9, 4]  # elements of a unit
GRAD = torch.zeros((), requires_grad=True)


def forward(memo, blocks, limit, reads=None):
    """One forward through (units, the units of the next block of its list): its visits."""
    course, visits = Course(memo, LENGTHS, limit), []
    for group, guess in blocks:
        visit = course.enter(group, guess)
        visit.reads = reads is None or group in reads
        course.ran(visit, GRAD)
        visits.append(visit)
    course.close()
    return visits


def in_turn(*units):
    """One list of blocks."""
    return [((u,), units[i + 1 : i + 2]) for i, u in enumerate(units)]


ORDERS = {  # the blocks of a forward, the limit, and the stretches that the second one knows
    "neighbours up to the limit": (in_turn(1, 2, 3, 4), 8, [(1, 2), (3, 4)]),
    "a large one alone": (in_turn(1, 2, 5, 3, 4), 8, [(1, 2), (5,), (3, 4)]),
    "each by itself": (in_turn(1, 2, 3), 0, [(1,), (2,), (3,)]),
    "two lists do not mix": ([*in_turn(1, 2), *in_turn(3, 4)], 100, [(1, 2), (3, 4)]),
    "a unit that is used twice": (in_turn(1, 2, 1, 3), 100, [(1, 2), (1, 3)]),
    "a block of two units": ([((1, 2), (3,)), ((3,), (4,)), ((4,), ())], 12, [(1, 2, 3), (4,)]),
    "backwards": (in_turn(4, 3, 2, 1), 8, [(4, 3), (2, 1)]),
    "opened by hand": ([((1,), ()), ((2,), ())], 100, [(1,), (2,)]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_second_forward_knows_what_travels_together(name):
    blocks, limit, want = ORDERS[name]
    memo = {}
    first = forward(memo, blocks, limit)
    assert [v.stretch for v in first] == [group for group, _ in blocks]  # nothing is guessed
    second = forward(memo, blocks, limit)
    begins = [v for i, v in enumerate(second) if i == 0 or v.end != second[i - 1].end]
    assert [v.stretch for v in begins] == want
    assert all(set(v.group) <= set(v.stretch) for v in second)


def test_a_backward_gathers_the_stretch_that_its_block_ends():
    memo, blocks = {}, in_turn(1, 2, 3, 4)
    forward(memo, blocks, 8)
    a, b, c, d = forward(memo, blocks, 8)
    assert d.backwards() == ((4, 3), b) and c.backwards() == ((3,), b)
    assert b.backwards() == ((2, 1), None) and a.backwards() == ((1,), None)
    a, b, c, d = forward(memo, blocks, 8, reads=[(2,), (4,)])
    assert d.backwards() == ((4,), b) and b.backwards() == ((2,), None)


def test_where_a_forward_goes_another_way_nothing_is_guessed():
    memo = {}
    forward(memo, in_turn(1, 2, 3, 4), 8)
    other = forward(memo, in_turn(2, 1, 3, 4), 8)
    assert [v.stretch for v in other] == [(2,), (1,), (3, 4), (4,)]
    assert [v.stretch for v in forward(memo, in_turn(2, 1, 3, 4), 8)][0] == (2, 1)
    assert forward({}, in_turn(1, 2), 8)[1].backwards()[0] == (2,)


def test_after_a_stretch_comes_the_next_one_of_the_list():
    memo, blocks = {}, [*in_turn(1, 2, 3), *in_turn(4, 6)]
    forward(memo, blocks, 8)
    assert [v.after for v in forward(memo, blocks, 8)] == [(3,), (3,), (), (), ()]
