"""Rows of an evaluation: every one counts once, in the dataset's order, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor
from torch.utils.data import DataLoader

from funczero.hf.rows import Micros, Place

Gather = Callable[[Tensor], Tensor]


class EvalRows:
    """A loader's batches in rounds, in each of which every rank has one; where there is none left, a copy of the first.

    Law: what `gathered` returns of round after round is what one rank would have, row by row.

    Args:
      loader: torch's, over all rows.
      rank, world: this rank among all.
      seed: of what datasets and collate functions draw.
    """

    def __init__(self, loader: DataLoader, rank: int, world: int, seed: int):
        self.micros, self.rank, self.world = Micros(loader, seed), rank, world
        self.dataset, self.batch_size = loader.dataset, loader.batch_size
        self.counts: list[int] = []  # rows of this round by rank
        self.most = 0

    def __len__(self) -> int:
        """Rounds."""
        return -(-len(self.micros) // self.world)

    def __iter__(self) -> Iterator[Any]:
        if self.micros.streams:
            yield from self._streamed()
            return
        batches = self.micros.order(0)
        number = len(batches)
        mine = [t * self.world + self.rank for t in range(-(-number // self.world))]
        places = [Place(0, i if i < number else 0, batches[i if i < number else 0], i < number) for i in mine]
        for t, (_, inputs) in enumerate(self.micros.load(places)):
            at = range(t * self.world, (t + 1) * self.world)
            self.counts = [len(batches[i]) if i < number else 0 for i in at]
            self.most = max(*self.counts, len(batches[0]))
            yield inputs

    def _streamed(self) -> Iterator[Any]:
        for held in self.micros.stream(0, self.world):
            self.counts = [_rows(x) for x in held] + [0] * (self.world - len(held))
            self.most = max(self.counts)
            yield held[self.rank if self.rank < len(held) else 0]

    def gathered(self, x: Any, gather: Gather) -> Any:
        """The rows of all ranks' values in this round, one after another.

        Args:
          x: tensors whose dim 0 is rows, in any nesting.
          gather: joins tensors of as many rows over ranks in dim 0.

        Raises:
          ValueError: a tensor has no rows.
        """
        return recursively_apply(lambda t: self._of_all(t, gather), x)

    def _of_all(self, x: Tensor, gather: Gather) -> Tensor:
        if not x.dim():
            raise ValueError("hf.Trainer: a prediction has no rows (it is one number); leave it out by ignore_keys")
        most = max(self.most, self.batch_size or 0)
        if self.world == 1:
            return x[: self.counts[0]]
        if len(x) > most:
            why = f"a prediction has {len(x)} rows where a batch has at most {most}"
            raise ValueError(f"hf.Trainer: {why}; leave it out by ignore_keys")
        padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]).contiguous()
        parts = gather(padded).split(most)
        return torch.cat([part[:n] for part, n in zip(parts, self.counts, strict=True)])


def _rows(inputs: Any) -> int:
    """Of one batch."""
    sizes = [len(x) for x in inputs.values() if isinstance(x, Tensor) and x.dim()]
    return max(sizes, default=0)
