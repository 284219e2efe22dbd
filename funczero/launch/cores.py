"""Which cores a rank is given: a list of numbers, dealt in equal neighbouring parts, and numactl's words for one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from funczero.launch.error import LaunchError

SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
MOST = 1 << 16  # cores of a host


def parse_cores(text: str) -> tuple[int, ...]:
    """`--bind_core_list` as numbers, which must rise.

    >>> parse_cores("0,2-4,6,8-9")
    (0, 2, 3, 4, 6, 8, 9)

    Raises:
      LaunchError: it is no such list.

    Source: DeepSpeed's `--bind_core_list`.
    """
    cores: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = (first, last if dash else first)
        if not all(x.isascii() and x.isdigit() and len(x) < 6 for x in ends):
            raise LaunchError(f"--bind_core_list={text}: {part!r} is no core and no range; write for example 0,2-4,8")
        low, high = map(int, ends)
        if low > high or high >= MOST or cores and low <= cores[-1]:
            raise LaunchError(f"--bind_core_list={text}: {part!r} does not rise; name every core once, in rising order")
        cores += range(low, high + 1)
    return tuple(cores)


def own_cores() -> tuple[int, ...]:
    """The physical cores that this process may use: the first of their threads."""
    allowed, seen = sorted(os.sched_getaffinity(0)), dict[str, int]()
    for n in allowed:
        path = Path(SIBLINGS.format(n))
        seen.setdefault(path.read_text().strip() if path.exists() else str(n), n)
    return tuple(sorted(seen.values()))


def dealt(cores: Sequence[int], ranks: int, host: str) -> list[tuple[int, ...]]:
    """Each rank's cores: as many for all, neighbours together.

    >>> dealt((0, 1, 2, 3, 8), 2, "worker-1")
    [(0, 1), (2, 3)]
    """
    each = len(cores) // ranks
    if not each:
        raise LaunchError(
            f"--bind_cores_to_rank: {host} has {len(cores)} cores for {ranks} ranks; start fewer, or leave it out"
        )
    return [tuple(cores[i * each : (i + 1) * each]) for i in range(ranks)]


def numactl(cores: Sequence[int]) -> list[str]:
    """The words before a command that keep it on these cores.

    >>> numactl((0, 1, 2, 4))
    ['numactl', '-C', '0-2,4']
    """
    runs: list[list[int]] = []
    for n in cores:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ["numactl", "-C", ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)]


def bound(cores: Sequence[int] | None, ranks: int, host: str) -> list[list[str]]:
    """On a host: the words before every rank's command, by local rank.

    Args:
      cores: those to deal; none: all physical ones here.

    Raises:
      LaunchError: numactl is not there, or there are too few cores.
    """
    if not shutil.which("numactl"):
        raise LaunchError(
            f"--bind_cores_to_rank: there is no numactl on {host}; install it there, or leave the option out"
        )
    if "KMP_AFFINITY" in os.environ:
        raise LaunchError(
            f"--bind_cores_to_rank: KMP_AFFINITY is set on {host} and binds threads, too; unset it, or leave the option"
            " out"
        )
    return [numactl(own) for own in dealt(cores or own_cores(), ranks, host)]
