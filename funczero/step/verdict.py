"""Who did something else, found out from what all ranks publish on doubt, in one sentence that all of them print.

Law: a rank ends only by what it has seen for itself. A sentence that somebody wrote into the store is text, and no
proof.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from typing import Any

from funczero.step.signs import Sign, Signs
from funczero.world.difference import ranks_in_words, sentence
from funczero.world.entries import Entry, Log
from funczero.world.plain import plain, unpack

ANSWERS = 1 << 26  # bytes that another rank may publish at most


class Verdict:
    """The doubt of one world, what was published on it, and the sentence that came of it."""

    def __init__(self, store: Any, signs: Signs, log: Log, period: float) -> None:
        """period: seconds between two looks."""
        self.store, self.signs, self.log, self.period = store, signs, log, period
        self.texts: dict[int, str] = {}  # chains and leaves by checksum
        self.doubt, self.published = 0.0, -1  # since when; at how many launches
        self.proven = False  # did this rank find out by itself?
        self.claimed, self.answered = 0.0, False  # when a sentence was first read; was it said that it is not followed?

    def raise_doubt(self) -> None:
        """All ranks are asked for their last entries."""
        self.doubt = time.monotonic()
        self.store.set("doubt", "")

    @property
    def doubted(self) -> bool:
        """Has any rank asked?"""
        return bool(self.doubt or self.store.check(["doubt"]))

    def ended(self, sign: Sign, fails: int) -> bool:
        """Will this rank launch nothing more, though we do? One that raised, as we did, may go on as we do.

        Args:
          fails: calls that raised here.
        """
        return bool(sign.gone) and (json.loads(sign.gone)[1] == "left" or sign.failed > fails)

    def judge(self, count: int, gone: str, fails: int) -> None:
        """On doubt: publish the last entries, and once all are there write the sentence that all ranks print.

        Args:
          count: launches of this rank.
          gone: why it launches nothing more, if so.
        """
        self.doubt = self.doubt or time.monotonic()
        if self.published != count or gone:
            self.publish(count)
        tails, last = self._evidence(fails)
        numbers = sorted({n for tail in tails.values() for n in tail} | {n for n, _ in last.values()})
        for n in numbers:
            found = {r: tail[n] for r, tail in tails.items() if n in tail}
            entries = {r: Entry.read(entry) for r, (_, entry) in found.items()}
            entries |= {r: e for r, (m, e) in last.items() if m == n}
            if len({total for total, _ in found.values()}) > 1 or found and len(entries) > len(found):
                # Others are about to be there, and have a vote.
                if len(entries) == self.signs.size or time.monotonic() - self.doubt >= 2 * self.period:
                    self.give(sentence(dict(sorted(entries.items())), self.text))
                return

    def _evidence(self, fails: int) -> tuple[dict[int, dict[int, Any]], dict[int, tuple[int, Entry]]]:
        """By rank: its last entries by number, (checksum, entry); and the number and entry with which it ended."""
        tails: dict[int, dict[int, Any]] = {}
        last: dict[int, tuple[int, Entry]] = {}
        for r in range(self.signs.size):
            if self.store.check([f"tail/{r}"]):
                tails[r] = {n: (total, entry) for n, total, entry in unpack(self.store.get(f"tail/{r}"), ANSWERS)}
            sign = self.signs.read(r)
            if r == self.signs.rank and sign.gone or self.ended(sign, fails):
                last[r] = sign.launches + 1, Entry.read(json.loads(sign.gone))
        return tails, last

    def publish(self, count: int) -> None:
        """The last entries, and the chains they name."""
        tail = list(self.log.entries)
        for spec in {entry.context.spec for *_, entry in tail} & set(self.texts):
            self.store.set(f"text/{spec}", zlib.compress(json.dumps(self.texts[spec]).encode()))
        self.store.set(f"tail/{self.signs.rank}", zlib.compress(json.dumps(tail).encode()))
        self.published = count

    def text(self, spec: int) -> str | None:
        """A chain and its leaves by checksum."""
        return unpack(self.store.get(f"text/{spec}"), ANSWERS) if self.store.check([f"text/{spec}"]) else None

    def give(self, text: str) -> None:
        """What all ranks print, now that this one has found out by itself; the first one counts."""
        self.proven = True
        self.store.compare_set("verdict", "", text)

    def read(self) -> str:
        """What somebody wrote for all ranks to print; "" while nobody did."""
        return plain(self.store.get("verdict").decode(errors="replace")) if self.store.check(["verdict"]) else ""

    def hear(self, text: str, waits: bool, dead: float) -> bool:
        """Does a sentence end this rank? Only once it sees the same: other launches, or a rank without a sign of life.

        Args:
          waits: does this rank wait for others, or did a connection break?
          dead: seconds without a sign of life.
        """
        self.claimed = self.claimed or time.monotonic()
        if self.proven or waits and self.signs.silent(dead):
            return True
        if time.monotonic() - self.claimed > 2 * dead and not self.answered:
            self.answered = True
            why = "but no rank is silent and none launched anything else"
            line = f"funczero: rank {self.signs.rank} goes on: the world's store says {text!r}, {why}"
            print(line, file=sys.stderr, flush=True)
        return False

    def bury(self, rank_does: str, dead: float) -> str:
        """A connection broke, and somebody gives no sign of life: that is a proof. The sentence, or "" while all are
        alive.
        """
        silent = self.signs.silent(dead)
        if not silent:
            return ""
        last = self.signs.seen[silent[0]][0].last
        self.give(
            f"{ranks_in_words(silent)} died: a connection to it broke and it gave no sign of life for {dead:g} s; "
            f"it last {last}, while rank {self.signs.rank} {rank_does}; look for what ended it (its own output, "
            "the kernel's out-of-memory killer), and start all ranks again"
        )
        return self.read()
