"""What ranks publish of themselves, and when each was last seen to be alive."""

from __future__ import annotations

import json

import pytest
import torch.distributed as dist

from funczero.step.signs import Sign, Signs, farewell
from funczero.world.entries import Context, Entry


@pytest.fixture
def ranks():
    """Two ranks over one store."""
    store = dist.HashStore()
    return [Signs(store, r, 2) for r in range(2)]


@pytest.mark.parametrize(
    "sign",
    [Sign(), Sign(3, -(2**62), False, 9, "", "launched all_gather over 'data'", 1), Sign(gone=farewell("left", "x"))],
    ids=str,
)
def test_what_is_published_is_read(ranks, sign):
    ranks[1].publish(sign)
    assert ranks[0].read(1) == sign and ranks[0].seen[1][0] == sign


def test_a_rank_that_said_nothing_yet_has_an_empty_sign(ranks):
    assert ranks[0].read(1) == Sign() and ranks[0].seen.keys() == {1}


def test_silence_counts_from_the_last_new_beat(ranks):
    """Other words without another beat are no sign of life; a new beat is."""
    ranks[1].publish(Sign(beat=1))
    ranks[0].read(1)
    first = ranks[0].seen[1][1]
    ranks[1].publish(Sign(beat=1, launches=5))
    assert ranks[0].read(1).launches == 5 and ranks[0].seen[1][1] == first
    assert ranks[0].silent(-1.0) == [1] and ranks[0].silent(3600.0) == []
    ranks[1].publish(Sign(beat=2))
    ranks[0].read(1)
    assert ranks[0].seen[1][1] > first


def test_neither_oneself_nor_one_that_left_is_silent(ranks):
    ranks[0].publish(Sign(beat=1))
    ranks[1].publish(Sign(beat=1, gone=farewell("left", "after step 3")))
    ranks[0].read(0), ranks[0].read(1)
    assert ranks[0].silent(-1.0) == []


def test_a_farewell_is_an_entry_again():
    entry = Entry.read(json.loads(farewell("left", "with ValueError: bad sample")))
    assert entry == Entry(Context(""), "left", text="with ValueError: bad sample")
    assert str(entry) == "left with ValueError: bad sample"
