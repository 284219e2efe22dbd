"""Any map-style dataset with the corpus's promise: the global batch is a pure function of (seed, step).

`Batches` is torch's `batch_sampler`. It has no state to save: the position is `state.step`, a leaf, and a loader made
at that step goes on with the exact next batch, in mid-epoch and with workers alike; what the old workers had fetched
ahead does not count. The world size is nowhere in it: `local` only leaves out the rows that are dealt to other ranks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from funczero.core import order, rng
from funczero.core.types import TrainState
from funczero.transforms.accumulate import Accumulate

if TYPE_CHECKING:
    from funczero.step.step import Step

LAST = ("drop", "pad", "short")


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the `n` items of any map-style dataset: a permutation, int64 [n], a pure
    function of its arguments.

    It sorts the raw words of a PCG64, which numpy keeps the same in all versions (shuffles it does not). Eight bytes an
    item, a second for ten million.

    >>> epoch_order(6, seed=0, epoch=0).tolist(), epoch_order(6, seed=0, epoch=1).tolist()
    ([1, 5, 0, 4, 2, 3], [0, 1, 4, 5, 2, 3])
    """
    return np.argsort(np.random.PCG64(rng.fold(int(seed), "epoch", int(epoch))).random_raw(n), kind="stable")


_kept_order = functools.lru_cache(maxsize=2)(epoch_order)  # the epoch under way, and the next at its end


class Row(int):
    """One row of a batch: the item's index, which any dataset takes as an int, and what its `__getitem__` may ask
    besides.

    A dataset that computes with it, as torch's `Subset`, hands a plain int on: ask in the outermost one.
    """

    seed: int
    epoch: int
    weight: float  # 0.0 for a row that only fills a batch

    @property
    def key(self) -> int:
        """The key of this item in this epoch, for augmentations: `rng.generator(row.key)` draws the same in any
        worker, world or resumed run.
        """
        return rng.fold(self.seed, self.epoch, int(self))


@dataclass(frozen=True)
class Batches:
    """The batches of a map-style dataset by step, as a `batch_sampler`; law: `batches[step]` depends on (items, rows,
    seed, last, shuffle) and the step alone.

    Iterating yields the batch of step `start`, then of the next, without end or until `stop`. Every epoch has its own
    order and `per_epoch` steps.

    >>> from torch.utils.data import DataLoader
    >>> dataset = [f"item {i}" for i in range(10)]
    >>> batches = Batches(len(dataset), rows=4, seed=0, last="drop")
    >>> loader = DataLoader(dataset, batch_sampler=batches.at(0, stop=2 * batches.per_epoch))
    >>> resumed = DataLoader(dataset, batch_sampler=batches.at(3, stop=4), num_workers=0)  # at(state) in a loop
    >>> list(loader)[3] == list(resumed)[0]
    True

    Args:
      items: the number of items, len(dataset).
      rows: rows of the global batch, all ranks and micro-batches together.
      seed: of the order and of every `Row.key`.
      last: what becomes of an epoch's last items when `rows` does not divide them: "drop" leaves them out (others in
        every epoch); "pad" fills the batch with items of weight 0, which the loss must count by `weights(step)` or
        `Row.weight`; "short" keeps a smaller batch, which must still divide into the micro-batches.
      shuffle: a new order in every epoch; without, the dataset's own.
      start, taken, stop, parts, mine, calls: set by `at` and `local`.

    Raises:
      ValueError: numbers out of range, or a dataset that would give no batch.
    """

    items: int
    rows: int
    seed: int = 0
    last: str = "drop"
    shuffle: bool = True
    start: int = 0  # the first step
    taken: int = 0  # micro-batches of it that are done already
    stop: int | None = None  # the step before which iterating ends
    parts: int = 1  # micro-batches of the global batch, of which
    mine: tuple[int, ...] = (0,)  # these are given, in this order,
    calls: int = 1  # in so many batches a step

    def __post_init__(self) -> None:
        for name, least in (("items", 0), ("rows", 1), ("start", 0), ("taken", 0)):
            _check_number(name, getattr(self, name), least)
        if type(self.seed) is not int:
            raise ValueError(f"Batches: seed={self.seed!r} is not an int; write seed=0, or int(seed)")
        if self.last not in LAST:
            raise ValueError(
                f"Batches: last={self.last!r} is none of {', '.join(map(repr, LAST))}; 'drop' leaves an epoch's last"
                " short batch out"
            )
        if not self.items:
            raise ValueError("Batches: the dataset is empty (items=0); give one that holds at least one item")
        if not self.per_epoch:
            raise ValueError(
                f"Batches: {self.items} items are fewer than one batch of {self.rows} rows, and last='drop' would drop"
                f" them all; write last='pad' or last='short', or at most rows={self.items}"
            )
        if self.stop is not None:
            _check_number("stop", self.stop, 0)

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.items // self.rows if self.last == "drop" else -(-self.items // self.rows)

    def __getitem__(self, step: int) -> list[Row]:
        """The rows of one step, dealt if `local` was asked for."""
        _check_number("step", step, 0)
        epoch, place = divmod(step, self.per_epoch)
        visit = _kept_order(self.items, self.seed, epoch) if self.shuffle else np.arange(self.items)
        whole = visit[place * self.rows : (place + 1) * self.rows]
        count = len(whole)
        if self.last == "pad":
            whole = np.concatenate([whole, np.resize(visit, self.rows - count)])
        dealt = np.arange(len(whole)).reshape(self.parts, -1)[list(self.mine)].ravel()
        return [
            _row(item, self.seed, epoch, float(at < count)) for item, at in zip(whole[dealt].tolist(), dealt.tolist())
        ]

    def __iter__(self) -> Iterator[list[Row]]:
        taken = self.taken
        for step in itertools.count(self.start) if self.stop is None else range(self.start, self.stop):
            rows = self[step]
            size = len(rows) // self.calls
            for call in range(taken, self.calls):
                yield rows[call * size : (call + 1) * size]
            taken = 0

    def __len__(self) -> int:
        """Batches until `stop`; TypeError when there is no end, as torch expects it."""
        if self.stop is None:
            raise TypeError(
                "Batches: these go on without end; write batches.at(state, stop=steps) for some with a length"
            )
        return max(0, (self.stop - self.start) * self.calls - self.taken)

    def weights(self, step: int) -> Tensor:
        """1 for every row of `batches[step]` that counts, 0 for one that fills the batch: float32 [rows of it]."""
        return torch.tensor([row.weight for row in self[step]])

    def at(self, state: TrainState | int, stop: int | None = None) -> Batches:
        """The same batches from a state's position on: its step, and in a streamed window the micro-batch after those
        taken.

        Args:
          state: a TrainState, or a step.
          stop: the step before which iterating ends; None: never.
        """
        if not isinstance(state, TrainState):
            return replace(self, start=state, taken=0, stop=stop)
        if (step := int(state.step)) < 0:
            raise RuntimeError(
                f"Batches.at: this state was donated at step {-1 - step}; give the state that step(...) returned"
            )
        taken = sum(int(own.count) for own in state.chain.values() if isinstance(own, Accumulate))
        if taken and self.calls == 1:
            raise ValueError(
                f"Batches.at: the state is {taken} micro-batches into its update, but these batches are whole updates;"
                " write batches.local(step).at(state)"
            )
        whole, taken = divmod(taken, self.calls)
        return replace(self, start=step + whole, taken=taken, stop=stop)

    def local(self, step: Step) -> Batches:
        """Only this rank's rows, bit for bit those of `step.local_rows(global batch)`, so that no rank loads what it
        does not use; joins the step's mesh.

        With `accumulate(k, stream=True)` a step is k batches, one for every call. The rows stay where the loader puts
        them; a device is the loop's to choose.

        Raises:
          ValueError: a batch that does not divide into the chain's micro-batches.
        """
        g = step.grad
        parts, mine = g.layout.stride, order.indices(g.layout, step.live_mesh.index)
        _check_dealing(self, parts, " x ".join(f"{name} {n}" for name, n in g.layout.order))
        calls = next(n for name, n in reversed(g.layout.order) if name == "accumulate") if g.streams else 1
        return replace(self, parts=parts, mine=tuple(mine), calls=calls)


def _row(item: int, seed: int, epoch: int, weight: float) -> Row:
    row = Row(item)
    row.seed, row.epoch, row.weight = seed, epoch, weight
    return row


def _check_dealing(batches: Batches, parts: int, of: str) -> None:
    if batches.rows % parts:
        raise ValueError(
            f"Batches.local: a batch of rows={batches.rows} does not divide into {parts} micro-batches ({of}); write a"
            f" multiple of {parts}"
        )
    if batches.last == "short" and (short := batches.items % batches.rows) % parts:
        raise ValueError(
            f"Batches.local: the last batch of an epoch has {short} rows, which do not divide into {parts}"
            f" micro-batches ({of}); write last='pad' or last='drop'"
        )


HINTS = {"items": "len(dataset)", "start": "batches.at(state), or a step as an int"}


def _check_number(name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(
            f"Batches: {name}={value!r} is not a whole number of at least {least}; write"
            f" {HINTS.get(name, 'an int such as ' + str(least + 1))}"
        )
