"""What somebody else's code draws (dropout, SpecAugment, diffusion times): from a key alone, or refused.

A loss is a function of its arguments, so the generators that a process has for all are set from the key while it runs,
and put back.
"""

from __future__ import annotations

import ctypes
import random
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy.random
import torch
from torch.utils._python_dispatch import _disable_current_modes

from funczero.core.recorded import recording
from funczero.gradients.own_draws import own_generator

KINDS = ("torch", "python", "numpy")


class Streams(NamedTuple):
    """Where torch's, python's and numpy's generators stand."""

    torch: tuple[torch.Tensor, ...]
    python: Any
    numpy: Any


class Marks(NamedTuple):
    """As much of it as tells whether something was drawn, read in microseconds."""

    torch: tuple[bytes, ...]
    python: Any
    numpy: Any


def generators(device: torch.device) -> list[torch.Generator]:
    """Those that torch draws from here: the CPU's, and the device's."""
    host = own_generator() or torch.default_generator
    return (
        [host]
        if device.type == "cpu"
        else [host, torch.get_device_module(device).default_generators[device.index or 0]]
    )


def streams(device: torch.device) -> Streams:
    """Where all generators stand, to be put back by `put`."""
    ours = own_generator() is not None  # threads share python's and numpy's: they are refused there, and not touched
    shared = (None, None) if ours else (random.getstate(), numpy.random.get_state())
    return Streams(tuple(g.get_state() for g in generators(device)), *shared)


def put(s: Streams, device: torch.device) -> None:
    """All generators as they stood."""
    for g, state in zip(generators(device), s.torch, strict=True):
        g.set_state(state)
    if s.python is not None:
        random.setstate(s.python)
        numpy.random.set_state(s.numpy)


def seed(key: int, device: torch.device) -> None:
    """All generators from a key."""
    for g in generators(device):
        g.manual_seed(key)
    if own_generator() is None:
        random.seed(key)
        numpy.random.seed([key & 0xFFFFFFFF, key >> 32])


@contextmanager
def keyed(key: int | None, device: torch.device, drew: Callable[[str], Exception]) -> Iterator[None]:
    """Draws inside come from the key alone; without one nothing may be drawn. The generators are left as they were.

    Args:
      drew: the error for a draw from "torch", "python" or "numpy" that no key accounts for.
    """
    if recording():
        with _recorded(device):
            yield
        return
    if key is None:
        states, before = [g.get_state() for g in generators(device)], _marks(device)
        try:
            yield
            _told(before, _marks(device), KINDS, drew)
        except BaseException:
            for g, state in zip(generators(device), states, strict=True):
                g.set_state(state)
            raise
        return
    simulated = own_generator() is not None
    was, before = streams(device), _marks(device)
    try:
        seed(key, device)
        yield
        if simulated:
            _told(before, _marks(device), KINDS[1:], drew)
    finally:
        put(was, device)


@contextmanager
def _recorded(device: torch.device) -> Iterator[None]:
    """While a loss is recorded torch draws nothing, and a number that python or numpy drew would be drawn for ever."""
    with _disable_current_modes():
        was, before = streams(device), _marks(device)
    kind = None
    try:
        yield
    finally:
        with _disable_current_modes():
            after = _marks(device)
            kind = next((k for k in KINDS if getattr(before, k) != getattr(after, k)), None)
            if kind is not None:
                put(was, device)
    if kind is not None:
        raise RuntimeError(f"it draws from {kind}'s generator, and a recording has only the numbers that it gave once")


@contextmanager
def foreseen(
    device: torch.device, drew: Callable[[str], Exception], kinds: tuple[str, ...] = KINDS[1:]
) -> Iterator[None]:
    """Nothing may be drawn inside from generators of these kinds; by default torch's may."""
    if recording():  # keyed() looks for all of it there
        yield
        return
    before = _marks(device)
    yield
    _told(before, _marks(device), kinds, drew)


class Trail:
    """Where torch's generators stood after each block of a forward: the name of one that drew."""

    def __init__(self, device: torch.device) -> None:
        """A forward begins."""
        self.device = device
        self.seen = [("", self._now())]

    def passed(self, path: str) -> None:
        """A block has returned."""
        self.seen.append((path, self._now()))

    def drew(self) -> str:
        """The first block in which, or just before which, something was drawn; "" where none was."""
        both = zip(self.seen, self.seen[1:], strict=False)
        return next((path for (_, a), (path, b) in both if not all(map(torch.equal, a, b))), "")

    def _now(self) -> list[torch.Tensor]:
        with torch._C._DisableFuncTorch():  # as in _marks
            return [g.get_state() for g in generators(self.device)]


def _told(before: Marks, after: Marks, kinds: tuple[str, ...], drew: Callable[[str], Exception]) -> None:
    for kind in kinds:
        if getattr(before, kind) != getattr(after, kind):
            error = drew(kind)
            others = [
                t.name
                for t in threading.enumerate()
                if t is not threading.current_thread() and not t.name.startswith("funczero-")
            ]
            beside = (
                f" (or one of this process's other threads drew meanwhile: {', '.join(sorted(others)[:4])})"
                if others
                else ""
            )
            raise type(error)(f"{error}{beside}")


def _marks(device: torch.device) -> Marks:
    with torch._C._DisableFuncTorch():  # inside torch.func the state would be one of its wrappers
        host = tuple(g.get_state().numpy().tobytes() for g in generators(device))
    return Marks(host, _python_bytes() if _python_shows_its_memory() else random.getstate(), _numpy_bytes())


def _python_bytes(of: Any = random._inst) -> Any:
    """The state of python's global generator as it lies in memory: getstate makes 625 numbers, and takes 8 us."""
    return ctypes.string_at(id(of) + object.__basicsize__, 625 * 4), of.gauss_next


@cache
def _python_shows_its_memory() -> bool:
    """Does this interpreter lay a generator out as we read it?"""
    probe: Any = random.Random(7)
    probe.random()
    index, *words = struct.unpack("i624I", _python_bytes(probe)[0])
    return (*words, index) == probe.getstate()[1]


def _numpy_bytes() -> Any:
    """The state of numpy's global generator: its memory, which numpy shows to ctypes, because get_state takes 40 us."""
    bits = numpy.random.get_bit_generator()  # type: ignore[attr-defined]
    if not isinstance(bits, numpy.random.MT19937):
        return repr(numpy.random.get_state(legacy=False))
    return ctypes.string_at(bits.ctypes.state_address, 625 * 4)
