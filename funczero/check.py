"""Divergence is told, not hung on: ranks keep a log of what they launch, and a thread compares it where a stuck wait cannot stop it.

Law: a run is ended only by proof. The n-th entries of two ranks' logs differ: other collectives, another call, step, chain, spec or number of rows; or one
rank left, or raised and did not go on, where the other launched. A slow rank is only behind, and behind is no proof.

The main thread appends one tuple a collective. Twice a second a daemon thread chains a checksum over them, publishes (count, checksum) and the last
entries in a namespace of the world's store, and reads its two neighbours': whoever is odd is odd to a neighbour. The first to see it writes what all print.
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
from collections import Counter, deque
from collections.abc import Callable
from math import inf, prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from absl import logging
from torch import Tensor

from funczero import tree
from funczero.mesh import Mesh, init_distributed, world_size
from funczero.types import Grad, TrainState

PERIOD = 0.5  # seconds between two looks
PATIENCE = 6.0  # seconds after which an exception that did not end the process counts as a rank that will not go on
LINGER = 2.0  # seconds that a leaving rank stays to compare its last entries
NOTICE = 30.0  # seconds of waiting for a rank that is alive elsewhere, before that is said
TAIL, MEMORY = 256, 1 << 14  # entries published, entries remembered
UPDATE = "step(state, batch)"


class Entry(NamedTuple):
    """One collective and the call that launched it; or `left`, or `raised`."""

    call: str
    step: int
    rows: str  # of the call's batch
    spec: int  # checksum of the printed chain and the leaves
    verb: str
    axis: str = ""
    dtype: str = ""
    nbytes: int = 0
    text: str = ""  # not compared

    def __str__(self) -> str:
        if self.verb in ("left", "raised"):
            return f"{self.verb} {self.text}"
        given = f" with {self.rows} rows" if self.rows else ""
        return f"is at step {self.step} in {self.call}{given}, {self.verb} over {self.axis!r} of {self.nbytes} bytes of {self.dtype}"


class Record:
    """One step's way into the log, on its mesh: open for the first `limit` updates."""

    def __init__(self, watch: Watch, grad: Grad, limit: float) -> None:
        """grad: the planned chain."""
        self.watch, self.limit, self.open, self.first = watch, limit, True, -1
        arrows = [f"{name} -> {layout.describe()}" for name, layout in zip(grad.names, grad.arrows, strict=True)]
        self.chain = "\n".join([f"mesh {grad.env.mesh}, {grad.env.policy}", *arrows])
        self.known: tuple[Any, int] = (None, 0)

    def note(self, verb: str, axis: str, dtype: str, nbytes: int) -> None:
        """One collective is about to be launched; the only work on the main thread."""
        if self.open:
            self.watch.fresh.append((*self.watch.context, verb, axis, dtype, nbytes))

    def call(self, name: str, fn: Callable[..., Any], state: TrainState, *batch: Any) -> Any:
        """fn(state, *batch), with its name, step, rows and what it raises on the log."""
        watch, now = self.watch, int(state.step)
        self.first = now if self.first < 0 else self.first
        self.open = self.open and now - self.first < self.limit
        if not self.open:
            return fn(state, *batch)
        spec = self._spec(state.params.where.structure)
        watch.context, watch.inside, watch.raised, watch.caller = (name, now, _rows(batch), spec), True, None, threading.get_ident()
        try:
            return fn(state, *batch)
        except BaseException as error:
            watch.raised = (time.monotonic(), type(error).__name__, f"{_words(error)} in {name} at step {now}")
            raise
        finally:
            watch.context, watch.inside = ("no call", now, "", spec), False

    def _spec(self, structure: Any) -> int:
        if self.known[0] is not structure:
            units = structure.units
            leaves = [f"leaf {x.path!r} {x.shape} cut {dict(x.dims)} in unit {units[x.unit].name!r}{', frozen' * units[x.unit].frozen}" for x in structure.leaves]
            text = "\n".join([self.chain, *leaves])
            self.known = (structure, zlib.crc32(text.encode()))
            self.watch.texts[self.known[1]] = text
        return self.known[1]


def _rows(batch: Any) -> str:
    return "/".join(sorted({str(len(x)) for x in tree.leaves(batch) if isinstance(x, Tensor) and x.dim()}))


def _words(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def recorded(name: str, fn: Callable[..., Any], running: Callable[[], Grad]) -> Callable[..., Any]:
    """fn(state, ...) as a call that all ranks must make alike."""

    def call(state: Any, *batch: Any) -> Any:
        record = running().env.mesh.watch if isinstance(state, TrainState) else None
        return fn(state, *batch) if record is None else record.call(name, fn, state, *batch)

    return call


def watched(mesh: Mesh, grad: Grad, check: int | bool) -> Mesh:
    """The mesh with a record of what is launched on it; as it is where check is 0 or no other rank is there to differ from.

    Args:
      check: updates to look at; True or -1: all.
    """
    size = world_size()
    if not check or size == 1 or prod(mesh.sizes().values()) != size:
        return mesh
    init_distributed()
    if dist.get_backend() in ("fake", "threaded"):
        return mesh
    watch = next((t for t in threading.enumerate() if isinstance(t, Watch) and t.world is dist.group.WORLD), None)
    if watch is None:
        try:
            watch = Watch()
        except (RuntimeError, AttributeError) as error:
            logging.warning("check: this world's store cannot be read from a thread (%s); ranks are not compared", error)
            return mesh
        watch.start()
    return mesh._replace(watch=Record(watch, grad, inf if check is True or check < 0 else check))


class Watch(threading.Thread):
    """This process's log and the thread that compares it; one for all steps of a world."""

    def __init__(self) -> None:
        """Opens a connection of its own to the store, and a namespace for this world."""
        super().__init__(name="funczero-check", daemon=True)
        self.world, self.rank, self.size, self.pid = dist.group.WORLD, dist.get_rank(), dist.get_world_size(), os.getpid()
        self.anchor: Any = dist.distributed_c10d._get_default_store()  # keeps rank 0's server up while others ask
        clone = self.anchor.clone()
        self.store: Any = dist.PrefixStore(f"funczero/check/{clone.add(f'funczero/check/{self.rank}', 1)}", clone)
        self.fresh: deque[Any] = deque()  # entries of the main thread, as tuples
        self.context: tuple[str, int, str, int] = ("no call", 0, "", 0)
        self.inside, self.caller = False, 0
        self.raised: tuple[float, str, str] | None = None
        self.texts: dict[int, str] = {}  # chains and leaves by checksum, not yet published
        self.log: deque[tuple[int, Entry]] = deque(maxlen=MEMORY)  # (checksum so far, entry)
        self.count, self.sum, self.told, self.published = 0, 0, "", (-1, False)
        self.peers = {(self.rank - 1) % self.size, (self.rank + 1) % self.size}
        self.still, self.noticed = time.monotonic(), -1  # when the count last moved; the count at which a notice was given
        self.leaving = threading.Event()
        self.aborting = _slow_abort()
        atexit.register(self.leave)

    def leave(self) -> None:
        """At exit: compare the last entries, then let go; at most LINGER seconds where other ranks stay behind."""
        if os.getpid() == self.pid and self.is_alive():
            self.leaving.set()
            self.join(LINGER + PATIENCE)

    def run(self) -> None:
        """Look twice a second, until this rank leaves or all are told."""
        with contextlib.suppress(RuntimeError):  # the store is gone, and its host with it: there is nobody left to ask
            while not self.told and not self.leaving.wait(PERIOD) and dist.is_initialized() and dist.group.WORLD is self.world:
                self.look()
                self.notice()
            if not self.told:
                self.part()
            self.settle("told" if self.told else "done")
        if self.told:
            self.end()
        self.store = self.anchor = None

    def look(self) -> None:
        """Publish what is new, and compare with the neighbours."""
        if self.raised and time.monotonic() - self.raised[0] > PATIENCE:
            self.fresh.append((*self.context, f"raised {self.raised[1]}", "", "", 0, self.raised[2]))
            self.raised = None
        while self.fresh:
            entry = Entry(*self.fresh.popleft())
            self.sum = zlib.crc32(repr(entry[:-1]).encode(), self.sum)
            self.log.append((self.sum, entry))
            self.count, self.still = self.count + 1, time.monotonic()
        while self.texts:
            checksum, text = self.texts.popitem()
            self.store.set(f"text/{checksum}", zlib.compress(text.encode()))
        if self.published != (self.count, self.inside):
            self.published = (self.count, self.inside)
            self.store.set(f"tail/{self.rank}", zlib.compress(json.dumps([self.count, list(self.log)[-TAIL:]]).encode()))
            self.store.set(f"at/{self.rank}", f"{self.count} {self.sum} {int(self.inside)}")
        for peer in self.peers:
            count, checksum, _ = self.at(peer)
            if count and 0 <= self.count - count < len(self.log) and self.log[count - self.count - 1][0] != checksum:
                self.store.compare_set("verdict", "", self.verdict(peer))
        if self.store.check(["verdict"]):
            self.told = self.store.get("verdict").decode()

    def at(self, rank: int) -> tuple[int, ...]:
        """What a rank published: entries so far, their checksum, and whether it is inside a call."""
        return tuple(map(int, self.store.get(f"at/{rank}").split())) if self.store.check([f"at/{rank}"]) else (0, 0, 1)

    def part(self) -> None:
        """This rank launches nothing more: its last entry says so, and is compared with what the others do now."""
        error = sys.last_value if hasattr(sys, "last_value") else None
        why = self.raised[2] if self.raised else _words(error) if error else f"after step {self.context[1]}"
        self.fresh.append(("", 0, "", 0, "left", "", "", 0, why))
        self.raised, until = None, time.monotonic() + LINGER
        self.look()
        self.store.add("left", 1)
        while not self.told and time.monotonic() < until:
            last = self.store.add("left", 0) == self.size
            self.look()
            if last:
                return
            time.sleep(PERIOD / 10)

    def settle(self, what: str) -> None:
        """Wait until every rank knows as much, for rank 0 may hold the store and a rank that ends cuts the others' connections."""
        until = time.monotonic() + LINGER
        self.store.add(what, 1)
        while (self.rank == 0 or self.told) and self.store.add(what, 0) < self.size and time.monotonic() < until:
            time.sleep(PERIOD / 10)

    def end(self) -> None:
        """Say it once, with the line of the caller's code, and end the process: no exception reaches a thread inside a gloo wait."""
        if self.raised:  # an exception is on its way out and is shown first
            self.leaving.wait(PATIENCE)
        print(f"funczero: {self.told}{_place_of(self.caller)}", file=sys.stderr, flush=True)
        if not (self.leaving.is_set() and hasattr(sys, "last_value")):  # else it ends by itself, with an error
            sys.stdout.flush()
            os._exit(1)

    def notice(self) -> None:
        """One line, and no end, when this rank has long waited for one that is alive outside of any call."""
        if self.inside and self.noticed != self.count and time.monotonic() - self.still > NOTICE:
            idle = [r for r in range(self.size) if self.at(r)[0] < self.count and not self.at(r)[2]]
            if idle:
                self.noticed = self.count
                print(f"funczero: rank {self.rank} {self.log[-1][1]} and has waited {NOTICE:g} s for {_ranks(idle)}, alive in no call", file=sys.stderr, flush=True)

    def verdict(self, peer: int) -> str:
        """The message: who is odd, where, what the others do, and what to change."""
        tails: dict[int, dict[int, Any]] = {}
        for r in range(self.size):
            if self.store.check([f"tail/{r}"]):
                count, tail = json.loads(zlib.decompress(self.store.get(f"tail/{r}")))
                tails[r] = {count - len(tail) + i: entry for i, entry in enumerate(tail)}
        own = {self.count - len(self.log) + i: entry for i, entry in enumerate(self.log)}
        n = next((i for i, (checksum, _) in tails[peer].items() if i in own and own[i][0] != checksum), self.count)
        entries = {r: Entry(*tail[n][1]) for r, tail in tails.items() if n in tail}
        usual = _usual(entries.values())
        odd = next((r for r, e in entries.items() if e[:-1] != usual[:-1]), peer)
        others = [r for r, e in entries.items() if e[:-1] == usual[:-1]]
        return f"rank {odd} {entries[odd]}, while {_ranks(others)} {usual}; {self.remedy(entries[odd], usual)}"

    def remedy(self, odd: Entry, usual: Entry) -> str:
        """What to write instead."""
        if odd.text:
            return "an error on one rank ends all" if ":" in odd.text else "every rank must make as many calls: give every rank as many batches"
        if odd.spec != usual.spec:
            here, there = (zlib.decompress(self.store.get(f"text/{e.spec}")).decode().split("\n") for e in (odd, usual))
            line = next(((a, b) for a, b in zip(here, there) if a != b), (here[len(there) :][:1], there[len(here) :][:1]))
            return f"every rank must build the same chain from like parameters, but {line[0]!r} stands there where {line[1]!r} stands here"
        if odd.call != usual.call:
            return f"every rank must make the same calls: {odd.call if odd.call != UPDATE else usual.call} on all ranks or on none"
        if odd.step != usual.step:
            return "every rank must hold the same state: restore the same checkpoint, and make as many updates"
        if odd.rows != usual.rows:
            return "every rank must be given as many rows, as step.local_rows deals them"
        return "every rank must launch the same collectives: no branch of the loss may depend on the rank or its rows"


def _slow_abort() -> Any:
    """Gloo ends the process from a thread of its own when a message is longer than expected; make it wait until the ranks are compared."""
    try:
        library, kind = ctypes.CDLL("libstdc++.so.6"), ctypes.CFUNCTYPE(None)
        library._ZSt13set_terminatePFvvE.restype = ctypes.c_void_p

        def handler() -> None:
            time.sleep(LINGER + 4 * PERIOD)
            kind(before)()

        callback = kind(handler)
        before = library._ZSt13set_terminatePFvvE(callback)
        return callback
    except (AttributeError, OSError):  # another C++ library: the message of gloo stands alone
        return None


def _usual(entries: Any) -> Entry:
    """What most ranks do; where two are as many, the plainer."""
    found = Counter(e[:-1] for e in entries)
    return max(entries, key=lambda e: (found[e[:-1]], not e.text, e.call == UPDATE))


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:8]))}{' ...' * (len(ranks) > 8)}"


def _place_of(thread: int) -> str:
    """Where a thread is in the caller's own code."""
    frame, ours = sys._current_frames().get(thread), (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    return "" if frame is None else f" (this rank is at {frame.f_code.co_filename}:{frame.f_lineno})"
