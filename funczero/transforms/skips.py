"""Updates that are not finite are skipped, and that is said: at the first, then ever more rarely, and after too many in
a row it is the end.

What is counted belongs to a state's line of descent (step/book.py), not to a step: two runs that take turns do not mix.
All of it follows from the packed sums, which are the same on every rank, so that all ranks speak, look again and raise
alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import logging
from torch import Tensor

from funczero.core.optimizer import GradientTransformation
from funczero.core.types import Out, Transform, Updated
from funczero.layout.structure import Leaf
from funczero.transforms.chain import Bracket, Configure, Lift, Source
from funczero.transforms.formula import IDLE
from funczero.transforms.partition import Partition


class Unread(NamedTuple):
    """An update whose outcome was not looked at yet: on an accelerator that would wait for it."""

    step: int
    ok: Tensor
    loss: Tensor
    weight: Tensor
    searching: Tensor | None  # is a dynamic scale on its way down?
    bad: Tensor | None  # (leaf, rank)
    unfit: Tensor | None = None  # the leaf whose units do not fit, -1 for none (exact.py)


class Skip(NamedTuple):
    """One update that was not applied."""

    step: int  # calls before it
    words: str
    leaf: str = ""  # the first that was not finite; "": not looked for, or none by itself
    rank: int = -1
    searching: bool = False  # a dynamic loss scale was on its way down


class Skipped(NamedTuple):
    """What a line of states has seen of updates that were not finite."""

    row: int = 0  # of them since the last that was applied
    total: int = 0
    words: str = ""  # on the last one
    unread: tuple[Unread, ...] = ()
    last: Skip | None = None  # the last update that was not applied, for whatever reason


class Patience:
    """Counts skipped updates, says so, and ends a run that does nothing else."""

    def __init__(self, limit: int, debug: bool, speaks: Callable[[], bool]) -> None:
        """limit: updates in a row; debug: every one is said, on every rank; speaks: is this the rank that says it?"""
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(
                f"train_step: patience={limit!r} is not a number of skipped updates; write an int of at least 1"
            )
        self.limit, self.debug, self.speaks = limit, debug, speaks

    def check(self, seen: Skipped) -> None:
        """Raise where it is over.

        Raises:
          FloatingPointError: the last `patience` updates were all skipped; the state that was given is as it was before
            them.
        """
        if seen.row >= self.limit:
            raise FloatingPointError(
                f"step: the last {seen.row} updates were not finite and were skipped, {seen.words}; "
                "look at the data and the learning rate, or write train_step(..., patience=...) larger"
            )

    def after(
        self, seen: Skipped, out: Updated, now: int, leaves: Sequence[Leaf], again: Callable[[], Out | None] | None
    ) -> Skipped:
        """One update more.

        Args:
          leaves: with their paths.
          again: the same update run once more to look for the leaf, and nothing applied; None where it cannot.
        """
        logs = out.logs
        last = Unread(now, out.ok, out.loss, out.weight, logs.get("searching"), out.bad, logs.get("unfit"))
        late = out.ok.device.type != "cpu"  # reading waits for the device: the last update stays unread
        unread = (*seen.unread, last)
        for one in unread[: -1 if late else None]:
            seen = self._read(seen, one, leaves, None if late else again)
        return seen._replace(unread=unread[-1:] if late else ())

    def _read(
        self, seen: Skipped, one: Unread, leaves: Sequence[Leaf], again: Callable[[], Out | None] | None
    ) -> Skipped:
        if bool(one.ok):
            return seen._replace(row=0) if seen.row else seen
        weight = float(one.weight)
        if weight < 0:
            why = (
                f"the weights of update {one.step} add up to {weight:g}, but a weight counts examples and is not"
                " negative"
            )
            raise ValueError(
                f"value_and_grad: {why}; return (sum of losses, sum of weights) with a weight above 0, or 0 where"
                " nothing counts"
            )
        searching = one.searching is not None and bool(one.searching)
        counts = weight != 0 and not searching
        row, total = seen.row + counts, seen.total + counts
        tell = counts and (total & (total - 1) == 0 or row == self.limit)
        bad = one.bad
        unfit = one.unfit is not None and int(one.unfit) >= 0
        if tell and bad is None and again is not None and not unfit:
            out = again()
            bad = None if out is None else out.bad
        words = _words(bad, one, leaves)
        if tell and self.speaks() or self.debug and bad is not None and int(bad[0]) >= 0:
            often = f" ({row} in a row, {total} in all)" if total > 1 else ""
            logging.warning("step %d: %s; the update is skipped%s%s", one.step, words, often, _loss(one))
        last = _skip(words if weight else "the update weighs nothing", one, bad, leaves, searching)
        return Skipped(row, total, words, last=last) if counts else seen._replace(last=last)


def _skip(words: str, one: Unread, bad: Tensor | None, leaves: Sequence[Leaf], searching: bool) -> Skip:
    unfit = -1 if one.unfit is None else int(one.unfit)
    if unfit >= 0:
        return Skip(one.step, words, leaves[unfit].path, -1, searching)
    if bad is None or int(bad[0]) < 0 or one.weight == 0:
        return Skip(one.step, words, "", -1, searching)
    return Skip(one.step, words, leaves[int(bad[0])].path, int(bad[1]), searching)


def _words(bad: Tensor | None, one: Unread, leaves: Sequence[Leaf]) -> str:
    if one.weight != one.weight:
        return f"the weight is {float(one.weight)}"
    if one.unfit is not None and int(one.unfit) >= 0:
        why = "is so much larger or smaller than in the last update that its exact sum does not fit"
        return f"the gradient of {leaves[int(one.unfit)].path!r} {why}; the next update has units for it"
    if bad is None:
        return "the gradient is not finite (debug=True names the leaf and the rank)"
    if int(bad[0]) < 0:
        return "the gradient of every micro-batch is finite, but their sum is not"
    return f"the gradient of {leaves[int(bad[0])].path!r} is not finite on rank {int(bad[1])}"


def _loss(one: Unread) -> str:
    return "" if bool(one.loss.isfinite()) else f"; the loss is {float(one.loss)}"


def _idle(name: str) -> GradientTransformation:
    return GradientTransformation(lambda params: (), lambda u, s, params: (u, s), IDLE, name, "elementwise")


def unapplied(parts: Sequence[Any], before: tuple[Transform, ...] = ()) -> tuple[Any, ...]:
    """A chain whose optimizers do nothing, for looking at its gradients; nothing is copied.

    Args:
      before: links to stand left of every optimizer.
    """
    out: list[Any] = []
    for p in parts:
        if isinstance(p, Bracket):
            out.append(p._replace(parts=unapplied(p.parts, before)))
        elif isinstance(p, Source):
            out.append(p._replace(transforms=unapplied(p.transforms, before)))
        elif type(p) in (tuple, list):
            out += unapplied(p, before)
        elif isinstance(p, Partition):
            out += (*before, Partition(tuple(part._replace(tx=_idle(part.tx.name)) for part in p.parts)))
        elif (
            not isinstance(p, (Configure, Lift))
            and callable(getattr(p, "init", None))
            and callable(getattr(p, "update", None))
        ):
            out += (*before, _idle(p.name if isinstance(p, GradientTransformation) else type(p).__name__))
        else:
            out.append(p)
    return tuple(out)
