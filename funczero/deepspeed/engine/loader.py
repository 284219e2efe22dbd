"""The loader of `training_data`: rows dealt by rank, a new order every epoch, and the position is the engine's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from funczero.data.dataset import Batches


class Loader:
    """Micro-batches of this rank, an epoch an iteration.

    Law: it begins where the engine is, in mid-epoch and in mid-window, also after load_checkpoint.

    Epochs that the batch does not divide are filled up with some of their rows again, or with dataloader_drop_last cut.
    """

    def __init__(
        self, engine: Any, dataset: Any, collate_fn: Callable[[Any], Any] | None = None, seed: int = 0, **options: Any
    ) -> None:
        """options: torch's DataLoader's."""
        if (
            isinstance(dataset, IterableDataset)
            or not hasattr(dataset, "__getitem__")
            or not hasattr(dataset, "__len__")
        ):
            raise TypeError(
                f"training_data: a {type(dataset).__name__} has no length and no items by number; "
                "give a map-style dataset, or make a loader yourself"
            )
        self._engine, self.dataset, self.collate_fn, self.options = weakref.ref(engine), dataset, collate_fn, options
        config = engine.config_
        last = "drop" if config.value("dataloader_drop_last") else "pad"
        self.batches = Batches(len(dataset), config.triad.batch, seed, last).local(engine.train_step)
        self.k = config.triad.steps

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return self.batches.per_epoch * self.k

    def __iter__(self) -> Iterator[Any]:
        engine: Any = self._engine()
        step, taken = divmod(engine.micro_steps, self.k)
        epoch = step // self.batches.per_epoch
        at = self.batches.at(step, stop=(epoch + 1) * self.batches.per_epoch)
        sampler = type(at)(**{**at.__dict__, "taken": taken})
        return iter(DataLoader(self.dataset, batch_sampler=sampler, collate_fn=self.collate_fn, **self.options))


class RepeatingLoader:
    """A loader without end: it begins again when it is through."""

    def __init__(self, loader: Any) -> None:
        """loader: anything to iterate more than once."""
        self.loader, self._now = loader, iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __len__(self) -> int:
        """Of one pass."""
        return len(self.loader)

    def __next__(self) -> Any:
        try:
            return next(self._now)
        except StopIteration:
            self._now = iter(self.loader)
            return next(self._now)
