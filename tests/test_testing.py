"""The pool of workers: results by rank, errors that name the rank, and no test that hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from funczero.testing import WorkerPool, tree_hash


class OddError(Exception):
    """An exception that pickles but does not unpickle: its constructor wants two arguments."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


def pid_and_rank() -> tuple[int, int]:
    return os.getpid(), dist.get_rank()


def environment() -> tuple[str, ...]:
    return tuple(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS"))


def threads() -> int:
    return torch.get_num_threads()


def all_reduced(x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = x * (dist.get_rank() + 1)
    dist.all_reduce(y)
    return {"sum": y, "mine": x.clone().requires_grad_() * 2}


def mesh_places() -> list[int]:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local")).get_coordinate()


def raise_at(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"a bad leaf at rank {rank}")
    dist.barrier()


def raise_everywhere() -> None:
    raise KeyError("w")


def raise_odd() -> None:
    raise OddError("a shape", "w1")


def hang_at(rank: int) -> int:
    if dist.get_rank() == rank:
        threading.Event().wait()
    return rank


def die_at(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def unpicklable() -> object:
    return threading.Lock()


def add(a: int, b: int) -> int:
    return a + b


@pytest.fixture
def pool():
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture
def hasty():
    """Once a rank has raised, the other one has little time."""
    with WorkerPool(2, grace=0.3) as pool:
        yield pool


@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_come_by_rank(run_world, size):
    found = run_world(size, pid_and_rank)
    assert [rank for _, rank in found] == list(range(size))
    assert len({pid for pid, _ in found} - {os.getpid()}) == size


def test_workers_stay(run_world):
    assert run_world(2, pid_and_rank) == run_world(2, pid_and_rank)


def test_workers_are_ranks_of_torchrun_with_one_thread(run_world):
    assert run_world(2, environment) == [("0", "2", "0", "1"), ("1", "2", "1", "1")]
    assert run_world(2, threads) == [1, 1] == [threads()] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tensors_go_and_come_by_value(run_world, dtype):
    x = torch.arange(4).to(dtype)
    for result in run_world(2, all_reduced, x):
        assert result["sum"].dtype == dtype and torch.equal(result["sum"], x * 3)
        assert result["mine"].requires_grad and torch.equal(result["mine"], x * 2)
    assert torch.equal(x, torch.arange(4).to(dtype))


def test_a_mesh_can_be_made_in_every_run(run_world):
    for _ in range(3):
        assert [list(place) for place in run_world(4, mesh_places)] == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_partials_and_builtins_can_be_sent(run_world):
    assert run_world(2, partial(add, b=2), 1) == [3, 3]
    assert run_world(2, os.getenv, "RANK") == ["0", "1"]


def test_a_local_function_is_refused(run_world):
    with pytest.raises(TypeError, match=r"cannot send .*<lambda> .*; give a function at a module's top level"):
        run_world(2, lambda: 1)
    with pytest.raises(TypeError, match="cannot pickle"):
        run_world(2, unpicklable)


def test_an_exception_names_the_rank_and_the_pool_goes_on(hasty):
    begin = time.monotonic()
    with pytest.raises(ValueError, match="a bad leaf at rank 1") as caught:
        hasty.run(raise_at, 1)
    assert time.monotonic() - begin < 20  # rank 0 hangs in its barrier and is not waited for
    (note,) = caught.value.__notes__
    assert note.startswith("raise_at: rank 1 of 2 raised first; ranks [0] had not answered 0.3 s later and were ended")
    assert "Traceback" in note and 'raise ValueError(f"a bad leaf at rank {rank}")' in note
    assert "rank 0:" in note and "in barrier" in note
    assert hasty.run(add, 1, 2) == [3, 3]


def test_an_exception_in_every_rank_is_raised_once(pool):
    with pytest.raises(KeyError, match="w") as caught:
        pool.run(raise_everywhere)
    assert "of 2 raised first; so did ranks" in caught.value.__notes__[0]
    assert pool.run(add, 1, 2) == [3, 3]


def test_an_exception_that_does_not_unpickle_keeps_its_words(pool):
    with pytest.raises(RuntimeError, match="OddError: a shape at w1"):
        pool.run(raise_odd)


def test_a_hang_is_ended_and_names_the_rank(pool):
    before = pool.run(pid_and_rank)
    with pytest.raises(TimeoutError, match=r"hang_at: ranks \[1\] of 2 did not answer within 0.5 s") as caught:
        pool.run(hang_at, 1, timeout=0.5)
    assert "in hang_at" in str(caught.value)
    after = pool.run(pid_and_rank)
    assert not {pid for pid, _ in before} & {pid for pid, _ in after}
    assert not any(_alive(pid) for pid, _ in before)


def test_a_worker_that_dies_is_named(hasty):
    with pytest.raises(RuntimeError, match="the process ended by itself, with exit code -9") as caught:
        hasty.run(die_at, 0)
    assert "die_at: rank 0 of 2 raised first" in caught.value.__notes__[0]
    assert hasty.run(add, 1, 2) == [3, 3]


def test_workers_are_started_afresh_after_so_many_runs():
    with WorkerPool(1, runs=2) as pool:
        first, second, third = (pool.run(pid_and_rank) for _ in range(3))
    assert first == second != third


def test_workers_end_with_the_process_that_holds_them(ends, tmp_path):
    code = (
        "from funczero.testing import WorkerPool; import os, sys; print(*WorkerPool(2).run(os.getpid), flush=True);"
        " os.kill(os.getpid(), 9)"
    )
    (told,) = ends.run(tmp_path / "life", code)
    pids = [int(pid) for pid in told["out"].split()]
    deadline = time.monotonic() + 10
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(_alive, pids))


def test_a_world_has_a_process():
    with pytest.raises(ValueError, match="at least one process, but size is 0"):
        WorkerPool(0)


def test_a_hash_is_of_bits_paths_and_types():
    tree = {"w": torch.zeros(2, 3), "b": [torch.ones(1), 3]}
    assert tree_hash(tree) == tree_hash({"b": [torch.ones(1), 3], "w": torch.zeros(3, 2).T})
    others = [
        {"w": -torch.zeros(2, 3)},
        {"w": torch.zeros(3, 2)},
        {"w": torch.zeros(2, 3, dtype=torch.int32)},
        {"v": tree["w"]},
        {"b": [torch.ones(1), 4]},
    ]
    hashes = {tree_hash(tree), *(tree_hash(tree | other) for other in others)}
    assert len(hashes) == 1 + len(others)
    assert tree_hash([torch.zeros(0, dtype=torch.bfloat16), torch.tensor(True)]) != tree_hash(
        [torch.zeros(0), torch.tensor(True)]
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
