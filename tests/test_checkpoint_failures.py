"""Saves that cannot be: all ranks are told, nothing is left behind, the next one works."""

from __future__ import annotations

import errno
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from attempts import At, dealt, no_space, saves, started, there, whole

import funczero as fz
from funczero.checkpoint import Checkpointer, folder
from funczero.testing import tree_hash

# failures of the disk


def before_and_then(ck, state, directory, at):
    at.on = False
    assert saves(ck, state, "before") is None
    at.on = True
    return saves(ck, state, "bad")


@pytest.mark.parametrize(
    "victim, where",
    [
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((0, "write"), (0, "merge"))),
        *((1, "write"), (1, "tensorstore"), (0, "seal")),
    ],
)
def test_disk_full_on_one_rank(run_world, tmp_path, victim, where):
    first, second = dealt(run_world, tmp_path, before_and_then, at=no_space(victim, where))
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
            shutil.rmtree(folder.remove(directory / str(name)))
    return said, n, (saves(ck, state, "good"), latest)


def test_no_permission(run_world, tmp_path):
    denied = At("begun", PermissionError(errno.EACCES, "Permission denied", str(tmp_path)))
    first, second = dealt(run_world, tmp_path, before_and_then, at=denied)
    assert (
        first[0] == second[0] == "PermissionError"
        and "Permission denied" in first[1]
        and "Permission denied" in second[1]
    )
    whole(tmp_path, "before", "good")


def bad_save(ck, state, directory, at):
    return saves(ck, state, "bad")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_writer_raises(run_world, tmp_path, victim):
    first, second = dealt(run_world, tmp_path, bad_save, at=At("chunk", ZeroDivisionError("a bug"), victim))
    assert first == second and first[0] == "CheckpointError" and "a bug" in first[1] and "'bad'" in first[1]
    whole(tmp_path, "good")


# ranks that do not agree


def one_does_not_come(directory, absent):
    """A rank saves, the other does so only after the first has lost its patience; then both together."""
    step, state = started(2)
    ck, rank, said = Checkpointer(directory, step=step, join=0.5, silence=1.5), dist.get_rank(), None
    start = time.monotonic()
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
