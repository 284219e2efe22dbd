"""Who did something else, out of what all publish on doubt; and what ends a rank that is told so: its own proof."""

from __future__ import annotations

import re

import pytest
import torch.distributed as dist

from funczero.step.signs import Sign, Signs, farewell
from funczero.step.verdict import Verdict
from funczero.world.entries import TAIL, UPDATE, Context, Entry, Log

SIZE = 3
CONTEXT = Context(UPDATE, 3, spec=11)
GATHER = Entry(CONTEXT, "all_gather", "data", "float32", 64)
NEVER, AT_ONCE = 3600.0, -1.0  # seconds


class Rank:
    """One rank of a world, over one store: its log, its signs and its verdict."""

    def __init__(self, store, rank, period=NEVER):
        self.log, self.signs = Log(sums=4 * TAIL), Signs(store, rank, SIZE)
        self.verdict = Verdict(store, self.signs, self.log, period)
        self.gone = ""

    def launches(self, *entries):
        for e in entries:
            self.log.append(e, hash(e.compared[1:] + (len(str(e.compared[0])),)))
        return self

    def leaves(self, verb, why):
        self.gone = farewell(verb, why)
        return self

    def publish(self, **kw):
        last = self.log.entries[-1] if self.log.entries else (0, 0, None)
        own = dict(launches=last[0], sum=last[1], beat=1, gone=self.gone, last=str(last[2] or "launched nothing"))
        self.signs.publish(Sign(**(own | kw)))

    def judge(self, fails=0):
        self.verdict.judge(self.log.count, self.gone, fails)


def world(period=NEVER):
    store = dist.HashStore()
    return [Rank(store, r, period) for r in range(SIZE)]


def judged(ranks):
    """All publish and judge, in turn, until a sentence is there; it, and who found out by itself."""
    for r in ranks:
        r.publish()
    for r in (*ranks, *ranks):  # those of whom the first one waits have published then
        r.judge()
    return ranks[0].verdict.read(), [r.verdict.proven for r in ranks]


def test_the_odd_one_is_named_once_all_have_published():
    ranks = world()
    ranks[0].verdict.texts = {11: "train_step"}
    for r in ranks:
        r.launches(GATHER, GATHER)
    ranks[1].launches(GATHER._replace(nbytes=128))
    for r in (ranks[0], ranks[2]):
        r.launches(GATHER)
    for r in ranks:
        r.publish()
    for r in ranks[:2]:
        r.judge()
        assert r.verdict.read() == ""  # the third one has a vote
    text, proven = judged(ranks)
    assert text.startswith("rank 1 launched all_gather over 'data' of 128 bytes of float32 in step(state, batch)")
    assert ", while ranks 0, 2 launched all_gather over 'data' of 64 bytes" in text and any(proven)


def test_a_rank_that_does_not_answer_loses_its_vote_after_two_looks():
    ranks = world(period=AT_ONCE)
    ranks[0].launches(GATHER)
    ranks[1].launches(GATHER._replace(verb="all_reduce"))
    for r in ranks[:2]:
        assert ranks[2].verdict.read() == ""
        r.publish()
        r.judge()
    assert re.match(r"rank [01] launched .*, while rank [01] launched ", ranks[2].verdict.read())


def test_ranks_alike_have_no_sentence_however_far_they_are():
    ranks = world()
    for n, r in enumerate(ranks):
        r.launches(*[GATHER] * (n + 1))
    assert judged(ranks) == ("", [False] * SIZE)


@pytest.mark.parametrize(
    ("verb", "why", "words"),
    [
        ("left", "after step 3", "rank 2 left after step 3, while ranks 0, 1 launched all_gather .* as many calls of"),
        ("left", "with ValueError: x", "rank 2 left with ValueError: x, while .*; an error on one rank ends all"),
        ("raised", "ValueError: x in step", "rank 2 raised ValueError: x in step, while .*; an error on one rank"),
    ],
)
def test_a_rank_that_launches_nothing_more_is_odd_where_the_others_go_on(verb, why, words):
    ranks = world()
    for r in ranks:
        r.launches(GATHER)
    for r in ranks[:2]:
        r.launches(GATHER)
    ranks[2].leaves(verb, why)
    for r in ranks:
        r.publish(failed=int(verb == "raised" and r is ranks[2]))
    for r in (*ranks, *ranks):
        r.judge()
    assert re.match(words, ranks[0].verdict.read()), ranks[0].verdict.read()


ENDS = [
    ("", 0, 0, False),
    ("left", 0, 9, True),
    ("raised", 1, 0, True),
    ("raised", 1, 1, False),
    ("raised", 2, 1, True),
]


@pytest.mark.parametrize(("verb", "failed", "fails", "ended"), ENDS)
def test_one_that_raised_as_we_did_may_go_on_as_we_do(verb, failed, fails, ended):
    sign = Sign(failed=failed, gone=farewell(verb, "x") if verb else "")
    assert world()[0].verdict.ended(sign, fails) is ended


def test_what_is_published_is_the_tail_with_the_chains_that_it_names():
    ranks = world()
    ranks[0].verdict.texts = {11: "train_step\n  adamw", 12: "another"}
    ranks[0].launches(*[GATHER] * (TAIL + 7)).publish()
    ranks[0].verdict.publish(TAIL + 7)
    assert ranks[1].verdict.text(11) == "train_step\n  adamw" and ranks[1].verdict.text(12) is None
    assert ranks[0].verdict.published == TAIL + 7


def test_a_doubt_is_everybodys():
    ranks = world()
    assert not any(r.verdict.doubted for r in ranks)
    ranks[1].verdict.raise_doubt()
    assert all(r.verdict.doubted for r in ranks) and not ranks[0].verdict.doubt


# --- what a sentence does to a rank -----------------------------------------------------------------------------------
def test_a_sentence_ends_a_rank_that_found_out_by_itself_or_sees_somebody_silent_while_it_waits():
    ranks = world()
    ranks[0].verdict.give("rank 1 launched something else")
    assert all(r.verdict.read() == "rank 1 launched something else" for r in ranks)
    hear = lambda r, waits, dead: r.verdict.hear("text", waits, dead)
    assert hear(ranks[0], False, NEVER)  # its own proof
    ranks[1].publish()
    ranks[2].signs.read(1)
    assert not hear(ranks[2], False, AT_ONCE)  # rank 1 is silent, but this one waits for nobody
    assert not hear(ranks[2], True, NEVER)  # it waits, but everybody is alive
    assert hear(ranks[2], True, AT_ONCE)


def test_the_first_sentence_counts_and_is_made_fit_for_a_line():
    ranks = world()
    ranks[0].verdict.give("the first\nof two lines")
    ranks[1].verdict.give("the second")
    assert {r.verdict.read() for r in ranks} == {ranks[0].verdict.read()} and "\n" not in ranks[0].verdict.read()
    assert ranks[0].verdict.read().startswith("the first")


def test_a_text_that_nothing_supports_is_answered_once_and_not_followed(capfd):
    rank = world()[0]
    rank.publish()
    for _ in range(3):
        assert not rank.verdict.hear("all is lost", False, AT_ONCE)
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "funczero: rank 0 goes on: the world's store says 'all is lost', but no rank is silent and none launched"
        " anything else"
    ]


def test_a_broken_connection_and_silence_together_are_a_proof():
    ranks = world()
    ranks[2].launches(GATHER).publish()
    for dead, found in ((NEVER, False), (AT_ONCE, True)):
        ranks[0].signs.read(2)
        text = ranks[0].verdict.bury("launched all_reduce over 'data'", dead)
        assert bool(text) is found is ranks[0].verdict.proven
    assert text.startswith(
        "rank 2 died: a connection to it broke and it gave no sign of life for -1 s; it last launched"
    )
    assert ", while rank 0 launched all_reduce over 'data'; look for what ended it" in text
    assert text == ranks[1].verdict.read()
