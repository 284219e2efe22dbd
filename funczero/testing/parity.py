"""Does a step keep its promises? Stages x worlds x accumulates of the same global batches on this machine: one
table.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from funczero.comm.launch import count_bytes
from funczero.core import tree
from funczero.step.train_step import donate
from funczero.testing.hashes import tree_hash
from funczero.testing.pool import WorkerPool


class Row(NamedTuple):
    """One run of `parity`."""

    world: int
    stage: int
    accumulate: int
    hash: str  # sha256 of the weights, its first 12 digits
    logs: str  # of losses and weights
    difference: float  # largest, to the unsharded run on one rank
    bytes: float  # sent by rank 0 per update
    seconds: float  # per update
    reproducible: bool  # is this world of the set that promises the same bits?


class Report(NamedTuple):
    """All runs, and whether every promise held."""

    rows: list[Row]
    tolerance: float

    @property
    def ok(self) -> bool:
        """One hash over the worlds that promise it, and all values within the tolerance of the unsharded run."""
        promised = [(r.hash, r.logs) for r in self.rows if r.reproducible]
        return len(set(promised)) <= 1 and all(r.difference <= self.tolerance for r in self.rows)

    def __str__(self) -> str:
        head = (
            f"{'world':>5} {'stage':>5} {'accumulate':>10}  {'weights':12}  {'losses':12} {'difference':>10}"
            f" {'bytes/update':>12} {'ms/update':>9}"
        )
        lines = [
            f"{r.world:5d} {r.stage:5d} {r.accumulate:10d}  {r.hash:12}  {r.logs:12} {r.difference:10.1e}"
            f" {r.bytes:12,.0f} {1e3 * r.seconds:9.2f}{'' if r.reproducible else '  (own bits)'}"
            for r in self.rows
        ]
        hashes = len({r.hash for r in self.rows if r.reproducible})
        verdict = (
            "every promise held"
            if self.ok
            else f"BROKEN: {hashes} hashes where one is promised, or a difference above {self.tolerance:g}"
        )
        return "\n".join([head, *lines, verdict])


def parity(
    make_step: str,
    make_batch: str,
    stages: Sequence[int] = (0, 1, 2, 3),
    worlds: Sequence[int] = (1, 2, 4),
    micro_batches: int = 8,
    updates: int = 5,
    tolerance: float = 1e-5,
    timeout: float = 300.0,
) -> Report:
    """Runs somebody's step builder at every stage and world, on gloo processes of this machine.

    Args:
      make_step: "package.module:function" or "file.py:function"; function(stage=, accumulate=) -> (step, params), with
        the batch split over all processes and no random source but keys.
      make_batch: the same for function(t) -> the global batch of update t; its rows divide by micro_batches.
      micro_batches: of one update, on all ranks together; a world of W accumulates micro_batches / W. A world that does
        not divide it is refused.
    """
    for w in worlds:
        if micro_batches % w:
            raise ValueError(
                f"parity: {micro_batches} micro-batches do not divide over {w} processes; write a multiple as"
                " --micro_batches"
            )
    rows: list[Row] = []
    reference: list[torch.Tensor] = []
    for world in worlds if 1 in worlds else (1, *worlds):
        k = micro_batches // world
        with WorkerPool(world) as pool:
            for stage in stages if world in worlds else (stages[0],):
                weights, logs, sent, seconds = pool.run(
                    _run, make_step, make_batch, stage, k, updates, timeout=timeout
                )[0]
                flat = tree.tensors(weights)
                reference = reference or flat
                worst = max(
                    (
                        float((a.double() - b.double()).abs().max())
                        for a, b in zip(flat, reference, strict=True)
                        if a.numel()
                    ),
                    default=0.0,
                )
                exact = world & (world - 1) == 0 and k & (k - 1) == 0
                rows.append(
                    Row(world, stage, k, tree_hash(weights)[:12], tree_hash(logs)[:12], worst, sent, seconds, exact)
                )
    return Report(rows, tolerance)


def load(target: str) -> Any:
    """The function that "module:function" or "file.py:function" names."""
    where, _, name = target.rpartition(":")
    if not where:
        raise ValueError(f"parity: {target!r} names no function; write package.module:function or file.py:function")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(
                f"parity: there is no file {where!r}; write a path from this folder, or package.module:function"
            )
        found = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    if not callable(getattr(module, name, None)):
        raise ValueError(
            f"parity: {where!r} has no function {name!r}; it has"
            f" {[n for n in dir(module) if not n.startswith('_')][:12]}"
        )
    return getattr(module, name)


def _run(make_step: str, make_batch: str, stage: int, accumulate: int, updates: int) -> tuple[Any, Any, float, float]:
    step, params = load(make_step)(stage=stage, accumulate=accumulate)
    batches = load(make_batch)
    step = donate(step)
    state, logs = step.init(params), []
    with count_bytes(step) as sent:
        start = time.perf_counter()
        for t in range(updates):
            state, m = step(state, step.local_rows(batches(t)))
            assert (
                m is not None
            ), "parity: a streamed chain closes no update by itself; write accumulate(k) without stream"
            logs.append((m.loss, m.weight, m.ok))
        seconds = (time.perf_counter() - start) / updates
    return step.params(state), logs, sum(sent.values()) / updates, seconds
