"""Saves that cannot be: all ranks are told, nothing is left behind, the next one works. And what a folder keeps, and in which order."""

from __future__ import annotations

import errno
import logging
import math
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext

import checkpoints
import numpy as np
import pytest
import torch
import torch.distributed as dist
import zoo

import funczero as fz
from funczero.checkpoint import Checkpointer, CheckpointError, commit, folder, lines, manifest, saving
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
    """`fn(ck, state, directory, *args)` in both ranks, then a good save by the same checkpointer: (what ranks said, what restores at the end)."""
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


# failures of the disk


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


def on_a_full_disk(ck, state, directory, victim, where):
    assert saves(ck, state, "before") is None
    with no_space(victim, where):
        said = saves(ck, state, "full")
    return said


@pytest.mark.parametrize("victim, where", [(0, "write"), (1, "write"), (1, "tensorstore"), (0, "merge"), (0, "seal")])
def test_disk_full_on_one_rank(run_world, tmp_path, victim, where):
    first, second = dealt(run_world, tmp_path, on_a_full_disk, victim, where)
    assert first == second and first[0] in ("CheckpointError", "OSError"), (first, second)
    assert ("No space left" in first[1] or "RESOURCE_EXHAUSTED" in first[1]) and "[tensorstore" not in first[1]
    assert victim == 0 or "rank 1" in first[1]
    whole(tmp_path, "before", "good")


def test_disk_full(tmp_path, run_world):
    """A file system of 700 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        results = run_world(2, fill_up, disk / "run")
        assert results[0][0] == results[1][0]
        kind, text = results[0][0]
        assert kind in ("CheckpointError", "OSError") and (
            "No space left" in text or "RESOURCE_EXHAUSTED" in text
        ), text
        names = [str(i) for i in range(results[0][1])]
        assert names and results[0][2] == results[1][2] == (None, names[-1])
        whole(disk / "run", names[-1], "good")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill_up(directory):
    """Saves until it is full; then room is made, and it goes on."""
    step, state = started(2)
    ck, n = Checkpointer(directory, step=step), 0
    while (said := saves(ck, state, n)) is None:
        n += 1
    latest = ck.restore(like=state).name
    if dist.get_rank() == 0:
        for name in range(n - 1):
            folder.remove(directory / str(name))
    return said, n, (saves(ck, state, "good"), latest)


def without_permission(ck, state, directory):
    assert saves(ck, state, "before") is None

    def denied(*args, **kw):
        raise PermissionError(errno.EACCES, "Permission denied", str(directory))

    with patched(os, "open", denied) if dist.get_rank() == 0 else nullcontext():
        return saves(ck, state, "denied")


def test_no_permission(run_world, tmp_path):
    first, second = dealt(run_world, tmp_path, without_permission)
    assert (
        first[0] == second[0] == "PermissionError"
        and "Permission denied" in first[1]
        and "Permission denied" in second[1]
    )
    whole(tmp_path, "before", "good")


def a_writer_raises(ck, state, directory, victim):
    def raises(*args, **kw):
        raise ZeroDivisionError("a bug")

    with patched(saving, "write", raises) if dist.get_rank() == victim else nullcontext():
        return saves(ck, state, "bad")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_writer_raises(run_world, tmp_path, victim):
    first, second = dealt(run_world, tmp_path, a_writer_raises, victim)
    assert first == second and first[0] == "CheckpointError" and "a bug" in first[1] and "'bad'" in first[1]
    whole(tmp_path, "good")


# ranks that do not agree


def one_does_not_come(directory, absent):
    """A rank saves, the other does so only after the first has lost its patience; then both together."""
    step, state = started(2)
    ck, rank, said, start = Checkpointer(directory, step=step, join=0.5), dist.get_rank(), None, time.monotonic()
    with patched(lines, "DEAD", 1.5):
        for turn in (1 - absent, absent):
            said = saves(ck, state, "alone") if rank == turn else said
            took = time.monotonic() - start
            dist.barrier()
        return said, took, there(directory), saves(ck, state, "good")


@pytest.mark.parametrize(
    "absent", [pytest.param(0, marks=pytest.mark.slow), 1]
)  # rank 0's word is waited for some 10 s longer than other ranks are
def test_a_rank_that_does_not_come(run_world, tmp_path, absent):
    results = run_world(2, one_does_not_come, tmp_path, absent)
    said, *_ = results[1 - absent]
    assert said[0] == "CheckpointError" and f"rank {absent} did not come within" in said[1]
    for (kind, _), took, left, good in results:
        assert (
            kind == "CheckpointError" and took < 20 and good is None and all(x.endswith(folder.TEMPORARY) for x in left)
        )
    whole(tmp_path, "good")


class Strange:
    """What no checkpoint holds."""


def strange_client(ck, state, directory, value):
    said = [
        saves(ck, state, "bad", client_state={"deep": [1, {"x": Strange() if v == "object" else v}]}) for v in value
    ]
    dist.barrier()
    return said, there(directory)


def test_client_states_that_cannot_be_encoded(run_world, tmp_path):
    """Refused by its path before anything is written, on all ranks, though rank 0 alone looks at it."""
    values = [
        "object",
        {1, 2},
        np.array(["a"]),
        np.array([object()]),
        {(1, 2): 3},
        torch.empty(2, device="meta"),
        print,
        np.datetime64("2020-01-01"),
    ]
    first, second = dealt(run_world, tmp_path, strange_client, values)
    for a, b in zip(first[0], second[0], strict=True):
        assert a[0] == b[0] == "TypeError" and "'client/deep/1/x'" in a[1] and "'client/deep/1/x'" in b[1], (a, b)
    assert first[1] == second[1] == []


def client_arrays(directory):
    """Rank 0's alone; other ranks bring others, or none."""
    step, state = started(2)
    size = 5 if dist.get_rank() == 0 else 7
    client = {"a": [torch.arange(i * size) for i in range(20)], "big": torch.ones(300 * size, 100), "n": size}
    with Checkpointer(directory, step=step) as ck:
        ck.save(state, 1, client_state=client)
        ck.save(state, 2, client_state=client if dist.get_rank() == 0 else None)
        ck.wait()
        return [tree_hash(ck.restore(name, like=state).client_state) for name in (1, 2)]


def test_client_arrays_are_rank_0s(run_world, tmp_path):
    right = tree_hash({"a": [torch.arange(i * 5) for i in range(20)], "big": torch.ones(1500, 100), "n": 5})
    assert run_world(2, client_arrays, tmp_path) == [[right, right]] * 2


def bad_arguments(ck, state, directory):
    rank = dist.get_rank()
    out = [
        saves(ck, state if rank == 0 else fz.tree.leaves(state), "bad"),
        saves(ck, state, "bad" if rank == 0 else "la/tte"),
        saves(ck, state, "../bad"),
        saves(ck, state, "latest"),
        saves(ck, state, True),
        saves(ck, state, "bad", metrics={"loss": "small"} if rank == 1 else None),
    ]
    dist.barrier()
    return out, there(directory)


def test_arguments_that_one_rank_gets_wrong(run_world, tmp_path):
    first, second = dealt(run_world, tmp_path, bad_arguments)
    for a, b in zip(first[0], second[0], strict=True):
        assert a is not None and b is not None and a[0] == b[0] == "ValueError", (a, b)
    assert first[1] == second[1] == []


# names that are taken


def taken(directory):
    step, state = started(2)
    out = []
    with Checkpointer(directory, step=step) as ck:
        assert saves(ck, state, "a", "b") is None
        out.append(saves(ck, state, "a"))
        later = checkpoints.train(step, state, 1, 2)
        assert saves(ck, later, "a", overwrite=True) is None
        assert saves(ck, later, "new", overwrite=True) is None
        out += [
            bits(ck.restore("a", like=state).state) == bits(later),
            bits(ck.restore("b", like=state).state) == bits(state),
        ]
        out.append([e.path.name for e in folder.listing(directory).entries])
        with no_space(1, "write"):
            out.append(saves(ck, state, "a", overwrite=True))
        out.append(bits(ck.restore("a", like=state).state) == bits(later))
        assert saves(ck, state, "c") is None
    return out


def test_a_name_that_is_there(run_world, tmp_path):
    """It is refused, or with overwrite replaced: a failed replacement leaves the old one."""
    for refused, replaced, untouched, order, failed, still in run_world(2, taken, tmp_path):
        assert refused[0] == "FileExistsError" and "overwrite=True" in refused[1]
        assert (
            replaced
            and untouched
            and order == ["b", "a", "new"]
            and failed[0] in ("CheckpointError", "OSError")
            and still
        )
    whole(tmp_path, "b", "a", "new", "c")


def test_an_empty_folder_of_that_name_is_a_name_that_is_there(tmp_path):
    _, state = started(1)
    (tmp_path / "7").mkdir()
    ck = Checkpointer(tmp_path)
    assert saves(ck, state, 7)[0] == "FileExistsError"
    assert saves(ck, state, 7, overwrite=True) is None
    whole(tmp_path, "7")


# two processes


def test_two_processes_in_one_folder(tmp_path):
    """The second is refused while the first writes; its files are not taken for leftovers."""
    step, state = started(1)
    ck, other = Checkpointer(tmp_path, step=step), Checkpointer(tmp_path)
    inside, go = threading.Event(), threading.Event()
    write = saving.write

    def slow(*args, **kw):
        out = write(*args, **kw)
        inside.set()
        go.wait(300)
        return out

    with patched(saving, "write", slow):
        ck.save(state, 1)
        assert inside.wait(120)
        # The writer is held until the other process has spoken, however long its imports take on a busy machine.
        code = f"""if True:
            import sys; sys.path[:0] = {sys.path[:3]!r}
            import test_checkpoint_failures as t
            from funczero.checkpoint import Checkpointer
            from pathlib import Path
            print(t.saves(Checkpointer(Path({str(tmp_path)!r})), t.started(1)[1], 2))"""
        said = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=os.path.dirname(__file__)
        )
        refused = saves(other, state, 3)
        go.set()
        ck.wait()
    assert "another process is saving into" in said.stdout, said
    assert "another process is saving into" in refused[1]
    assert saves(other, state, 3) is None
    whole(tmp_path, "1", "3")


# poll


def polled(directory, victim):
    """At which step boundary poll says what, while steps take different times on the ranks."""
    step, state = started(2)
    rank, out = dist.get_rank(), []
    ck = Checkpointer(directory, step=step)
    write = saving.write

    def late(*args, **kw):
        time.sleep(0.1)
        if victim == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kw)

    with patched(saving, "write", late):
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

    def fails(*args, **kw):
        raise OSError(errno.ENOSPC, "No space left on device")

    for how in ("wait", "close", "save", "exit", "poll"):
        ck = Checkpointer(tmp_path / how)
        with patched(saving, "write", fails):
            ck.save(state, 1)
            ck._saving.ended.wait()
            with pytest.raises((OSError, CheckpointError), match="No space left"):
                if how == "exit":
                    with ck:
                        pass
                else:
                    ck.save(state, 2) if how == "save" else getattr(ck, how)()
        assert ck.wait() is None and ck.poll() is None
        assert saves(ck, state, 1) is None
        whole(tmp_path / how, "1")


# beside training


def donated(directory):
    """Training goes on, in place, while what was saved still waits to be written."""
    step, state = started(2)
    step = fz.donate(step)
    state = checkpoints.train(step, state, 1, 2)
    before, write, go = checkpoints.parts(state), saving.write, threading.Event()

    def slow(folder_, leaves, chunks):
        go.wait(30)
        return write(folder_, leaves, chunks)

    ck = Checkpointer(directory, step=step)
    with patched(saving, "write", slow):
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


# what stays, and in which order


def steps(n):
    """States of updates 1 to n."""
    step, state = started(1, 0)
    out = []
    for t in range(n):
        state = checkpoints.train(step, state, t, t + 1)
        out.append(state)
    return step, out


def kept(directory, losses, name=lambda t: t, **how):
    """The names that stay after saves at steps 1, 2, ... with these losses."""
    _, states = steps(len(losses))
    with Checkpointer(directory, **how) as ck:
        for t, loss in enumerate(losses, 1):
            ck.save(states[t - 1], name(t), metrics=None if loss is None else {"loss": loss})
        ck.wait()
    return [e.path.name for e in folder.listing(directory).entries]


NAN = math.nan


@pytest.mark.parametrize(
    "how, losses, stay",
    [
        ({}, [1, 2, 3], ["1", "2", "3"]),
        ({"keep": 1}, [1, 2, 3], ["3"]),
        ({"keep": 2}, [1, 2, 3], ["2", "3"]),
        ({"keep": 1, "keep_period": 2}, [0] * 5, ["2", "4", "5"]),
        ({"keep_period": 2}, [0] * 3, ["1", "2", "3"]),
        ({"keep": 1, "best": ("loss", "min")}, [3, 1, 2, 4], ["2", "4"]),
        ({"keep": 1, "best": ("loss", "max")}, [3, 5, 2, 4], ["2", "4"]),
        ({"keep": 1, "best": ("loss", "min")}, [NAN, 3, NAN, 4], ["2", "4"]),
        ({"keep": 1, "best": ("loss", "max")}, [NAN, 3, NAN, 1], ["2", "4"]),
        ({"keep": 1, "best": ("loss", "min")}, [NAN, NAN, NAN], ["3"]),
        ({"keep": 1, "best": ("loss", "min")}, [None, 2, None], ["2", "3"]),
        ({"keep": 1, "best": ("loss", "min")}, [math.inf, -math.inf, 1], ["2", "3"]),
        ({"keep": 1, "best": ("loss", "min")}, [2, 2, 2], ["1", "3"]),
        ({"keep": 1, "best": ("other", "min")}, [2, 2, 2], ["3"]),
    ],
    ids=str,
)
def test_what_stays(tmp_path, how, losses, stay):
    assert kept(tmp_path, losses, **how) == stay
    whole(tmp_path, *stay)


def test_best_and_its_ties_and_nan(tmp_path):
    kept(tmp_path, [2, NAN, 1, 1, NAN], best=("loss", "min"))
    like = (checkpoints.make(CHAIN, 1), checkpoints.abstract())
    assert Checkpointer(tmp_path, best=("loss", "min")).restore("best", like=like).name == "3"
    assert Checkpointer(tmp_path, best=("loss", "max")).restore("best", like=like).name == "1"
    with pytest.raises(CheckpointError, match="has a number for the metric 'bpb'"):
        Checkpointer(tmp_path, best=("bpb", "max")).restore("best", like=like)
    with pytest.raises(ValueError, match="best"):
        Checkpointer(tmp_path).restore("best", like=like)


def test_latest_is_the_last_commit_not_the_largest_name(tmp_path):
    names = {1: 1000, 2: "zz", 3: 9, 4: 10, 5: "aa", 6: 0.693}
    assert kept(tmp_path, [0] * 6, name=names.get) == [str(x) for x in names.values()]
    like = (checkpoints.make(CHAIN, 1), checkpoints.abstract())
    assert Checkpointer(tmp_path).restore(like=like).name == "0.693"
    found = folder.listing(tmp_path).entries
    os.utime(found[0].path)  # nor the youngest folder
    assert Checkpointer(tmp_path).restore(like=like).name == "0.693"


def test_a_rollback_and_saves_anew(tmp_path):
    """Back to step 2, other data, the same names: keep counts commits, latest is the new one, nothing of the left branch comes back."""
    step, states = steps(4)
    like = (step, checkpoints.abstract())
    with Checkpointer(tmp_path, keep=3, best=("loss", "min")) as ck:
        for t in (1, 2, 3, 4):
            ck.save(states[t - 1], t, metrics={"loss": 5 - t})
        found = ck.restore(2, like=like)
        assert bits(found.state) == bits(states[1])
        state = checkpoints.train(step, found.state, 5, 6)
        assert int(state.step) == 3
        assert saves(ck, state, 3)[0] == "FileExistsError"
        assert saves(ck, state, 3, overwrite=True, metrics={"loss": NAN}) is None
        latest = ck.restore(like=like)
        assert latest.name == "3" and bits(latest.state) == bits(state) != bits(states[2])
        assert ck.restore("best", like=like).name == "4"
        whole(tmp_path, "2", "4", "3")
        ck.save(checkpoints.train(step, state, 6, 7), 4, overwrite=True)
        ck.wait()
        assert ck.restore(like=like).name == "4" and ck.restore("best", like=like).name == "2"
    whole(tmp_path, "2", "3", "4")


def test_overwriting_the_only_one_keeps_it(tmp_path):
    step, states = steps(2)
    with Checkpointer(tmp_path, keep=1) as ck:
        for state in states:
            ck.save(state, "last", overwrite=True)
    whole(tmp_path, "last")
    found = Checkpointer(tmp_path).restore(like=(step, checkpoints.abstract()))
    assert found.step == 2 and bits(found.state) == bits(states[1])


def test_quiet(tmp_path, caplog):
    """Nothing is logged or printed by a good save and restore, and no handler is added."""
    step, states = steps(1)
    root = list(logging.getLogger().handlers)
    with caplog.at_level(logging.WARNING), Checkpointer(tmp_path) as ck:
        ck.save(states[0], 1)
        ck.wait()
        ck.restore(like=states[0])
    assert not caplog.records and logging.getLogger().handlers == root
