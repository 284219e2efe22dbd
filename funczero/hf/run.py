"""One training: a step, its state, and the module whose parameters it has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.checkpoint import Checkpointer, CheckpointError
from funczero.comm.collectives import gather_leaf
from funczero.comm.integers import sum_integers
from funczero.core.order import Dealt
from funczero.core.rows import tensors
from funczero.core.types import Metrics, TrainState
from funczero.gradients.stateless import stateless
from funczero.hf.places import Places
from funczero.hf.rows import Deal, Place
from funczero.step.alike import checksum
from funczero.step.calls import recorded
from funczero.step.fits import unused
from funczero.step.step import Step
from funczero.step.train_step import donate
from funczero.transforms.accumulate import Accumulate
from funczero.transforms.average import averaged

FOLDER, NAME = "funczero", "state"  # of a checkpoint


class Built(NamedTuple):
    """What a chain is made of, before it has a state."""

    step: Step
    params: dict[str, Tensor]  # the module's own, by name
    compute: torch.dtype


class Run:
    """A training under way. Every method but `micro` is called by all ranks, at the same place."""

    def __init__(self, built: Built, module: Any, seed: int, resume: str | None) -> None:
        """The first state, or that of a checkpoint; the module has no values from here on."""
        self.module, self.compute = module, built.compute
        self.step = donate(built.step)
        mesh = self.step.live_mesh
        self.deal = Deal.of(self.step.grad.layout, mesh.index)
        _there("buffer", dict(module.named_buffers()), "make it with buffers on a device, as fz.from_pretrained does")
        if resume is None:
            _there("parameter", built.params, "make the model again, or resume from a checkpoint")
            self.state: TrainState = self.step.init(built.params, key=seed)
        else:
            self.state = restored(resume, self.step, built.params)
        self.places = Places(module)
        built.params.clear()
        self.places.release()
        self._sum = recorded("hf.Trainer, the items of an update", self._summed, self.step.running)
        self._gather = recorded("hf.Trainer, whole weights", self._gathered, self.step.running)

    # --- an update
    def items(self, own: int | None, held: Sequence[Any] | None = None) -> int | None:
        """The items of an update on all ranks.

        Args:
          own: of this rank's micro-batches; None: the loss asks for none.
          held: of a stream: what this rank has read, which must be what all have read.

        Raises:
          ValueError: ranks have read other rows of a stream.
        """
        if own is None and held is None:
            return None
        total, alike = self._sum(self.state, own, held)
        if not alike:
            why = "the dataset is a stream, of which every rank reads all rows, but they have read other rows"
            raise ValueError(f"hf.Trainer: {why}; make its order a function of a seed, or give a map-style dataset")
        return None if own is None else total

    def _summed(self, state: TrainState, own: int | None, held: Sequence[Any] | None) -> tuple[int, bool]:
        mesh = self.step.live_mesh
        size = mesh.ledger.ranks
        mark = 0 if held is None else sum(int(checksum(x)) for x in _tensors(held)) % (1 << 48)
        if size == 1:
            return own or 0, True
        mine = torch.tensor([own or 0, mark, mark * mark % (1 << 48)], device=mesh.device)
        total = sum_integers(mine, tuple(mesh.axes), mesh).tolist()
        return total[0], total[1] == size * mark and total[2] == size * (mark * mark % (1 << 48))

    def micro(self, place: Place, batch: Mapping[str, Any], micros: int) -> None:
        """The gradient of one micro-batch is added.

        Args:
          batch: as items.training_loss reads it.
          micros: of the update, on all ranks.
        """
        full = micros == self.deal.size
        rows = batch if full else Dealt(batch, micros, int(place.real), 1)
        self.state, _ = self.step(self.state, rows)

    def update(self) -> Metrics:
        """The update."""
        self.state, metrics = self.step(self.state, None)
        assert metrics is not None
        return metrics

    def abandon(self) -> None:
        """What was added since the last update is forgotten."""
        self.state = self.step.with_state(self.state, Accumulate(torch.zeros((), dtype=torch.int64), ()))

    # --- looks
    def seen(self, fn: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
        """fn(model, inputs) with the values of now, under no_grad; the model as it stands, in its mode.

        Units are gathered as they run where they are sharded, so all ranks call it, as often.
        """

        def loss(model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
            found.append(fn(model, inputs))
            return torch.zeros((), device=device), torch.ones(())

        found: list[Any] = []
        device = self.step.live_mesh.device
        look = stateless(self.module, loss, units=self.step.source.units or ())[0]
        run = self.step.eval(look)

        def call(inputs: Any) -> Any:
            run(self.state, inputs)
            return found.pop()

        return call

    def whole(self, average: bool = False, where: str = "device") -> dict[str, Tensor]:
        """Whole masters by all their names, tied ones as one tensor, gathered leaf after leaf.

        Args:
          average: the running average's values instead.
          where: they are kept: "device", "host", or "nowhere", for shapes alone.

        Raises:
          RuntimeError: an update has failed when it had begun to write.
        """
        unused("hf.Trainer", self.state)
        return self._gather(averaged(self.state) if average else self.state, where)

    def _gathered(self, state: TrainState, where: str) -> dict[str, Tensor]:
        structure, mesh = state.params.where.structure, self.step.live_mesh
        leaves = []
        for i, _ in enumerate(structure.leaves):
            x = gather_leaf(state.params, i, mesh)
            assert x is not None
            own = torch.empty_like(x, device="meta") if where == "nowhere" else x.detach().clone()
            leaves.append(own.cpu() if where == "host" else own)
        return dict(structure.unflatten(leaves))

    def buffers(self) -> dict[str, Tensor]:
        """The model's own state by name."""
        return {n: x.clone() for n, x in (self.state.model_state or {}).items()}

    @contextmanager
    def showing(self, average: bool = False, where: str = "device") -> Iterator[None]:
        """Whole values stand in the module meanwhile."""
        with self.places.showing(self.whole(average, where), self.buffers()):
            yield

    def give_back(self) -> None:
        """The module has its parameters again, with whole values."""
        self.places.back(self.whole(), self.buffers())

    # --- checkpoints
    def save(self, folder: str) -> None:
        """The sharded state into a checkpoint's folder, committed when this returns."""
        with Checkpointer(os.path.join(folder, FOLDER), step=self.step) as ck:
            ck.save(self.state, NAME, overwrite=True)


def _there(what: str, tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Refuse tensors without values.

    Raises:
      ValueError: one lies on meta.
    """
    meta = next((n for n, p in tensors.items() if p.is_meta), None)
    if meta is not None:
        why = "has no values (it lies on meta, as where a training was left by an error)"
        raise ValueError(f"hf.Trainer: {what} {meta!r} {why}; {remedy}")


def restored(folder: str, step: Step, params: Any) -> TrainState:
    """The state of a checkpoint, of any number of ranks and any stage.

    Raises:
      CheckpointError: there is none, or it is another model's.
    """
    where = Path(folder, FOLDER)
    if not where.is_dir():
        why = "holds no state of a chain (it was written by another Trainer, or with save_only_model=True)"
        remedy = "begin with from_pretrained of it, and without resume_from_checkpoint"
        raise CheckpointError(f"hf.Trainer: {str(folder)!r} {why}; {remedy}")
    with Checkpointer(where, step=step) as ck:
        return ck.restore(NAME, like=(step, params)).state


class Face:
    """What an evaluation calls instead of the module while a chain has its parameters: a forward with those of now.

    All ranks call it, as often. Everything else is the module's own.
    """

    def __init__(self, run: Run) -> None:
        self.__dict__["run"], self.__dict__["calls"] = run, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.run.module, name, value)

    def eval(self) -> Face:
        """The module's, for the calls that follow."""
        self.run.module.eval()
        self.__dict__["calls"] = None
        return self

    def train(self, mode: bool = True) -> Face:
        """The module's, for the calls that follow."""
        self.run.module.train(mode)
        self.__dict__["calls"] = None
        return self

    def __call__(self, **inputs: Any) -> Any:
        if self.calls is None:
            self.__dict__["calls"] = self.run.seen(lambda model, inputs: model(**inputs))
        return self.calls(inputs)


def _tensors(held: Sequence[Any]) -> list[Tensor]:
    return [x for batch in held for x in tensors(dict(batch) if isinstance(batch, Mapping) else batch)]
