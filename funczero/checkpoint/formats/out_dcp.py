"""A folder of torch.distributed.checkpoint, written by torch's own writer, leaf by leaf: a tensor is read when its turn
comes, and files are small, for the writer keeps the tensors of a file until all of it is written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.futures import Future

from funczero.checkpoint.formats.entry import Entry

FILE = 128 << 20  # bytes of leaves in a file of several


class _Planner(DefaultSavePlanner):
    """Plans by shapes alone; `read` gives the values of one of them."""

    def __init__(self, entries: dict[int, Entry], read: Callable[[Entry], Tensor]) -> None:
        super().__init__()
        self._entries, self._read = entries, read

    def size(self, item: Any) -> int:
        """Bytes of a leaf, and 0 of what is none."""
        x = self.state_dict[item.index.fqn]
        return self._entries[id(x)].nbytes if id(x) in self._entries else 0

    def lookup_object(self, index: Any) -> Any:
        x = self.state_dict[index.fqn]
        return self._read(self._entries[id(x)]) if id(x) in self._entries else x


class _Writer(FileSystemWriter):
    """Writes a plan as several, with a file each."""

    def write_data(self, plan: Any, planner: Any) -> Future[Any]:
        results: list[Any] = []
        for i, items in enumerate(_groups(plan.items, planner)):
            prefix = replace(plan.storage_data, prefix=f"__0_{i}_")
            results += super().write_data(replace(plan, items=items, storage_data=prefix), planner).value()
        done: Future[Any] = Future()
        done.set_result(results)
        return done


def _groups(items: list[Any], planner: _Planner) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        if group and sum(map(planner.size, (*group, item))) > FILE:
            yield group
            group = []
        group.append(item)
    yield group


def write(tree: dict[str, Any], folder: Path, read: Callable[[Entry], Tensor]) -> None:
    """A nested dict with an `Entry` in the place of every tensor, as dcp.save writes it in one process."""
    entries: dict[int, Entry] = {}
    held: list[Tensor] = []

    def shaped(x: Any) -> Any:
        if isinstance(x, Entry):
            held.append(torch.empty(x.shape, dtype=x.dtype, device="meta"))
            entries[id(held[-1])] = x
            return held[-1]
        return {k: shaped(v) for k, v in x.items()} if isinstance(x, dict) else x

    writer = _Writer(folder, single_file_per_rank=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*single process.*")  # which is what is wanted
        torch_checkpoint.save(shaped(tree), storage_writer=writer, planner=_Planner(entries, read), no_dist=True)
