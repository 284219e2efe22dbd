"""`deepspeed.utils.groups`: who shares what. All processes share the batch, and nothing else is shared here.

The underscores are DeepSpeed's: programs import these very names.
"""

from __future__ import annotations

from typing import Any

from funczero.deepspeed import comm
from funczero.deepspeed.engine.ranks import get_rank, get_world_size


def _get_data_parallel_group() -> Any:
    """All processes."""
    return comm.__getattr__("group").WORLD


def _get_data_parallel_rank() -> int:
    """This process."""
    return get_rank()


def _get_data_parallel_world_size() -> int:
    """All processes."""
    return get_world_size()


def _get_sequence_parallel_rank() -> int:
    """There is no sequence parallelism here."""
    return 0


def _get_sequence_parallel_world_size() -> int:
    """There is no sequence parallelism here."""
    return 1


def __getattr__(name: str) -> Any:
    """What is not here, by name."""
    if name.startswith("__"):
        raise AttributeError(name)
    why = "there is data parallelism alone: no sequence, tensor, pipeline or expert groups"
    raise AttributeError(f"deepspeed.utils.groups.{name}: {why}; write stage 3, which shards over all processes")
