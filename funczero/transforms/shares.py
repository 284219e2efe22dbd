"""Who has which leaves where an optimizer, or a partition of several, stands in a chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core.transform import refuse, slot_name
from funczero.core.types import Grad, GradientTransformation, Reading, State, Tree
from funczero.layout.slots import Slots
from funczero.layout.where import Where
from funczero.transforms.mean import value
from funczero.transforms.partition import Part, Partition, owners, subset, taken

Optimizer = GradientTransformation | Partition
Elsewhere = Callable[[State, Slots], Reading]  # the rates of an update, which another part of the state keeps


def foreign(part: Any) -> str | None:
    """Why something of another library is no part of a chain, and what to write; None where it is none of those
    known.
    """
    kind = part if isinstance(part, type) else type(part)
    if issubclass(kind, torch.optim.Optimizer):
        own = {"AdamW": "fz.adamw(lr)", "Adam": "fz.adam(lr)", "SGD": "fz.sgd(lr)", "Adagrad": "fz.adagrad(lr)"}
        write = own.get(kind.__name__, f"fz.from_torch({kind.__name__!r}, lr)")
        return (
            f"a torch optimizer steps on tensors of its own, but here state is a value; write {write}, or hand it to"
            " fz.deepspeed.initialize(optimizer=...)"
        )
    if issubclass(kind, torch.optim.lr_scheduler.LRScheduler):
        return (
            "a scheduler of torch is no part of a chain; write the rate into the optimizer:"
            f" fz.adamw(fz.schedules.from_torch({kind.__name__!r}, lr, ...))"
        )
    home = (getattr(getattr(part, "init", None), "__module__", "") or "").split(".")[0]
    if home in ("optax", "jax", "flax"):
        return (
            f"a transform of {home} computes on jax arrays, and leaves are torch tensors here; write fz.adamw(lr), or"
            " the same (init, update) pair in torch"
        )
    return None


def _placed(g: Grad, tx: GradientTransformation) -> Grad:
    """g as this optimizer may read it: a mean, and whole leaves where it needs them."""
    g, why = value(g, tx.name), foreign(tx)
    if why is not None:
        raise refuse(g, tx.name, why)
    across = tx.formula is not None and tx.formula.across is not None
    known = tx.needs == "elementwise" or tx.needs in ("leaf_norms", "leafwise") and across
    if not known and any(g.env.mesh.axes[a].size > 1 for a in g.layout.sharded):
        raise refuse(g, tx.name, _whole(tx, list(g.layout.sharded)))
    return g


def _whole(tx: GradientTransformation, axes: list[str]) -> str:
    """Why this optimizer cannot stand in a bracket."""
    without = f"a chain without shard (stage 0), as all_reduce({axes[-1]!r}) in its place"
    if tx.elementwise is None:
        return (
            f"nothing says that it works value by value, but the leaves are cut over {axes} here; write fz.lift(pair,"
            " elementwise=True) if every value of its updates and state depends on its own place alone, and otherwise"
            f" {without}"
        )
    return (
        f"it needs whole leaves (elementwise=False), but they are cut over {axes} here; write {without}, or an"
        " optimizer that works value by value, as fz.adamw(lr)"
    )


class Entry(NamedTuple):
    """One optimizer in its place: where its state is kept, and which leaves it has."""

    key: str
    tx: GradientTransformation
    part: int | None = None  # of a partition; None: it has all leaves

    def init(self, params: Slots) -> Tree:
        """Its state, for its own leaves."""
        return self.tx.init(params if self.tx.formula is not None else params.tree())

    def read(
        self, state: State, params: Slots, where: Where, ok: Tensor, donate: bool, elsewhere: Elsewhere | None
    ) -> Reading | None:
        """The rates of this update, for its leaves at `where`; None where it has no formula."""
        if self.tx.formula is None:
            return None
        if elsewhere is not None:
            return elsewhere(state, params)
        return self.tx.formula.read(state[self.key], Slots(params.buffers, where), ok, donate)


# one optimizer, the place of its leaves, and their numbers; None for all
Holding = tuple[Entry, Where, tuple[int, ...] | None]


class Shares(NamedTuple):
    """Who has which leaves: an optimizer all, those of a partition each its own."""

    entries: tuple[Entry, ...]
    parts: tuple[Part, ...]
    known: list[tuple[Where, list[Holding]]]  # what was worked out for the last places

    def of(self, where: Where) -> list[Holding]:
        """What each optimizer has of the leaves at a place."""
        if not self.parts:
            return [(self.entries[0], where, None)]
        for known, found in self.known:
            if known is where:
                return found
        held = owners(self.parts, where.structure)
        having: list[Holding] = [(e, subset(where, own), own) for e, own in zip(self.entries, held, strict=True)]
        self.known[:] = [(where, having), *self.known[:7]]
        return having

    def init(self, params: Slots) -> State:
        """Every optimizer's state by its key."""
        return {
            e.key: e.init(params if held is None else taken(params, where)) for e, where, held in self.of(params.where)
        }


def shares_of(g: Grad, tx: Optimizer) -> tuple[Grad, str, Shares]:
    """g with all but the last name of an optimizer or a partition, that name, and who has what."""
    if not isinstance(tx, Partition):
        g = _placed(g, tx)
        return g, tx.name, Shares((Entry(slot_name(g, tx.name), tx),), (), [])
    entries: list[Entry] = []
    for i, part in enumerate(tx.parts):
        g = _placed(g, part.tx) if not i else _passed(_placed(g, part.tx), str(tx.parts[i - 1]))
        entries.append(Entry(slot_name(g, part.tx.name), part.tx, i))
    return g, str(tx.parts[-1]), Shares(tuple(entries), tx.parts, [])


def _passed(g: Grad, name: str) -> Grad:
    return g._replace(names=(*g.names, name), arrows=(*g.arrows, g.layout))
