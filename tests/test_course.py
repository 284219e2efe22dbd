"""Which blocks of a forward travel together, and what a backward gathers with each."""

from __future__ import annotations

import pytest
import torch

from funczero.gradients.course import Course
from funczero.layout.structure import Unit

LENGTHS = [10, 4, 4, 4, 4, 9, 4, 4]  # elements of a unit
GRAD = torch.zeros((), requires_grad=True)


def units(*lists):
    """Of all units: those of one list share a home, the others have one each."""
    homes = {u: k for k, units in enumerate(lists) for u in units}
    names = [f"list{homes[u]}/{u}" if u in homes else f"alone{u}/0" for u in range(len(LENGTHS))]
    return [Unit(name, True, False) for name in names]


def forward(memo, blocks, limit, lists, reads=None):
    """One forward through (units, the units of the next block of its list): its visits."""
    course, visits = Course(memo, units(*lists), LENGTHS, limit), []
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


ORDERS = {  # the blocks of a forward, the limit, the lists, and the stretches that the second forward knows
    "neighbours up to the limit": (in_turn(1, 2, 3, 4), 8, [(1, 2, 3, 4)], [(1, 2), (3, 4)]),
    "a large one alone": (in_turn(3, 4, 5, 6, 7), 8, [(3, 4, 5, 6, 7)], [(3, 4), (5,), (6, 7)]),
    "each by itself": (in_turn(1, 2, 3), 0, [(1, 2, 3)], [(1,), (2,), (3,)]),
    "two lists do not mix": ([*in_turn(1, 2), *in_turn(3, 4)], 100, [(1, 2), (3, 4)], [(1, 2), (3, 4)]),
    "one list in two calls": ([*in_turn(1, 2), *in_turn(3, 4)], 100, [(1, 2, 3, 4)], [(1, 2), (3, 4)]),
    "a unit that is used twice": (in_turn(1, 2, 1, 3), 100, [(1, 2, 3)], [(1,), (2,), (1,), (3,)]),
    "some of a list": (in_turn(1, 2), 100, [(1, 2, 3)], [(1,), (2,)]),
    "another list is whole": ([*in_turn(1, 2), *in_turn(4, 6)], 100, [(1, 2, 3), (4, 6)], [(1,), (2,), (4, 6)]),
    "in another order": (in_turn(4, 3, 2, 1), 8, [(1, 2, 3, 4)], [(4,), (3,), (2,), (1,)]),
    "opened by hand": ([((1,), ()), ((2,), ())], 100, [(1, 2)], [(1,), (2,)]),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_second_forward_knows_what_travels_together(name):
    blocks, limit, lists, want = ORDERS[name]
    memo = {}
    first = forward(memo, blocks, limit, lists)
    assert [v.stretch for v in first] == [group for group, _ in blocks]  # nothing is guessed
    second = forward(memo, blocks, limit, lists)
    begins = [v for i, v in enumerate(second) if i == 0 or v.end != second[i - 1].end]
    assert [v.stretch for v in begins] == want
    assert all(set(v.group) <= set(v.stretch) for v in second)


def test_a_block_of_two_units_travels_whole():
    memo, names = {}, ["", "a/0", "a/0", "a/1", "a/2", "", "", ""]
    blocks = [((1, 2), (3,)), ((3,), (4,)), ((4,), ())]
    for _ in range(2):
        course = Course(memo, [Unit(name, bool(name), False) for name in names], LENGTHS, 12)
        visits = [course.enter(*block) for block in blocks]
        course.close()
    assert [v.stretch for v in visits] == [(1, 2, 3), (3,), (4,)]


def test_a_backward_gathers_the_stretch_that_its_block_ends():
    memo, blocks, lists = {}, in_turn(1, 2, 3, 4), [(1, 2, 3, 4)]
    forward(memo, blocks, 8, lists)
    a, b, c, d = forward(memo, blocks, 8, lists)
    assert d.backwards() == ((4, 3), b) and c.backwards() == ((3,), b)
    assert b.backwards() == ((2, 1), None) and a.backwards() == ((1,), None)
    a, b, c, d = forward(memo, blocks, 8, lists, reads=[(2,), (4,)])
    assert d.backwards() == ((4,), b) and b.backwards() == ((2,), None)


def test_where_a_forward_goes_another_way_nothing_is_guessed():
    memo, lists = {}, [(1, 2, 3, 4)]
    forward(memo, in_turn(1, 2, 3, 4), 8, lists)
    other = forward(memo, in_turn(2, 1, 3, 4), 8, lists)
    assert [v.stretch for v in other] == [(2,), (1,), (3, 4), (4,)]
    assert [v.stretch for v in forward(memo, in_turn(2, 1, 3, 4), 8, lists)][0] == (2,)
    assert forward({}, in_turn(1, 2), 8, [(1, 2)])[1].backwards()[0] == (2,)


def test_after_a_stretch_comes_the_next_one_of_the_list():
    memo, blocks, lists = {}, [*in_turn(1, 2, 3), *in_turn(4, 6)], [(1, 2, 3), (4, 6)]
    forward(memo, blocks, 8, lists)
    assert [v.after for v in forward(memo, blocks, 8, lists)] == [(3,), (3,), (), (), ()]
