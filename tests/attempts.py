"""Saves that may fail: what they raise, what the folder holds afterwards, and whether the next one is good."""

from __future__ import annotations

import errno
from contextlib import contextmanager, nullcontext

import checkpoints
import torch.distributed as dist
import zoo

from funczero.checkpoint import Checkpointer, commit, folder, manifest, saving
from funczero.testing import tree_hash

CHAIN = "3 [grad acc"


def started(size, updates=1):
    """A step and its state after some updates."""
    step = checkpoints.make(CHAIN, size)
    return step, checkpoints.train(step, step.init(zoo.params(), key=7), 0, updates)


def bits(state):
    """This rank's part."""
    return tree_hash({n: x for n, (_, _, x) in checkpoints.parts(state).items()})


@contextmanager
def patched(where, name, new):
    old = getattr(where, name)
    setattr(where, name, new)
    try:
        yield
    finally:
        setattr(where, name, old)


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


def dealt(run_world, directory, fn, *args):
    """`fn(ck, state, directory, *args)` in both ranks, then a good save by the same checkpointer: (what ranks said,
    what restores at the end).
    """
    results = run_world(2, _dealt, directory, fn, *args)
    assert all(good is None for _, good, _ in results), results
    step = checkpoints.make(CHAIN, 1)
    found = Checkpointer(directory).restore(like=(step, checkpoints.abstract()))
    joined = checkpoints.joined([parts for *_, parts in results])
    assert found.name == "good" and not checkpoints.same(checkpoints.joined([checkpoints.parts(found.state)]), joined)
    return [said for said, *_ in results]


def _dealt(directory, fn, *args):
    step, state = started(2)
    ck = Checkpointer(directory, step=step, join=2.0)
    said = fn(ck, state, directory, *args)
    state = checkpoints.train(step, state, 1, 2)
    return said, saves(ck, state, "good"), checkpoints.parts(state)


def no_space(victim, where):
    """A write, or a later step, that finds the disk full on one rank."""

    def full(*args, **kw):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    def cannot(*args, **kw):
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "d/x" [tensorstore_spec=...]')

    if dist.get_rank() != victim:
        return nullcontext()
    return {
        "write": patched(saving, "write", full),
        "tensorstore": patched(saving, "write", cannot),
        "merge": patched(commit, "_nested", cannot),
        "seal": patched(manifest, "seal", full),
    }[where]


def steps(n):
    """States of updates 1 to n."""
    step, state = started(1, 0)
    out = []
    for t in range(n):
        state = checkpoints.train(step, state, t, t + 1)
        out.append(state)
    return step, out
