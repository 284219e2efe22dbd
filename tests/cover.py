"""Which rows of a table stand for all of them: those that hold every value, and every two values that stand together
in any row, of all columns or of those that matter together.

What goes wrong for one value, or for two together, is found by such a cover. It is what `make test` asks; the whole
table waits for `make test-all`.
"""

from __future__ import annotations

from itertools import combinations

import pytest

# Of a test that goes through a table by itself: `rows if whole else cover(rows)`.
EACH = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["cover", "whole"])


def cover(rows, by=2, pairs=None):
    """Rows that hold every `by` values that stand together in any row, in the table's order: the one that has most of
    what is missing is taken first, then the next.

    Args:
      pairs: of columns, whose values are to be met together; of all others every value alone. In place of `by`.

    >>> cover([(x, y, z) for x in "ab" for y in "cd" for z in "ef"])
    [('a', 'c', 'e'), ('a', 'd', 'f'), ('b', 'c', 'f'), ('b', 'd', 'e')]
    >>> cover([(x, y, z) for x in "ab" for y in "cd" for z in "ef"], pairs=[(0, 2)])
    [('a', 'c', 'e'), ('a', 'c', 'f'), ('b', 'c', 'e'), ('b', 'd', 'f')]
    """
    rows = list(rows)
    if pairs is None:
        held = [set(combinations(enumerate(row), by)) for row in rows]
    else:
        held = [{*enumerate(row), *(tuple((i, row[i]) for i in pair) for pair in pairs)} for row in rows]
    left, taken = set().union(*held), []
    while left:
        best = max(range(len(rows)), key=lambda i: (len(held[i] & left), -i))
        taken.append(best)
        left -= held[best]
    return [rows[i] for i in sorted(taken)]


def params(rows, by=2, ids=None, pairs=None):
    """A parametrization by these rows, of which those outside the cover are slow.

    Args:
      ids: row -> its name; without it the values with dashes between them.
    """
    rows = list(rows)
    few = cover(rows, by, pairs)
    name = ids or (lambda row: "-".join(map(str, row)))
    return [pytest.param(*row, marks=() if row in few else pytest.mark.slow, id=name(row)) for row in rows]


def places(one, names, whole, worlds=(1, 2)):
    """(world, stage) at which this one of many is tried: all, or on every world some, such that all of them together
    are tried everywhere.

    >>> places("a", "abcdef", whole=False), places("e", "abcdef", whole=False)
    ([(1, 0), (2, 3)], [(1, 0), (2, 3)])
    >>> places("a", "ab", whole=False), places("b", "ab", whole=False)
    ([(1, 0), (1, 2), (2, 3), (2, 1)], [(1, 1), (1, 3), (2, 2), (2, 0)])
    """
    i, n = list(names).index(one), min(len(names), 4)
    turn = [stage for stage in range(4) if whole or stage % n == i % n]
    return [(world, stage if world % 2 else 3 - stage) for world in worlds for stage in turn]


def ways(one, names, forms, whole, apart=()):
    """By world the stages and forms in which one of these losses is tried: all, or a cover of those of all losses, of
    which every two things are met together. What is refused of "penalty", and what to write instead, are always among
    them.

    Args:
      names: of all losses.
      apart: of these, losses whose ranks gather different units, which at stage 3 is told: another law's.
    """
    rows = [
        (name, stage, form, world)
        for name in names
        for stage in range(4)
        for form in forms
        for world in (1, 2)
        if not (name in apart and world == 2 and stage == 3)
    ]
    some = rows if whole else cover(rows) + [("penalty", 3, "remat", 2), ("penalty", 3, "keep", 2)]
    return {w: sorted({(stage, form) for name, stage, form, at in some if (name, at) == (one, w)}) for w in (1, 2)}
