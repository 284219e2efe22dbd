"""At exit a process waits until a backend's threads let go of what was sent, and no longer than it may."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import torch

from funczero.world import inflight
from funczero.world.inflight import InFlight


class Held:
    """A tensor as a backend's thread holds it: by C++ alone, for some seconds."""

    def __init__(self, seconds):
        self.tensor = torch.ones(3)
        self.holder = torch.nn.Parameter(torch.zeros(3))
        self.holder.grad = self.tensor  # a reference of C++ beside Python's
        threading.Timer(seconds, self.let_go).start()

    def let_go(self):
        self.holder.grad = None


def test_what_is_noted_is_not_kept_alive():
    book, x = InFlight(), torch.ones(3)
    gone = weakref.ref(x)
    assert book.note(torch.ones(2), x) is x
    del x
    gc.collect()
    assert gone() is None
    book.settle()  # nothing to wait for


def test_it_remembers_the_last_ones_alone():
    book, kept = InFlight(), [torch.ones(1) for _ in range(3 * inflight.RECENT)]
    for x in kept:
        book.note(x, x)
    assert len(book.recent) == inflight.RECENT and book.recent[-1]() is kept[-1]


def test_it_waits_for_what_is_held_and_no_longer():
    book, held = InFlight(), Held(0.2)
    book.note(held.tensor, held.tensor)
    start = time.monotonic()
    book.settle()
    assert held.holder.grad is None and time.monotonic() - start >= 0.1
    start = time.monotonic()
    book.settle()
    assert held.tensor._use_count() == 1


def test_a_world_that_never_lets_go_ends_all_the_same():
    book, x = InFlight(), torch.ones(3)
    holder = torch.nn.Parameter(torch.zeros(3))
    holder.grad = x
    book.note(x, x)
    start = time.monotonic()
    book.settle()
    assert time.monotonic() - start >= inflight.PATIENCE and holder.grad is not None
