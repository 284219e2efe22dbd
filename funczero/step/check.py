"""Divergence is told, not hung on: a thread compares what ranks launched where no sum is reached any more, and says which rank is gone or silent.

Law: a run is ended only by proof. Two ranks' launches differ (another verb, axis, unit, dtype, size, call, step, chain or state), or one rank left, or raised and
did not go on, or died, where the other launched. A slow rank is only behind, and behind is no proof: after NOTICE seconds it is named, and the run goes on.

The main thread chains a checksum over its launches (ledger.py). Twice a second a daemon thread publishes (count, checksum) in a namespace of the world's store and
reads its two neighbours': whoever is odd is odd to a neighbour. Only on doubt all publish their last entries; the first to see the difference writes what all print.
"""
from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from funczero.core import tree
from funczero.core.types import Grad, Metrics, TrainState
from funczero.layout.mesh import Mesh, init_distributed, world_size
from funczero.layout.slots import Slots
from funczero.step.alike import checksum, settings
from funczero.world import ending, presence
from funczero.world.ledger import NAN, Context, DivergenceError, Entry, Ledger, Log, ranks_in_words, sentence
from funczero.world.ledger import UPDATE as UPDATE
from funczero.world.plain import plain, unpack

PERIOD = 0.5  # seconds between two looks; more in large worlds
LINGER = 2.0  # seconds that a rank which ends stays, so that the others can compare and hear
PATIENCE = 5.5  # seconds after which an exception that did not end the process says that a rank will not go on
NOTICE = 10.0  # seconds after which a rank that is awaited, or gives no sign of life, is named
DEAD = 3.0  # seconds without a sign of life that, with a broken connection, prove a rank's end
TAIL, MEMORY = 1 << 10, 1 << 14  # entries published on doubt, entries remembered
FEW = 32  # ranks up to which each looks at all others, and not at its neighbours alone
ANSWERS = 1 << 26  # bytes that another rank may publish at most
BROKEN = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Socket Timeout")  # how gloo says that a connection is no more


class Sign(NamedTuple):
    """What a rank published of itself."""

    launches: int = 0
    sum: int = 0
    inside: bool = True  # a call
    beat: int = -1  # looks so far
    gone: str = ""  # why this rank launches nothing more: its last entry, as JSON
    last: str = ""  # its last launch, in words
    failed: int = 0  # calls that raised


def recorded(name: str, fn: Callable[..., Any], running: Callable[[], Grad]) -> Callable[..., Any]:
    """fn(state, ...) as a call that all ranks must make alike."""

    def call(state: Any, *batch: Any) -> Any:
        mesh = running().env.mesh if isinstance(state, TrainState) and isinstance(state.params, Slots) else None
        return fn(state, *batch) if mesh is None or mesh.ledger.ranks == 1 else _told(mesh.ledger, name, fn, state, *batch)

    return call


def _told(ledger: Ledger, name: str, fn: Callable[..., Any], state: TrainState, *batch: Any) -> Any:
    """fn(state, *batch) with its context in the ledger, and what it raises where others can see it."""
    watch, before, now = ledger.watch, ledger.context, int(state.step)
    tensors = [x for x in tree.leaves(batch) if isinstance(x, Tensor)]
    rows = "/".join(sorted({str(len(x)) for x in tensors if x.dim()}))
    (spec, units), (names, scalars) = ledger.describe(state.params.where.structure), ledger.scalars(state.chain)
    ledger.enter(Context(name, now, int(state.key), scalars, spec, names, rows, units))
    if ledger.replicated and tensors:
        ledger.mix_rows(torch.stack([checksum(x) for x in tensors]).tolist())
    if watch is not None:
        watch.enter()
    try:
        out = fn(state, *batch)
    except BaseException as error:
        if watch is not None:
            watch.failed(error, f"{_words(error)} in {name} at step {now}")
        raise
    finally:
        ledger.enter(before._replace(step=now))
        if watch is not None:
            watch.inside = False
    if type(out) is tuple and type(out[1]) is Metrics and out[1].lr.device.type == "cpu":
        lr = out[1].lr.item()
        ledger.lr = lr if lr == lr else NAN
    return out


def watched(mesh: Mesh, grad: Grad, check: int | bool, parts: Sequence[Any] = (), replicated: tuple[str, ...] = ()) -> Mesh:
    """The mesh, whose ledger now knows the chain; with the thread that compares, unless check is 0 or no other rank could differ.

    Args:
      parts: of the chain; the numbers they were built with are compared as well.
      replicated: axes whose ranks are given the same rows.
    """
    arrows = [f"{name} -> {layout.describe()}" for name, layout in zip(grad.names, grad.arrows, strict=True)]
    sums = next((e.sums for e in grad.env.edges.values()), "tree")
    ledger: Ledger = mesh.ledger
    ledger.chain, ledger.replicated = [f"mesh {grad.env.mesh}, {grad.env.policy}, sums={sums!r}", *arrows, *settings(parts)], replicated
    if not check or world_size() == 1 or prod(mesh.sizes().values()) != world_size():
        return mesh
    init_distributed()
    if dist.get_backend() in ("fake", "threaded") or not hasattr(dist.distributed_c10d._get_default_store(), "clone"):
        return mesh  # simulated, or without a store that a thread can ask
    ledger.watch = next((t for t in threading.enumerate() if isinstance(t, Watch) and t.world is dist.group.WORLD), None) or Watch()
    ledger.watch.texts |= ledger.texts
    ledger.texts = ledger.watch.texts
    if not mesh.connected:  # groups are about to be made, by all ranks
        ledger.enter(Context("train_step", spec=ledger.describe(None)[0]))
        ledger.note("connect", str(mesh))
    return mesh


class Watch(threading.Thread):
    """The thread that compares this process's log with its neighbours'; one for all steps of a world."""

    def __init__(self) -> None:
        """Opens its own connection to the store, and a namespace for this world; starts to look."""
        super().__init__(name="funczero-check", daemon=True)
        self.world, self.rank, self.size, self.pid = dist.group.WORLD, dist.get_rank(), dist.get_world_size(), os.getpid()
        self.anchor: Any = dist.distributed_c10d._get_default_store()  # keeps rank 0's server up while others ask
        clone = presence.connection(self.anchor)  # the main thread may be waiting on the connection of the original
        self.store: Any = dist.PrefixStore(f"funczero/check/{clone.add(f'funczero/check/{self.rank}', 1)}", clone)
        self.lent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # else the store goes with rank 0
        self.log, self.gone, self.beat, self.count = Log(MEMORY), "", 0, 0
        self.texts: dict[int, str] = {}  # chains and leaves by checksum
        self.told = self.lost = ""  # what all print; that the store is gone
        self.inside, self.caller, self.settled = False, 0, False
        self.raised: tuple[float, str] | None = None  # when, in words
        self.fails = 0  # calls that raised
        self.broken = 0.0  # when a connection broke
        self.proven, self.claimed, self.doubted = False, 0.0, False  # a verdict: found out here, first read at this time, said not to be followed
        self.moved, self.doubt, self.published = time.monotonic(), 0.0, -1
        self.signs: dict[int, tuple[Sign, float]] = {}  # by rank: the last one, and when its beat was new
        self.named: dict[int, int] = {}  # ranks that were named as late or silent, and at which count
        self.leaving, self.aborting = threading.Event(), _SlowAbort(self)
        atexit.register(self.leave)
        self.start()

    # --- the main thread
    def enter(self) -> None:
        """A call begins."""
        self.inside, self.raised, self.caller = True, None, threading.get_ident()

    def failed(self, error: BaseException, words: str) -> None:
        """A call raised. Where a connection broke, the sentence of all ranks is raised instead of gloo's."""
        self.raised, self.fails = (time.monotonic(), words), self.fails + 1
        if isinstance(error, RuntimeError) and any(x in str(error) for x in BROKEN) and not self.leaving.is_set():
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
        if os.getpid() == self.pid and self.is_alive():
            self.leaving.set()
            self.join(4 * LINGER + 2 * PATIENCE)
            if self.is_alive():  # inside the store's client, which aborts the interpreter when it comes back after the end
                print(f"funczero: rank {self.rank} could not take leave of the world's store within {4 * LINGER + 2 * PATIENCE:g} s", file=sys.stderr)
                _flush()
                os._exit(1)
        if os.getpid() == self.pid:
            self.aborting.undo()
            if (self.told or self.lost or self.settled) and hasattr(sys, "last_value"):  # the world is broken: taking gloo's groups down now may abort, and hide the error
                ending.finish()  # a save under way comes to its end
                _flush()
                os._exit(1)

    # --- the thread
    def run(self) -> None:
        """Look twice a second, until this rank leaves or is told, or rank 0 takes the store along."""
        closing = False
        try:
            while not (self.told or closing or self.leaving.wait(max(PERIOD, self.size / 256))) and dist.is_initialized() and dist.group.WORLD is self.world:
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
        self.store = self.anchor = None

    def look(self) -> None:
        """Publish what is new, and compare with the neighbours."""
        raised, last = self.raised, self.log.entries[-1] if self.log.entries else (0, 0, None)
        if last[0] != self.count:
            self.count, self.moved = last[0], time.monotonic()
        if not self.leaving.is_set():  # a rank that raised may go on after all
            late = raised and time.monotonic() - max(raised[0], self.moved) > PATIENCE and not self.settled
            self.gone = _gone("raised", raised[1]) if raised and late else ""
        self.beat += 1
        own = Sign(last[0], last[1], self.inside, self.beat, self.gone, str(last[2] or "launched nothing"), self.fails)
        self.store.set(f"at/{self.rank}", json.dumps(own))
        peers = {(self.rank - 1) % self.size, (self.rank + 1) % self.size}
        late = self.inside and time.monotonic() - self.moved > min(NOTICE, DEAD)
        for peer in range(self.size) if late or self.broken or self.claimed or self.size <= FEW else peers:
            if peer != self.rank:
                self.compare(own, peer, self.sign(peer))
        if not self.settled and (self.doubt or self.store.check(["doubt"])):
            self.judge()
        if not self.told and self.store.check(["verdict"]):
            self.hear(plain(self.store.get("verdict").decode(errors="replace")))
        if late:
            self.notice(own)
        if self.broken and time.monotonic() - self.broken > DEAD and not self.told:
            self.bury(own)

    def sign(self, rank: int) -> Sign:
        """What a rank published, with the time at which its beat was new."""
        sign = Sign(*json.loads(self.store.get(f"at/{rank}"))) if self.store.check([f"at/{rank}"]) else Sign()
        before = self.signs.get(rank)
        if before is None or before[0].beat != sign.beat:
            self.signs[rank] = sign, time.monotonic()
        else:
            self.signs[rank] = sign, before[1]
        return sign

    def compare(self, own: Sign, peer: int, sign: Sign) -> None:
        """Raise the doubt where a peer's launches are not ours, or where it is gone and we go on."""
        differs = 0 < sign.launches <= own.launches and self.sum_at(sign.launches) not in (None, sign.sum)
        if (differs or self.is_gone(sign) and sign.launches < own.launches) and not self.doubt and not self.settled:
            self.doubt = time.monotonic()
            self.store.set("doubt", "")

    def is_gone(self, sign: Sign) -> bool:
        """Will this rank launch nothing more, though we do? One that raised, as we did, may go on as we do."""
        return bool(sign.gone) and (json.loads(sign.gone)[1] == "left" or sign.failed > self.fails)

    def sum_at(self, count: int) -> int | None:
        """This rank's checksum after so many launches, as far as it remembers; the main thread goes on meanwhile."""
        with contextlib.suppress(IndexError):
            while True:
                newest = self.log.entries[-1][0]
                found = self.log.entries[count - newest - 1]
                if found[0] == count:
                    return found[1]
                if newest == self.log.entries[-1][0]:
                    return None
        return None

    def judge(self) -> None:
        """On doubt: publish the last entries, and once all are there write the message that all ranks print."""
        self.doubt = self.doubt or time.monotonic()
        if self.published != self.count or self.gone:
            self.publish()
        tails: dict[int, dict[int, Any]] = {}
        gone: dict[int, tuple[int, Entry]] = {}
        for r in range(self.size):
            if self.store.check([f"tail/{r}"]):
                tails[r] = {n: (total, entry) for n, total, entry in unpack(self.store.get(f"tail/{r}"), ANSWERS)}
            sign = self.sign(r)
            if r == self.rank and sign.gone or self.is_gone(sign):
                gone[r] = sign.launches + 1, Entry.read(json.loads(sign.gone))
        numbers = sorted({n for tail in tails.values() for n in tail} | {n for n, _ in gone.values()})
        for n in numbers:
            found = {r: tail[n] for r, tail in tails.items() if n in tail}
            entries = {r: Entry.read(entry) for r, (_, entry) in found.items()} | {r: e for r, (m, e) in gone.items() if m == n}
            if len({total for total, _ in found.values()}) > 1 or found and len(entries) > len(found):
                if len(entries) == self.size or time.monotonic() - self.doubt >= 2 * PERIOD:  # others are about to be there, and have a vote
                    self.verdict(sentence(dict(sorted(entries.items())), self.text))
                return

    def publish(self) -> None:
        """The last entries, and the chains they name."""
        tail = list(self.log.entries)[-TAIL:]
        for spec in {entry.context.spec for *_, entry in tail} & set(self.texts):
            self.store.set(f"text/{spec}", zlib.compress(json.dumps(self.texts[spec]).encode()))
        self.store.set(f"tail/{self.rank}", zlib.compress(json.dumps(tail).encode()))
        self.published = self.count

    def text(self, spec: int) -> str | None:
        """A chain and its leaves by checksum."""
        return unpack(self.store.get(f"text/{spec}"), ANSWERS) if self.store.check([f"text/{spec}"]) else None

    def verdict(self, text: str) -> None:
        """What all ranks print, now that this one has found out by itself; the first one counts."""
        self.proven = True
        self.store.compare_set("verdict", "", text)

    def hear(self, text: str) -> None:
        """What somebody wrote for all ranks to print. It ends this rank only once this rank sees the same: other launches, or a rank without a sign of life."""
        now = time.monotonic()
        self.claimed = self.claimed or now
        waits = self.broken or self.inside and now - self.moved > DEAD
        silent = any(r != self.rank and now - since > DEAD for r, (_, since) in self.signs.items())
        if self.proven or self.settled or waits and silent:
            self.told = text
        elif now - self.claimed > 2 * DEAD and not self.doubted:
            self.doubted = True
            print(f"funczero: rank {self.rank} goes on: the world's store says {text!r}, but no rank is silent and none launched anything else", file=sys.stderr, flush=True)

    def notice(self, own: Sign) -> None:
        """Name, once a launch, who is awaited or silent for long: no proof, so the run goes on."""
        now = time.monotonic()
        for r, (sign, since) in self.signs.items():
            silent, behind = now - since >= NOTICE, sign.launches < own.launches and now - self.moved >= NOTICE
            if r == self.rank or sign.gone or not (silent or behind) or self.named.get(r) == own.launches:
                continue
            self.named[r] = own.launches
            where = f"which is alive in {'a call' if sign.inside else 'no call'}"
            if silent:
                where = f"which gives no sign of life for {now - since:.0f} s (stopped, starved, or its machine is gone)"
            said = f"rank {self.rank} {own.last} and has waited {now - self.moved:.0f} s for rank {r}, {where}; it last {sign.last}"
            print(f"funczero: {said}", file=sys.stderr, flush=True)

    def bury(self, own: Sign) -> None:
        """A connection broke, and somebody gives no sign of life: that is a proof."""
        now = time.monotonic()
        dead = [r for r, (sign, since) in self.signs.items() if r != self.rank and not sign.gone and now - since > DEAD]
        if dead:
            last = self.signs[dead[0]][0].last
            self.verdict(
                f"{ranks_in_words(dead)} died: a connection to it broke and it gave no sign of life for {DEAD:g} s; it last {last}, "
                f"while rank {self.rank} {own.last}; look for what ended it (its own output, the kernel's out-of-memory killer), and start all ranks again"
            )
            self.told = plain(self.store.get("verdict").decode(errors="replace"))

    def part(self) -> None:
        """This rank launches nothing more: its last sign says so, and is compared with what the others do."""
        error, until = getattr(sys, "last_value", None), time.monotonic() + LINGER
        why = f"with {self.raised[1]}" if self.raised else f"with {_words(error)}" if error else self.after()
        self.gone, self.raised = _gone("left", why), None
        self.publish()
        self.look()
        self.store.add("left", 1)
        while not self.told and time.monotonic() < until:
            until = 0.0 if self.store.add("left", 0) == self.size else until  # all left: one last look
            self.look()
            time.sleep(PERIOD / 10)

    def after(self) -> str:
        return f"after step {self.log.entries[-1][2].context.step}" if self.log.entries else "after nothing"

    def orphaned(self) -> None:
        """The store does not answer: rank 0 is gone, and took it along. Said where this rank still waits for something."""
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
        """Say it once, with the line of the caller's code, and end the process: no exception reaches a thread inside a wait."""
        self.leaving.wait(PATIENCE if self.raised else 2 * PERIOD)  # an exception on its way out is shown first; others hear before a connection breaks
        if self.settled:  # the main thread says it
            return
        print(f"funczero: {self.told}{'' if self.leaving.is_set() else _place_of(self.caller)}", file=sys.stderr, flush=True)
        if not (self.leaving.is_set() and hasattr(sys, "last_value")):  # else it ends by itself, with an error
            ending.finish()  # a save under way comes to its end
            _flush()
            os._exit(1)


class _SlowAbort:
    """Gloo aborts, from a thread of its own, when a message is longer than expected; let it wait until the ranks are compared."""

    def __init__(self, watch: Watch) -> None:
        self.before: Any = None
        try:
            library, kind = ctypes.CDLL("libstdc++.so.6"), ctypes.CFUNCTYPE(None)
            self.set = library._ZSt13set_terminatePFvvE
        except (AttributeError, OSError):  # another C++ library: gloo's message stands alone
            return
        self.set.restype, self.set.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

        def handler() -> None:
            until = time.monotonic() + 2 * LINGER + 4 * PERIOD
            while time.monotonic() < until or watch.told and watch.is_alive():  # the watch ends the process
                time.sleep(PERIOD / 10)
            kind(self.before)()

        self.callback = kind(handler)  # to be kept
        self.before = self.set(ctypes.cast(self.callback, ctypes.c_void_p))

    def undo(self) -> None:
        """Before the interpreter goes: no C++ thread may call into it any more."""
        if self.before is not None:
            self.set(self.before)


def _gone(verb: str, why: str) -> str:
    return json.dumps(Entry(Context(""), verb, text=why))


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _place_of(thread: int) -> str:
    """Where a thread is in the caller's own code."""
    frame, ours = sys._current_frames().get(thread), (str(Path(__file__).parents[1]), os.path.dirname(torch.__file__))
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    return "" if frame is None else f" (this rank is at {frame.f_code.co_filename}:{frame.f_lineno})"
