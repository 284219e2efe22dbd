"""Divergence is told, not hung on: ranks log what they launch, and a thread compares the logs where a stuck wait cannot stop it.

Law: a run is ended only by proof. The n-th entries of two ranks' logs differ (another collective, call, step, chain, spec or number of rows), or one rank left,
or raised and did not go on, where the other launched. A slow rank is only behind, and behind is no proof.

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
from torch import Tensor

from funczero import ending, presence, tree
from funczero.mesh import Mesh, init_distributed, world_size
from funczero.types import Grad, TrainState

PERIOD = 0.5  # seconds between two looks
LINGER = 2.0  # seconds that a rank which ends stays, so that the others can compare and hear
PATIENCE = 5.5  # seconds after which an exception that did not end the process says that a rank will not go on
NOTICE = 30.0  # seconds of waiting for a rank that is alive elsewhere, before that is said
TAIL, MEMORY = 256, 1 << 14  # entries published, entries remembered
UPDATE = "step(state, batch)"


class Entry(NamedTuple):
    """One collective with the call that launched it; or that this rank left, or raised."""

    call: str
    step: int
    rows: str  # of the call's batch
    spec: int  # checksum of the chain and the leaves
    verb: str
    axis: str = ""
    dtype: str = ""
    nbytes: int = 0
    text: str = ""  # not compared

    def __str__(self) -> str:
        size = f" of {self.nbytes} bytes of {self.dtype}" if self.dtype else ""
        rows = f" with {self.rows} rows" if self.rows else ""
        return f"{self.verb} {self.text}" if self.text else f"launched {self.verb} over {self.axis!r}{size} in {self.call}{rows} at step {self.step}"


class Record:
    """A step's way into the log, on its mesh: open for the first `limit` updates."""

    def __init__(self, watch: Watch, grad: Grad, limit: float) -> None:
        """grad: the planned chain."""
        self.watch, self.limit, self.open, self.first = watch, limit, True, -1
        arrows = [f"{name} -> {layout.describe()}" for name, layout in zip(grad.names, grad.arrows, strict=True)]
        self.chain = [f"mesh {grad.env.mesh}, {grad.env.policy}", *arrows]
        self.known: tuple[Any, int] = (self, 0)

    def spec(self, structure: Any) -> int:
        """The checksum of the chain and of all leaves; their text is published once."""
        if self.known[0] is not structure:
            text = "\n".join([*self.chain, *map(str, () if structure is None else structure.units + structure.leaves)])
            self.known = (structure, zlib.crc32(text.encode()))
            self.watch.texts.append((self.known[1], text))
        return self.known[1]

    def note(self, verb: str, axis: str, dtype: str = "", nbytes: int = 0) -> None:
        """A collective is about to be launched: all that the main thread does for it."""
        if self.open:
            self.watch.fresh.append((*self.watch.context, verb, axis, dtype, nbytes))

    def call(self, name: str, fn: Callable[..., Any], state: TrainState, *batch: Any) -> Any:
        """fn(state, *batch), with its name, step and rows, and what it raises."""
        watch, now = self.watch, int(state.step) if self.open else 0
        self.first = now if self.first < 0 else self.first
        self.open = self.open and now - self.first < self.limit and watch.is_alive()
        if not self.open:
            return fn(state, *batch)
        spec, rows = self.spec(state.params.where.structure), {str(len(x)) for x in tree.leaves(batch) if isinstance(x, Tensor) and x.dim()}
        watch.context, watch.inside, watch.raised, watch.caller = (name, now, "/".join(sorted(rows)), spec), True, None, threading.get_ident()
        try:
            return fn(state, *batch)
        except BaseException as error:
            watch.raised = (time.monotonic(), type(error).__name__, f"{_words(error)} in {name} at step {now}")
            if not watch.is_alive():
                error.add_note("funczero: rank 0 has left the world; every rank must make as many calls")
            raise
        finally:
            watch.context, watch.inside = ("no call", now, "", spec), False


def recorded(name: str, fn: Callable[..., Any], running: Callable[[], Grad]) -> Callable[..., Any]:
    """fn(state, ...) as a call that all ranks must make alike."""

    def call(state: Any, *batch: Any) -> Any:
        record = running().env.mesh.watch if isinstance(state, TrainState) else None
        return fn(state, *batch) if record is None else record.call(name, fn, state, *batch)

    return call


def watched(mesh: Mesh, grad: Grad, check: int | bool) -> Mesh:
    """The mesh with a record for what is launched on it; as it is where check is 0, or where no other rank could differ.

    Args:
      check: updates to look at; True or -1: all.
    """
    if not check or world_size() == 1 or prod(mesh.sizes().values()) != world_size():
        return mesh
    init_distributed()
    if dist.get_backend() in ("fake", "threaded") or not hasattr(dist.distributed_c10d._get_default_store(), "clone"):
        return mesh  # simulated, or without a store that a thread can ask
    watch = next((t for t in threading.enumerate() if isinstance(t, Watch) and t.world is dist.group.WORLD), None) or Watch()
    record = Record(watch, grad, inf if check is True or check < 0 else check)
    if not mesh.connected:  # groups are about to be made, by all ranks
        watch.context = ("train_step", 0, "", record.spec(None))
        record.note("connect", str(mesh))
    return mesh._replace(watch=record)


class Watch(threading.Thread):
    """This process's log and the thread that compares it; one for all steps of a world."""

    def __init__(self) -> None:
        """Opens its own connection to the store, and a namespace for this world; starts to look."""
        super().__init__(name="funczero-check", daemon=True)
        self.world, self.rank, self.size, self.pid = dist.group.WORLD, dist.get_rank(), dist.get_world_size(), os.getpid()
        self.anchor: Any = dist.distributed_c10d._get_default_store()  # keeps rank 0's server up while others ask
        clone = presence.connection(self.anchor)  # the main thread may be waiting on the connection of the original
        self.store: Any = dist.PrefixStore(f"funczero/check/{clone.add(f'funczero/check/{self.rank}', 1)}", clone)
        self.fresh: deque[tuple[Any, ...]] = deque()  # entries from the main thread
        self.texts: deque[tuple[int, str]] = deque()  # chains and leaves by checksum
        self.context: tuple[str, int, str, int] = ("no call", 0, "", 0)
        self.raised: tuple[float, str, str] | None = None  # when, its type, in words
        self.log: deque[tuple[int, Entry]] = deque(maxlen=MEMORY)  # (checksum so far, entry)
        self.count, self.sum, self.told, self.published, self.inside, self.caller = 0, 0, "", (-1, False), False, 0
        self.moved, self.noticed, self.doubt = time.monotonic(), -1, 0.0  # when the count did; the count of the last notice; when a difference was seen
        self.leaving, self.aborting = threading.Event(), _slow_abort()
        atexit.register(self.leave)
        self.start()

    def leave(self) -> None:
        """At exit: compare the last entries, then let go."""
        if os.getpid() == self.pid and self.is_alive():
            self.leaving.set()
            self.join(2 * LINGER + PATIENCE)
            if self.told and hasattr(sys, "last_value"):  # the world is broken: taking gloo's groups down now may abort, and hide the error
                ending.finish()  # a save under way comes to its end
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)

    def run(self) -> None:
        """Look twice a second, until this rank leaves or is told, or rank 0 takes the store along."""
        lent, closing = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True", False
        with contextlib.suppress(RuntimeError):  # the store is gone: there is nobody to ask
            while not (self.told or closing or self.leaving.wait(PERIOD)) and dist.is_initialized() and dist.group.WORLD is self.world:
                closing = lent and self.rank > 0 and self.store.check(["closing"])
                self.look()
            if not (self.told or closing):
                self.part()
            until, heard = time.monotonic() + LINGER, self.store.add("heard", 1)
            if self.rank == 0:
                self.store.set("closing", "")
            while self.rank == 0 and heard < self.size and time.monotonic() < until:
                time.sleep(PERIOD / 10)
                heard = self.store.add("heard", 0)
        if self.told:
            self.end()
        self.store = self.anchor = None

    def look(self) -> None:
        """Publish what is new, and compare with the neighbours."""
        if self.raised and time.monotonic() - self.raised[0] > PATIENCE:
            self.fresh.append((*self.context, "raised", self.raised[1], "", 0, self.raised[2]))
            self.raised = None
        while self.fresh:
            entry = Entry(*self.fresh.popleft())
            self.sum = zlib.crc32(repr(entry[:-1]).encode(), self.sum)
            self.log.append((self.sum, entry))
            self.count, self.moved = self.count + 1, time.monotonic()
        while self.texts:
            checksum, text = self.texts.popleft()
            self.store.set(f"text/{checksum}", zlib.compress(text.encode()))
        if self.published != (self.count, self.inside):
            self.published = (self.count, self.inside)
            self.store.set(f"tail/{self.rank}", zlib.compress(json.dumps([self.count, list(self.log)[-TAIL:]]).encode()))
            self.store.set(f"at/{self.rank}", f"{self.count} {self.sum} {int(self.inside)}")
        for peer in {(self.rank - 1) % self.size, (self.rank + 1) % self.size}:
            count, checksum, _ = self.at(peer)
            if count and 0 <= self.count - count < len(self.log) and self.log[count - self.count - 1][0] != checksum:
                self.judge(peer)
        if self.store.check(["verdict"]):
            self.told = self.store.get("verdict").decode()
        late = self.inside and self.noticed != self.count and time.monotonic() - self.moved > NOTICE
        if late and (idle := [r for r in range(self.size) if self.at(r)[0] < self.count and not self.at(r)[2]]):  # no proof: said, and not ended
            self.noticed = self.count
            print(f"funczero: rank {self.rank} {self.log[-1][1]} and has waited {NOTICE:g} s for {_ranks(idle)}, alive in no call", file=sys.stderr, flush=True)

    def at(self, rank: int) -> tuple[int, ...]:
        """What a rank published: entries so far, their checksum, and whether it is inside a call."""
        return tuple(map(int, self.store.get(f"at/{rank}").split())) if self.store.check([f"at/{rank}"]) else (0, 0, 1)

    def part(self) -> None:
        """This rank launches nothing more: its last entry says so, and is compared with what the others do."""
        error, until = getattr(sys, "last_value", None), time.monotonic() + LINGER
        why = f"with {self.raised[2]}" if self.raised else f"with {_words(error)}" if error else f"after step {self.context[1]}"
        self.fresh.append(("", 0, "", 0, "left", "", "", 0, why))
        self.raised = None
        self.look()
        self.store.add("left", 1)
        while not self.told and time.monotonic() < until:
            until = 0.0 if self.store.add("left", 0) == self.size else until  # all left: one last look
            self.look()
            time.sleep(PERIOD / 10)

    def end(self) -> None:
        """Say it once, with the line of the caller's code, and end the process: no exception reaches a thread inside a wait."""
        self.leaving.wait(PATIENCE if self.raised else 2 * PERIOD)  # an exception on its way out is shown first; others hear before a connection breaks
        print(f"funczero: {self.told}{'' if self.leaving.is_set() else _place_of(self.caller)}", file=sys.stderr, flush=True)
        if not (self.leaving.is_set() and hasattr(sys, "last_value")):  # else it ends by itself, with an error
            ending.finish()
            sys.stdout.flush()
            os._exit(1)

    def judge(self, peer: int) -> None:
        """Write the message that all ranks print: who is odd, where, what the others do, and what to change."""
        n, entries = -1, {}
        own = {self.count - len(self.log) + i: checksum for i, (checksum, _) in enumerate(self.log)}
        for r in (peer, *range(self.size)):
            count, tail = json.loads(zlib.decompress(self.store.get(f"tail/{r}"))) if self.store.check([f"tail/{r}"]) else (0, [])
            by_number = {count - len(tail) + i: entry for i, entry in enumerate(tail)}
            n = next((i for i, (checksum, _) in by_number.items() if own.get(i, checksum) != checksum), -1) if n < 0 else n
            if n in by_number:
                entries[r] = Entry(*by_number[n][1])
        self.doubt = self.doubt or time.monotonic()
        if not entries or len(entries) < self.size and time.monotonic() - self.doubt < 2 * PERIOD:  # others are about to be there, and have a vote
            return
        found, entries = Counter(e[:-1] for e in entries.values()), dict(sorted(entries.items()))
        usual = max(entries.values(), key=lambda e: (found[e[:-1]], not e.text, e.call == UPDATE))  # what most do; of two, the plainer
        odd = next((r for r, e in entries.items() if e[:-1] != usual[:-1]), peer)
        others = [r for r, e in entries.items() if e[:-1] == usual[:-1]]
        self.store.compare_set("verdict", "", f"rank {odd} {entries[odd]}, while {_ranks(others)} {usual}; {self.remedy(entries[odd], usual)}")

    def remedy(self, odd: Entry, usual: Entry) -> str:
        """What to write instead."""
        gone, there = (odd, usual) if odd.text else (usual, odd)
        if gone.text and not gone.text.startswith("after"):
            return "an error on one rank ends all"
        if gone.text:
            return f"every rank must make as many calls of {there.call}{': give every rank as many batches' * (there.call == UPDATE)}"
        if odd.spec != usual.spec:
            one, many = (zlib.decompress(self.store.get(f"text/{e.spec}")).decode().split("\n") + [""] for e in (odd, usual))
            a, b = next((a, b) for a, b in zip(one, many, strict=False) if a != b)
            return f"every rank must build the same chain from like parameters, but one has {a!r} where others have {b!r}"
        if odd.call != usual.call:
            return f"every rank must make the same calls: {odd.call if odd.call != UPDATE else usual.call} on all ranks or on none"
        if odd.step != usual.step:
            return "every rank must hold the same state: restore the same checkpoint, and make as many updates"
        if odd.rows != usual.rows:
            return "every rank must be given as many rows, as step.local_rows deals them"
        return "every rank must launch the same collectives: no branch of the loss may depend on the rank or on its rows"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{' ...' * (len(ranks) > 8)}"


def _place_of(thread: int) -> str:
    """Where a thread is in the caller's own code."""
    frame, ours = sys._current_frames().get(thread), (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    return "" if frame is None else f" (this rank is at {frame.f_code.co_filename}:{frame.f_lineno})"


def _slow_abort() -> Any:
    """Gloo aborts, from a thread of its own, when a message is longer than expected; let it wait until the ranks are compared."""
    try:
        library, kind = ctypes.CDLL("libstdc++.so.6"), ctypes.CFUNCTYPE(None)
        library._ZSt13set_terminatePFvvE.restype = ctypes.c_void_p

        def handler() -> None:
            time.sleep(LINGER + 4 * PERIOD)
            kind(before)()

        callback = kind(handler)
        before = library._ZSt13set_terminatePFvvE(callback)
        return callback  # to be kept
    except (AttributeError, OSError):  # another C++ library: gloo's message stands alone
        return None
