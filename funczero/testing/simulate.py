"""Many ranks in one process: one thread each, for tests and for teaching.

torch's own threaded process group does the sending, so that what runs is the code of a real rank: meshes, groups,
collectives. It is private to torch's tests, hence used here alone. Ranks share one interpreter: this shows what a world
computes, not how fast. Each draws from a torch generator of its own; python's and numpy's, which threads share, may not
be drawn from inside a step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from funczero.gradients.own_draws import OwnGenerator, Routed, turns

GRACE = 5.0  # seconds that the other ranks have to end once one has failed
POLL = 0.05  # seconds between two looks at the ranks


class Failure(NamedTuple):
    """What a rank raised."""

    rank: int
    error: BaseException


def simulate(sizes: Mapping[str, int], timeout: float = 60.0) -> Callable[..., list[Any]]:
    """`simulate({"node": 2, "local": 4})(fn, *args)`: fn(*args) as each of 8 ranks; the results by rank.

    Inside fn the world is there as if torchrun had made it: `train_step(..., mesh={"node": 2, "local": 4})` joins it,
    `dist.get_rank()` is the rank. Build the step inside fn, since a step belongs to one rank.

    >>> simulate({"data": 3})(lambda: dist.get_rank())
    [0, 1, 2]

    Args:
      sizes: mesh axes with their sizes; their product is the number of ranks.
      timeout: seconds for all ranks together.

    Raises:
      the exception of the rank that raised first, with a note that names the rank; the others end.
      RuntimeError: ranks wait for others that have returned, or for each other; where each of them is.
      TimeoutError: where each rank is that has not returned in time.
    """
    size = prod(sizes.values())
    if not sizes or any(type(n) is not int or n < 1 for n in sizes.values()):
        raise ValueError(
            f"simulate: {dict(sizes)!r} are not the sizes of a mesh; write a positive number of ranks for every axis,"
            " as {'data': 8}"
        )

    def run(fn: Callable[..., Any], *args: Any) -> list[Any]:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"simulate: this process is rank {dist.get_rank()} of a world of {dist.get_world_size()}; call it in a"
                " process without a world"
            )
        return _run(size, timeout, lambda: fn(*args))

    return run


def _run(size: int, timeout: float, call: Callable[[], Any]) -> list[Any]:
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    group, store, width, lock = threaded.ProcessLocalGroup, dist.HashStore(), torch.get_num_threads(), turns()
    results: dict[int, Any] = {}
    failures: list[Failure] = []

    def rank_of(rank: int) -> None:
        torch.set_num_threads(width)
        dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
        try:
            with OwnGenerator(lock) as own:
                own.generator.manual_seed(torch.initial_seed())
                results[rank] = call()
        except SystemExit:  # how the group wakes those who wait for a rank that has failed
            if not group._terminate.is_set():
                results[rank] = None
        except BaseException as error:
            failures.append(Failure(rank, error))
            group.exception_handle(error)
        finally:
            dist.destroy_process_group()

    # ranks inside collectives that others have not joined: all that are left, and nothing will move again
    def waiting() -> int:
        return sum(c._count for c in list(group._cur_coll_on_pgs.values()) if c._count < c._world_size)

    ranks = [threading.Thread(target=rank_of, args=(r,), name=f"rank{r}of{size}", daemon=True) for r in range(size)]
    with _threaded_world(threaded):
        for rank in ranks:
            rank.start()
        problem = _wait(ranks, timeout, lambda: bool(failures), waiting)
        if problem is not None or failures:
            group.exception_handle(problem or failures[0].error)
            _wait(ranks, GRACE, lambda: False, lambda: 0)
    if failures:
        first = failures[0]
        first.error.add_note(
            f"simulate: rank {first.rank} of {size} raised first{_others([f.rank for f in failures[1:]])}"
        )
        raise first.error
    if problem is not None:
        raise problem
    return [results[r] for r in range(size)]


@contextlib.contextmanager
def _threaded_world(threaded: Any) -> Iterator[None]:
    """torch's process groups are those of threads, and its default generator is each thread's own; then neither is."""
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
    torch.random.default_generator = Routed(torch.default_generator)  # type: ignore[assignment]
    isolate(True)  # before the world is replaced: groups of the same name belong to different ranks
    threaded._install_threaded_pg()
    try:
        with torch.compiler.set_stance("force_eager"):  # what is compiled draws in ways of its own
            yield
    finally:
        threaded._uninstall_threaded_pg()
        isolate(False)
        torch.random.default_generator = torch.default_generator
        threaded.ProcessLocalGroup.reset()


def _others(ranks: list[int]) -> str:
    return f"; so did ranks {sorted(ranks)}" if ranks else ""


def _wait(
    ranks: list[threading.Thread], timeout: float, failed: Callable[[], bool], waiting: Callable[[], int]
) -> Exception | None:
    """Until all ranks have returned or one has failed; what is wrong where neither will happen."""
    until, stuck = time.monotonic() + timeout, False
    while alive := [r for r, t in enumerate(ranks) if t.is_alive()]:
        if failed():
            return None
        ranks[alive[0]].join(POLL)
        before, stuck = stuck, waiting() == sum(t.is_alive() for t in ranks) > 0
        if before and stuck:
            left = [r for r, t in enumerate(ranks) if not t.is_alive()]
            what = (
                f"wait for ranks {left}, which have returned"
                if left
                else "wait for each other in different collectives"
            )
            return RuntimeError(
                f"simulate: ranks {[r for r in range(len(ranks)) if r not in left]} {what}; every rank must make the"
                f" same calls\n{_stacks(ranks)}"
            )
        if time.monotonic() > until:
            return TimeoutError(
                f"simulate: ranks {alive} of {len(ranks)} did not return within {timeout:g} s; this is where they"
                f" are\n{_stacks(ranks)}"
            )
    return None


def _stacks(ranks: list[threading.Thread]) -> str:
    """Where each rank is that has not returned, without torch's own frames."""
    frames = sys._current_frames()
    hidden = (os.path.dirname(torch.__file__), threading.__file__, __file__)
    places = {
        r: traceback.extract_stack(frames[t.ident]) for r, t in enumerate(ranks) if t.ident in frames and t.is_alive()
    }
    return "".join(
        f"rank {r}:\n{''.join(traceback.format_list([f for f in place if not f.filename.startswith(hidden)][-4:]))}"
        for r, place in places.items()
    )
