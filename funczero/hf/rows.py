"""Which rows a rank is given: micro-batches of an epoch by their global number, dealt as a chain adds them.

An epoch is a list of micro-batches that does not know how many ranks there are. An update takes the next so many of it,
and each rank those whose sums the chain takes there. Nothing is read twice: where an epoch ends within an update, its
last places are empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from funczero.core import order, rng
from funczero.core.types import Layout
from funczero.gradients.draws import keyed

HOST = torch.device("cpu")


class Place(NamedTuple):
    """One micro-batch as a rank runs it."""

    epoch: int
    number: int  # of the micro-batch in its epoch, on all ranks together
    rows: Sequence[int]  # of the dataset
    real: bool = True  # else it stands in an empty place, and counts for nothing


class Deal(NamedTuple):
    """How an update's micro-batches are dealt among ranks."""

    size: int  # of an update, on all ranks
    mine: tuple[int, ...]  # those of this rank, in the order of time
    stride: int  # between two that follow each other in time

    @classmethod
    def of(cls, layout: Layout, coordinate: Callable[[str], int]) -> Deal:
        """As a chain with this layout adds them.

        Args:
          coordinate: a mesh axis -> this rank's place on it.
        """
        names = [name for name, _ in layout.order]
        stride = int(np.prod([n for _, n in layout.order[: names.index("accumulate")]] or [1]))
        return cls(layout.stride, tuple(order.indices(layout, coordinate)), stride)

    def calls(self, micros: int) -> int:
        """Micro-batches that every rank runs for an update of so many, copies in empty places among them.

        >>> Deal(4, (0, 1), 1).calls(3), Deal(4, (0, 2), 2).calls(3), Deal(4, (0, 2), 2).calls(1)
        (2, 2, 1)
        """
        return min(len(self.mine), -(-micros // self.stride))


class Collated(Dataset):
    """Micro-batches as items: rows fetched and collated, with draws that are a function of the micro-batch's number."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], seed: int):
        self.dataset, self.collate, self.seed = dataset, collate, seed

    def __getitem__(self, place: Place) -> tuple[Place, Any]:
        key = rng.fold(self.seed, "rows", place.epoch, place.number)
        with keyed(key, HOST, RuntimeError):
            fetch = getattr(self.dataset, "__getitems__", None)
            rows = fetch([*place.rows]) if callable(fetch) else [self.dataset[i] for i in place.rows]
            return place, self.collate(rows)


class Micros:
    """The micro-batches of a loader's epochs, whoever computes them.

    Args:
      loader: torch's, over all rows; its order, its batches, its collate function and its workers are taken from it.
      seed: of the order of each epoch, where it is random, and of what datasets and collate functions draw.

    Raises:
      ValueError: the loader deals rows by itself.
    """

    def __init__(self, loader: DataLoader, seed: int):
        self.loader, self.seed, self.dataset = loader, seed, loader.dataset
        self.batch_size = loader.batch_size
        self.streams = isinstance(loader.dataset, IterableDataset)
        if not self.streams:
            self.sampler = _seeded(loader.batch_sampler, seed)
            _deals_all(loader, self.sampler)

    def __len__(self) -> int:
        """Of an epoch.

        Raises:
          TypeError: the dataset does not say how many rows it has.
        """
        return len(self.loader) if self.streams else len(self.sampler)

    def order(self, epoch: int) -> Sequence[Sequence[int]]:
        """The rows of each micro-batch of an epoch."""
        several: tuple[Any, ...] = self.sampler, getattr(self.sampler, "sampler", None)
        for x in several:
            if hasattr(x, "set_epoch"):
                x.set_epoch(epoch)
        with keyed(rng.fold(self.seed, "order", epoch), HOST, RuntimeError):
            if type(self.sampler) is not BatchSampler:
                return [[*rows] for rows in self.sampler]
            rows: Any = [*self.sampler.sampler]
        if rows and type(rows[0]) is int:
            rows = np.array(rows)  # eight bytes a row
        return Cut(rows, self.sampler.batch_size, self.sampler.drop_last)

    def load(self, places: Iterable[Place]) -> Iterator[tuple[Place, Any]]:
        """These micro-batches, collated, one after another."""
        x = self.loader
        workers: dict[str, Any] = {}
        if x.num_workers:
            names = "worker_init_fn", "multiprocessing_context", "prefetch_factor", "timeout"
            workers = {n: getattr(x, n) for n in names} | {"num_workers": x.num_workers}
        items, pinned = (
            Collated(self.dataset, x.collate_fn, self.seed),
            x.pin_memory and torch.accelerator.is_available(),
        )
        again: Any = DataLoader  # whose stubs know no other sampler
        return iter(again(items, batch_size=None, sampler=places, collate_fn=_as_it_is, pin_memory=pinned, **workers))

    def stream(self, epoch: int, size: int) -> Iterator[list[Any]]:
        """Of a dataset that is a stream: all micro-batches, so many at a time. Every rank reads all of them."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        held = []
        for batch in self.loader:
            held.append(batch)
            if len(held) == size:
                yield held
                held = []
        if held:
            yield held


class Cut(Sequence[Sequence[int]]):
    """An order cut into micro-batches."""

    def __init__(self, rows: Any, size: int, drop_last: bool):
        self.rows, self.size = rows, size
        self.number = len(rows) // size if drop_last else -(-len(rows) // size)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.number:
            raise IndexError(i)
        return [*map(_plain, self.rows[i * self.size : (i + 1) * self.size])]


class Window(NamedTuple):
    """What a rank runs for one update."""

    micros: int  # of the update, on all ranks
    own: list[tuple[Place, Any]]  # in the order of time
    whole: list[Any] | None = None  # of a stream: what every rank has read


class TrainRows:
    """The updates of an epoch as one rank runs them.

    Args:
      micros: of the epochs.
      world: ranks.
    """

    deal: Deal  # known once there is a chain

    def __init__(self, micros: Micros, world: int):
        self.micros, self.world = micros, world
        self.dataset, self.batch_size = micros.dataset, micros.batch_size
        self.passed_by = 0  # updates of a stream that are still to be passed by
        self.seen = 0  # updates of this epoch, those that were passed by among them

    def __len__(self) -> int:
        """Micro-batches of an epoch on one rank, as the stock Trainer counts them."""
        return -(-len(self.micros) // self.world)

    def done(self, updates: int, most: int) -> float:
        """The part of an epoch that so many updates are, as the stock Trainer counts it on one process.

        Args:
          most: updates of an epoch, where nobody knows its rows.
        """
        if self.micros.streams:
            return min(updates, most) / most
        return min(updates * self.deal.size, len(self.micros)) / len(self.micros)

    def windows(self, epoch: int, first: int = 0) -> Iterator[Window]:
        """One an update, from the update `first` of the epoch on."""
        self.seen = 0
        if self.micros.streams:
            yield from self._streamed(epoch, first)
            return
        rows, deal = self.micros.order(epoch), self.deal
        starts = range(first * deal.size, len(rows), deal.size)
        sizes = [min(deal.size, len(rows) - at) for at in starts]
        pairs = [*zip(starts, sizes, strict=True)]
        loaded = self.micros.load(Lazily(lambda: (p for at, m in pairs for p in self._places(epoch, rows, at, m))))
        for m in sizes:
            self.seen += 1
            yield Window(m, [next(loaded) for _ in range(deal.calls(m))])

    def _places(self, epoch: int, rows: Sequence[Sequence[int]], at: int, micros: int) -> Iterator[Place]:
        for i in self.deal.mine[: self.deal.calls(micros)]:
            number = at + (i if i < micros else 0)
            yield Place(epoch, number, rows[number], i < micros)

    def _streamed(self, epoch: int, first: int) -> Iterator[Window]:
        deal, self.passed_by = self.deal, self.passed_by + first
        for u, held in enumerate(self.micros.stream(epoch, deal.size)):
            self.seen += 1
            if self.passed_by:  # what is left of them is the next epoch's
                self.passed_by -= 1
                continue
            at, mine = u * deal.size, deal.mine[: deal.calls(len(held))]
            own = [(Place(epoch, at + i, (), i < len(held)), held[i if i < len(held) else 0]) for i in mine]
            yield Window(len(held), own, held)


def _seeded(sampler: Any, seed: int) -> Any:
    """A batch sampler whose order is a function of the seed and the epoch, as Accelerate makes it of a random one."""
    own = getattr(sampler, "sampler", None)
    if type(sampler) is not BatchSampler or not isinstance(own, RandomSampler):
        return sampler
    again = SeedableRandomSampler(
        data_source=own.data_source,
        replacement=own.replacement,
        num_samples=own._num_samples,
        generator=own.generator,
        data_seed=seed,
    )
    return BatchSampler(again, sampler.batch_size, sampler.drop_last)


def _deals_all(loader: DataLoader, sampler: Any) -> None:
    """Refuse a loader of a part of the rows."""
    inner = getattr(sampler, "sampler", None)
    if isinstance(inner, DistributedSampler) or type(loader).__module__.startswith("accelerate"):
        who = type(inner if isinstance(inner, DistributedSampler) else loader).__name__
        raise ValueError(
            f"hf.Trainer: the loader deals rows among ranks by itself ({who}), and the Trainer would deal its part"
            " again; return a DataLoader over all rows"
        )
    if sampler is None:
        raise ValueError("hf.Trainer: the loader has batch_size=None, so no micro-batches; give it a batch size")


def _plain(row: Any) -> Any:
    return int(row) if isinstance(row, np.integer) else row


class Lazily:
    """A generator that can be begun."""

    def __init__(self, begin: Callable[[], Iterator[Place]]):
        self.begin = begin

    def __iter__(self) -> Iterator[Place]:
        return self.begin()


def _as_it_is(x: Any) -> Any:
    return x
