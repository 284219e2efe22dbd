"""Live storages: what every operation allocates, until it is let go; their sum over time, and its peak.

Peak is defined here: the largest sum of the sizes of all storages that exist at once, as a dispatch mode sees them. It
knows nothing of what an allocator keeps or rounds up, of a kernel's own workspace, or of the interpreter; those are in
a process's resident memory (RSS), which is reported beside it.
"""

from __future__ import annotations

import os
import resource
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from funczero.core import tree


class Storage:
    """One storage that existed: its size, and what it is for."""

    __slots__ = ("nbytes", "kind")

    def __init__(self, nbytes: int, kind: str) -> None:
        self.nbytes, self.kind = nbytes, kind


class Live:
    """Which storages exist, and the order in which they came and went."""

    def __init__(self, kind_of: Callable[[], str] | None = None) -> None:
        """Nothing exists yet.

        Args:
          kind_of: asked whenever a storage appears: what it is for.
        """
        self.kind_of = kind_of
        self.now = self.peak = 0
        self.events: list[tuple[Storage, int]] = []  # (storage, 1 where it came and -1 where it went)
        self._here: dict[int, tuple[Storage, weakref.ref[Any]]] = {}

    def see(self, x: Tensor, kind: str | None = None) -> Storage:
        """A tensor exists; its storage is counted once.

        Args:
          kind: what it is for, whatever was thought before; None leaves that as it is.
        """
        storage = x.untyped_storage()
        key = storage._cdata
        found = self._here.get(key)
        if found is not None:
            found[0].kind = kind or found[0].kind
            return found[0]
        new = Storage(storage.nbytes(), kind or (self.kind_of() if self.kind_of else ""))
        self._here[key] = new, weakref.ref(storage, lambda ref: self._gone(key))
        self._count(new, 1)
        return new

    def hold(self, values: Any, kind: str = "") -> None:
        """All tensors of a tree existed before."""
        for x in tree.tensors(values):
            self.see(x, kind)

    def _gone(self, key: int) -> None:
        found = self._here.pop(key, None)
        if found is not None:
            self._count(found[0], -1)

    def _count(self, storage: Storage, sign: int) -> None:
        self.now += sign * storage.nbytes
        self.peak = max(self.peak, self.now)
        self.events.append((storage, sign))

    def of(self, kind: str) -> int:
        """Bytes of one kind that exist now."""
        return sum(s.nbytes for s, _ in self._here.values() if s.kind == kind)

    def at_peak(self) -> dict[str, int]:
        """Bytes by kind at the peak; what a storage is for may have become known after it came."""
        total = top = place = 0
        for i, (storage, sign) in enumerate(self.events):
            total += sign * storage.nbytes
            if total > top:
                top, place = total, i + 1
        out: dict[str, int] = {}
        for storage, sign in self.events[:place]:
            out[storage.kind] = out.get(storage.kind, 0) + sign * storage.nbytes
        return {kind: n for kind, n in out.items() if n}

    def most(self, kind: str) -> int:
        """The largest sum of one kind that existed at once."""
        total = top = 0
        for storage, sign in self.events:
            if storage.kind == kind:
                total += sign * storage.nbytes
                top = max(top, total)
        return top


class _Counting(TorchDispatchMode):
    """Sees what every operation of this thread makes."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation; its tensors are counted."""
        out = func(*args, **(kwargs or {}))
        for x in tree.tensors(out):
            self.live.see(x)
        return out


@dataclass
class Counted:
    """What `count_memory` has seen."""

    live: Live
    resident: int  # bytes of the process when the count began

    @property
    def peak(self) -> int:
        """Bytes of all storages that existed at once, at most; what was held before counts."""
        return self.live.peak

    @property
    def resident_peak(self) -> int:
        """Bytes of the process, at most, since it began."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def count_memory(*held: Any) -> Iterator[Counted]:
    """Counts the storages that exist while it is open, in this thread: what a plan says of the peak, measured.

    Kernels of this package run as their references inside, since what they write is seen by operations alone; the step
    is slower, with the same bits.

    Args:
      held: what exists before and goes on to exist, as a state and its batch.

    >>> import torch
    >>> x = torch.ones(1000)
    >>> with count_memory(x) as memory:
    ...     y = ((x + 1) * 2).sum()
    >>> memory.peak
    12000
    """
    live = Live()
    live.hold(held)
    with _Counting(live):
        yield Counted(live, _resident())


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # a system without it
        return 0
