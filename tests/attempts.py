"""Saves that may fail: what they raise, what the folder holds afterwards, and whether the next one is good."""

from __future__ import annotations

import errno

import checkpoints
import torch.distributed as dist
import zoo

from funczero.checkpoint import Checkpointer, folder, manifest
from funczero.testing import tree_hash

CHAIN = "3 [grad acc"


def started(size, updates=1):
    """A step and its state after some updates."""
    step = checkpoints.make(CHAIN, size)
    return step, checkpoints.train(step, step.init(zoo.params(), key=7), 0, updates)


def bits(state):
    """This rank's part."""
    return tree_hash({n: x for n, (_, _, x) in checkpoints.parts(state).items()})


class At:
    """What a Checkpointer calls at the points of a save: at one of them it does something, or raises it, as long as it
    is on.
    """

    def __init__(self, point, does, rank=None):
        """`rank`: the one on which it happens; None: all of them."""
        self.point, self.does, self.rank, self.on = point, does, rank, True

    def __call__(self, point):
        if self.on and point == self.point and self.rank in (None, dist.get_rank() if dist.is_initialized() else 0):
            if isinstance(self.does, Exception):
                raise self.does
            self.does()


def told(fn):
    """What a call raises: its type and sentence; None where it does not."""
    try:
        fn()
    except Exception as e:
        return type(e).__name__, str(e)


def saves(ck, state, *names, **kw):
    """Save and wait; what was raised."""

    def run():
        for name in names:
            ck.save(state, name, **kw)
            ck.wait()

    return told(run)


def there(directory):
    """Everything in a folder but the lock."""
    return sorted(p.name for p in directory.iterdir() if p.name != ".funczero-lock") if directory.exists() else []


def whole(directory, *names):
    """These checkpoints alone are there, in order of their commits, and no file is strange."""
    found = folder.listing(directory)
    assert [e.path.name for e in found.entries] == list(names) and there(directory) == sorted(names), (
        there(directory),
        found,
    )
    for e in found.entries:
        assert not manifest.check_files(e.path, e.manifest, strangers=True)


def dealt(run_world, directory, fn, *args, at=None):
    """`fn(ck, state, directory, *args)` in both ranks, then a good save by the same checkpointer: (what ranks said,
    what restores at the end).

    Args:
      at: an `At` for the Checkpointer of each rank, on until `fn` has returned; `fn` takes it before its `args`.
    """
    results = run_world(2, _dealt, directory, fn, at, *args)
    assert all(good is None for _, good, _ in results), results
    step = checkpoints.make(CHAIN, 1)
    found = Checkpointer(directory).restore(like=(step, checkpoints.abstract()))
    joined = checkpoints.joined([parts for *_, parts in results])
    assert found.name == "good" and not checkpoints.same(checkpoints.joined([checkpoints.parts(found.state)]), joined)
    return [said for said, *_ in results]


def _dealt(directory, fn, at, *args):
    step, state = started(2)
    passing = at or At("", None)
    ck = Checkpointer(directory, step=step, join=2.0, passing=passing)
    said = fn(ck, state, directory, *([at] if at else []), *args)
    passing.on = False
    state = checkpoints.train(step, state, 1, 2)
    return said, saves(ck, state, "good"), checkpoints.parts(state)


def no_space(victim, where):
    """A write, or a later step, that finds the disk full on one rank."""
    full = OSError(errno.ENOSPC, "No space left on device", "somewhere")
    cannot = ValueError('RESOURCE_EXHAUSTED: Error writing "d/x" [tensorstore_spec=...]')
    point, error = {
        "write": ("chunk", full),
        "tensorstore": ("chunk", cannot),
        "merge": ("merged", cannot),
        "seal": ("merged", full),
    }[where]
    return At(point, error, victim)


def steps(n):
    """States of updates 1 to n."""
    step, state = started(1, 0)
    out = []
    for t in range(n):
        state = checkpoints.train(step, state, t, t + 1)
        out.append(state)
    return step, out
