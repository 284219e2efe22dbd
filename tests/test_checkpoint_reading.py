"""A restore that one rank leaves, and reads that go on while another has failed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from attempts import saves, started

from funczero.checkpoint import Checkpointer, reading
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.parts import Reader


class Slow(Reader):
    """A store whose reads take a while, of which one leaf is damaged."""

    def __init__(self, pool):
        super().__init__(None, {})
        self._pool, self.begun = pool, threading.Event()

    def open(self):
        pass

    def look(self, ask):
        return [self._pool.submit(int)]

    def check(self, ask, looks):
        if ask.name == "damaged":
            assert self.begun.wait(10)
            raise CheckpointError("damaged")

    def read(self, ask, out):
        def fill():
            self.begun.set()
            time.sleep(0.1)
            out.fill_(1)

        return self._pool.submit(fill)


def test_nothing_is_read_into_memory_once_a_sibling_has_failed_and_that_is_told():
    """The memory may be a donated state's, which the next older checkpoint is read into."""
    memory = torch.zeros(4)
    with ThreadPoolExecutor(2) as pool:
        reader = Slow(pool)
        reader.ask("good", (), lambda: memory)
        reader.ask("damaged", (), lambda: torch.zeros(4))
        with pytest.raises(CheckpointError, match="damaged"):
            reader.finish()
        assert memory.tolist() == [1] * 4
        memory.zero_()
    assert memory.tolist() == [0] * 4


def interrupted(directory, victim):
    """Both save; then one is interrupted while it reads, and goes on with something else."""
    step, state = started(2)
    ck = Checkpointer(directory, step=step, join=5.0)
    assert saves(ck, state, "good") is None
    how = mock.patch.object(reading, "read", side_effect=KeyboardInterrupt) if dist.get_rank() == victim else None
    said, start = None, time.monotonic()
    try:
        if how is None:
            ck.restore(like=state)
        else:
            with how:
                ck.restore(like=state)
    except (CheckpointError, KeyboardInterrupt) as e:
        said = type(e).__name__, str(e)
    took = time.monotonic() - start
    dist.barrier()
    return said, took, ck.restore(like=state).step


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_leaves_a_restore_is_named(run_world, tmp_path, victim):
    results = run_world(2, interrupted, tmp_path, victim)
    (kind, text), took, again = results[1 - victim]
    assert kind == "CheckpointError" and f"left by KeyboardInterrupt while it was read (rank {victim})" in text
    assert took < 15 and results[victim][0][0] == "KeyboardInterrupt" and again == results[victim][2] == 1
