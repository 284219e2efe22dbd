"""A save runs beside all else: beside another process, beside training, and in silence until somebody asks for it."""

from __future__ import annotations

import errno
import logging
import threading
import time

import checkpoints
import pytest
import torch
import torch.distributed as dist
from attempts import At, bits, saves, started, steps, whole

import funczero as fz
from funczero.checkpoint import Checkpointer, CheckpointError

# two processes


def test_two_processes_in_one_folder(ends, tmp_path, tmp_path_factory):
    """The second is refused while the first writes; its files are not taken for leftovers."""
    step, state = started(1)
    inside, go = threading.Event(), threading.Event()

    def held():
        inside.set()
        go.wait(300)

    ck, other = Checkpointer(tmp_path, step=step, passing=At("written", held)), Checkpointer(tmp_path)
    ck.save(state, 1)
    assert inside.wait(120)
    # The writer is held until the other process has spoken, however long its imports take on a busy machine.
    code = f"""if True:
        import attempts as t
        from funczero.checkpoint import Checkpointer
        from pathlib import Path
        print(t.saves(Checkpointer(Path({str(tmp_path)!r})), t.started(1)[1], 2))"""
    (said,) = ends.run(tmp_path_factory.mktemp("other"), code, limit=200, short=True)
    refused = saves(other, state, 3)
    go.set()
    ck.wait()
    assert "another process is saving into" in said["out"], said
    assert "another process is saving into" in refused[1]
    assert saves(other, state, 3) is None
    whole(tmp_path, "1", "3")


# a slow rank


class Slow(dict):
    """Metrics that take long to be read."""

    def items(self):
        time.sleep(2.5)
        return super().items()


def slow_inside(directory, slow):
    step, state = started(2)
    ck = Checkpointer(directory, step=step, join=1.0)
    ck.save(state, 1, metrics=Slow(loss=1.0) if dist.get_rank() == slow else {"loss": 1.0})
    return ck.wait(), ck.restore(like=state).step


@pytest.mark.parametrize("slow", [0, 1])
def test_a_rank_that_is_inside_may_take_its_time(run_world, tmp_path, slow):
    """As rank 0 does that imports what the first save needs on a busy machine."""
    assert run_world(2, slow_inside, tmp_path, slow) == [("1", 1)] * 2


def one_cannot_go_on(directory, victim):
    step, state = started(2)
    ck = Checkpointer(directory, step=step, join=3.0)
    ck.save(state, 1)
    ck.wait()
    begun = time.monotonic()
    like = (step, {"not": "a tensor"}) if dist.get_rank() == victim else state
    try:
        ck.restore(like=like)
    except Exception as error:
        return type(error).__name__, time.monotonic() - begun < 3.0
    return "went on", False


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_cannot_go_on_ends_the_restore_of_all(run_world, tmp_path, victim):
    assert all(soon and kind != "went on" for kind, soon in run_world(2, one_cannot_go_on, tmp_path, victim))


# poll


def polled(directory, victim):
    """At which step boundary poll says what, while steps take different times on the ranks."""
    step, state = started(2)
    rank, out = dist.get_rank(), []

    def late():
        time.sleep(0.1)
        if victim == rank:
            raise OSError(errno.ENOSPC, "No space left on device")

    at = At("made", late)
    ck = Checkpointer(directory, step=step, passing=at)
    ck.save(state, "polled")
    for t in range(1, 200):
        time.sleep(0.01 * (rank == t % 2))
        state = checkpoints.train(step, state, t % 3, t % 3 + 1)
        try:
            if (name := ck.poll()) is not None:
                out.append((t, name))
                break
        except (OSError, CheckpointError) as e:
            out.append((t, type(e).__name__, str(e)))
            break
    assert ck.poll() is None
    at.on = False
    return out, saves(ck, state, "good")


@pytest.mark.parametrize("victim", [None, 0, 1])
def test_poll_speaks_at_the_same_boundary(run_world, tmp_path, victim):
    first, second = run_world(2, polled, tmp_path, victim)
    assert first == second and len(first[0]) == 1 and first[1] is None, (first, second)
    if victim is None:
        assert first[0][0][1] == "polled"
    else:
        assert "No space left" in first[0][0][2]
    whole(tmp_path, *["polled"] * (victim is None), "good")


def test_failures_are_told_once_by_wait_close_and_the_next_save(tmp_path):
    _, state = started(1)
    for how in ("wait", "close", "save", "exit", "poll"):
        fails = At("chunk", OSError(errno.ENOSPC, "No space left on device"))
        ck = Checkpointer(tmp_path / how, passing=fails)
        ck.save(state, 1)
        ck._saving.ended.wait()
        with pytest.raises((OSError, CheckpointError), match="No space left"):
            if how == "exit":
                with ck:
                    pass
            else:
                ck.save(state, 2) if how == "save" else getattr(ck, how)()
        fails.on = False
        assert ck.wait() is None and ck.poll() is None
        assert saves(ck, state, 1) is None
        whole(tmp_path / how, "1")


# beside training


def donated(directory):
    """Training goes on, in place, while what was saved still waits to be written."""
    step, state = started(2)
    step = fz.donate(step)
    state = checkpoints.train(step, state, 1, 2)
    before, go = checkpoints.parts(state), threading.Event()
    ck = Checkpointer(directory, step=step, passing=At("made", lambda: go.wait(30)))
    ck.save(state, 2, client_state={"x": (x := torch.ones(3))})
    x.zero_() if dist.get_rank() == 0 else None
    state = checkpoints.train(step, state, 2, 5)
    go.set()
    ck.wait()
    found = ck.restore(like=state)
    return before, checkpoints.parts(found.state), found.client_state["x"].tolist(), bits(found.state) != bits(state)


def test_the_saved_step_is_on_disk_though_training_goes_on_in_place(run_world, tmp_path):
    results = run_world(2, donated, tmp_path)
    assert not checkpoints.same(*[checkpoints.joined([r[i] for r in results]) for i in (0, 1)])
    assert all(x == [1.0] * 3 and moved for *_, x, moved in results)


def test_quiet(tmp_path, caplog):
    """Nothing is logged or printed by a good save and restore, and no handler is added."""
    step, states = steps(1)
    root = list(logging.getLogger().handlers)
    with caplog.at_level(logging.WARNING), Checkpointer(tmp_path) as ck:
        ck.save(states[0], 1)
        ck.wait()
        ck.restore(like=states[0])
    assert not caplog.records and logging.getLogger().handlers == root
