"""Divergence is told, not hung on: a thread compares what ranks launched where no sum is reached any more.

Law: a run is ended only by proof. Two ranks' launches differ (another verb, axis, unit, dtype, size, call, step, chain
or state), or one rank left, or raised and did not go on, or died, where the other launched. A slow rank is only behind,
and behind is no proof: after NOTICE seconds it is named, and the run goes on.

The main thread chains a checksum over its launches (ledger.py). Twice a second a daemon thread publishes (count,
checksum) in a namespace of the world's store and reads those of its neighbours: whoever is odd is odd to a neighbour.
Only on doubt all publish their last entries; the first to see the difference writes what all print (verdict.py).
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from funczero.step.abort import SlowAbort
from funczero.step.signs import Sign, Signs, farewell
from funczero.step.verdict import Verdict
from funczero.world import ending, presence
from funczero.world.entries import Log
from funczero.world.ledger import DivergenceError

PERIOD = 0.5  # seconds between two looks; more in large worlds
LINGER = 2.0  # seconds that a rank which ends stays, so that the others can compare and hear
PATIENCE = 5.5  # seconds after which an exception that did not end the process says that a rank will not go on
NOTICE = 10.0  # seconds after which a rank that is awaited, or gives no sign of life, is named
DEAD = 3.0  # seconds without a sign of life that, with a broken connection, prove a rank's end
FEW = 32  # ranks up to which each looks at all others, and not at its neighbours alone
BROKEN = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Socket Timeout")  # gloo's words


class Watch(threading.Thread):
    """The thread that compares this process's log with its neighbours'; one for all steps of a world."""

    def __init__(self) -> None:
        """Opens its own connection to the store, and a namespace for this world; starts to look."""
        super().__init__(name="funczero-check", daemon=True)
        self.world, self.rank, self.size, self.pid = (
            dist.group.WORLD,
            dist.get_rank(),
            dist.get_world_size(),
            os.getpid(),
        )
        self.anchor: Any = dist.distributed_c10d._get_default_store()  # keeps rank 0's server up while others ask
        clone = presence.connection(self.anchor)  # the main thread may be waiting on the connection of the original
        number = clone.add(f"funczero/check/{self.rank}", 1)
        self.store: Any = dist.PrefixStore(f"funczero/check/{number}", clone)
        self.lent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # else the store goes with rank 0
        self.log, self.gone, self.beat, self.count = Log(), "", 0, 0
        self.signs = Signs(self.store, self.rank, self.size)
        self.verdict = Verdict(self.store, self.signs, self.log, PERIOD)
        self.told = self.lost = ""  # what all print; that the store is gone
        self.inside, self.caller, self.settled = False, 0, False
        self.raised: tuple[float, str] | None = None  # when, in words
        self.fails = 0  # calls that raised
        self.broken = 0.0  # when a connection broke
        self.moved = time.monotonic()  # when the last launch was seen
        self.named: dict[int, int] = {}  # ranks that were named as late or silent, and at which count
        self.leaving = threading.Event()
        self.aborting = SlowAbort(2 * LINGER + 4 * PERIOD, lambda: bool(self.told) and self.is_alive())
        atexit.register(self.leave)
        self.start()

    # --- the main thread
    def enter(self) -> None:
        """A call begins."""
        self.inside, self.raised, self.caller = True, None, threading.get_ident()

    def failed(self, error: BaseException, words: str) -> None:
        """A call raised. Where a connection broke, the sentence of all ranks is raised instead of gloo's."""
        self.raised, self.fails = (time.monotonic(), words), self.fails + 1
        broke = isinstance(error, RuntimeError) and any(x in str(error) for x in BROKEN)
        if broke and not self.leaving.is_set():
            self.broken, until = time.monotonic(), time.monotonic() + LINGER + DEAD + 4 * PERIOD
            while self.is_alive() and not (self.told or self.lost) and time.monotonic() < until:
                time.sleep(PERIOD / 10)
            if self.told or self.lost:
                self.settled = True
                raise DivergenceError(self.told or self.lost) from error
        if not self.is_alive() and not self.settled:
            error.add_note("funczero: rank 0 has left the world; every rank must make as many calls")

    def leave(self) -> None:
        """At exit: compare the last entries, then let go."""
        if os.getpid() != self.pid:
            return
        if self.is_alive():
            self.leaving.set()
            limit = 4 * LINGER + 2 * PATIENCE
            self.join(limit)
            if self.is_alive():  # in the store's client, which aborts the interpreter when it comes back after the end
                what = f"could not take leave of the world's store within {limit:g} s"
                print(f"funczero: rank {self.rank} {what}", file=sys.stderr)
                end_now()
        self.aborting.undo()
        if (self.told or self.lost or self.settled) and hasattr(sys, "last_value"):
            # The world is broken: taking gloo's groups down now may abort, and hide the error.
            ending.finish()  # a save under way comes to its end
            end_now()

    # --- the thread
    def run(self) -> None:
        """Look twice a second, until this rank leaves or is told, or rank 0 takes the store along."""
        closing = False
        pause = max(PERIOD, self.size / 256)
        try:
            while not (self.told or closing or self.leaving.wait(pause)) and self._in_its_world():
                closing = not self.lent and self.rank > 0 and self.store.check(["closing"])
                self.look()
            if not (self.told or closing):
                self.part()
            until, heard = time.monotonic() + LINGER, self.store.add("heard", 1)
            if self.rank == 0:
                self.store.set("closing", "")
            while self.rank == 0 and heard < self.size and time.monotonic() < until:
                time.sleep(PERIOD / 10)
                heard = self.store.add("heard", 0)
        except RuntimeError:  # the store is gone: there is nobody to ask
            self.orphaned()
        if self.told and not self.settled:
            self.end()
        self.store = self.anchor = self.signs.store = self.verdict.store = None

    def _in_its_world(self) -> bool:
        return dist.is_initialized() and dist.group.WORLD is self.world

    def look(self) -> None:
        """Publish what is new, and compare with the neighbours."""
        raised, last = self.raised, self.log.entries[-1] if self.log.entries else (0, 0, None)
        if last[0] != self.count:
            self.count, self.moved = last[0], time.monotonic()
        if not self.leaving.is_set():  # a rank that raised may go on after all
            late = raised and time.monotonic() - max(raised[0], self.moved) > PATIENCE and not self.settled
            self.gone = farewell("raised", raised[1]) if raised and late else ""
        self.beat += 1
        words = str(last[2] or "launched nothing")
        sign = Sign(last[0], last[1], self.inside, self.beat, self.gone, words, self.fails)
        self.signs.publish(sign)
        late = self.inside and time.monotonic() - self.moved > min(NOTICE, DEAD)
        everybody = late or self.broken or self.verdict.claimed or self.size <= FEW
        for peer in range(self.size) if everybody else {(self.rank - 1) % self.size, (self.rank + 1) % self.size}:
            if peer != self.rank:
                self.compare(sign, self.signs.read(peer))
        self.listen()
        if late:
            self.notice(sign)
        if self.broken and time.monotonic() - self.broken > DEAD and not self.told:
            self.told = self.verdict.bury(words, DEAD)

    def compare(self, sign: Sign, other: Sign) -> None:
        """Raise the doubt where a peer's launches are not ours, or where it is gone and we go on."""
        differs = 0 < other.launches <= sign.launches and self.log.sum_at(other.launches) not in (None, other.sum)
        left = self.verdict.ended(other, self.fails) and other.launches < sign.launches
        if (differs or left) and not self.verdict.doubt and not self.settled:
            self.verdict.raise_doubt()

    def listen(self) -> None:
        """Judge where anybody is in doubt, and follow a verdict that this rank can confirm."""
        if not self.settled and self.verdict.doubted:
            self.verdict.judge(self.count, self.gone, self.fails)
        if self.told or not (text := self.verdict.read()):
            return
        waits = bool(self.broken) or self.inside and time.monotonic() - self.moved > DEAD
        if self.settled or self.verdict.hear(text, waits, DEAD):
            self.told = text

    def notice(self, sign: Sign) -> None:
        """Name, once a launch, who is awaited or silent for long: no proof, so the run goes on."""
        now = time.monotonic()
        for r, (other, since) in self.signs.seen.items():
            silent, behind = now - since >= NOTICE, other.launches < sign.launches and now - self.moved >= NOTICE
            if r == self.rank or other.gone or not (silent or behind) or self.named.get(r) == sign.launches:
                continue
            self.named[r] = sign.launches
            where = f"which is alive in {'a call' if other.inside else 'no call'}"
            if silent:
                why = "stopped, starved, or its machine is gone"
                where = f"which gives no sign of life for {now - since:.0f} s ({why})"
            waited = f"has waited {now - self.moved:.0f} s for rank {r}, {where}; it last {other.last}"
            print(f"funczero: rank {self.rank} {sign.last} and {waited}", file=sys.stderr, flush=True)

    def part(self) -> None:
        """This rank launches nothing more: its last sign says so, and is compared with what the others do."""
        error, until = getattr(sys, "last_value", None), time.monotonic() + LINGER
        why = f"with {self.raised[1]}" if self.raised else f"with {in_words(error)}" if error else self.after()
        self.gone, self.raised = farewell("left", why), None
        self.verdict.publish(self.count)
        self.look()
        self.store.add("left", 1)
        while not self.told and time.monotonic() < until:
            until = 0.0 if self.store.add("left", 0) == self.size else until  # all left: one last look
            self.look()
            time.sleep(PERIOD / 10)

    def after(self) -> str:
        """After which step a rank left."""
        return f"after step {self.log.entries[-1][2].context.step}" if self.log.entries else "after nothing"

    def orphaned(self) -> None:
        """The store does not answer: rank 0 is gone, and took it along. Said where this rank still waits for
        something.
        """
        while not self.lent and self.rank and not self.leaving.wait(PERIOD / 2):
            if self.log.count != self.count:
                self.count, self.moved = self.log.count, time.monotonic()
            if self.broken or self.inside and time.monotonic() - self.moved > NOTICE - DEAD:
                last = str(self.log.entries[-1][2]) if self.log.entries else "launched nothing"
                self.lost = (
                    f"rank 0 died or left, and the world's store with it, while rank {self.rank} {last}; "
                    "every rank must make as many calls, and an error on one rank ends all"
                )
                self.told = "" if self.broken else self.lost
                return

    def end(self) -> None:
        """Say it once, with the line of the caller's code, and end the process: no exception reaches a thread in a
        wait.
        """
        # An exception on its way out is shown first; others hear before a connection breaks.
        raised = self.raised
        on_its_way = raised[0] + PATIENCE - time.monotonic() if raised else 0.0
        self.leaving.wait(max(on_its_way, 2 * PERIOD))
        if self.settled:  # the main thread says it
            return
        where = "" if self.leaving.is_set() else place_of(self.caller)
        print(f"funczero: {self.told}{where}", file=sys.stderr, flush=True)
        if not (self.leaving.is_set() and hasattr(sys, "last_value")):  # else it ends by itself, with an error
            ending.finish()  # a save under way comes to its end
            end_now()


def in_words(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def end_now() -> None:
    """End the process with an error, without what Python does at its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def place_of(thread: int) -> str:
    """Where a thread is in the caller's own code."""
    frame, ours = sys._current_frames().get(thread), (str(Path(__file__).parents[1]), os.path.dirname(torch.__file__))
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    return "" if frame is None else f" (this rank is at {frame.f_code.co_filename}:{frame.f_lineno})"
