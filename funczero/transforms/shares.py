"""Who has which leaves where an optimizer, or a partition of several, stands in a chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from absl import logging
from torch import Tensor

from funczero.core.optimizer import GradientTransformation, Reading
from funczero.core.transform import refuse, slot_name
from funczero.core.types import Grad, State, Tree
from funczero.layout.lazy import Lazy
from funczero.layout.mesh import Mesh
from funczero.layout.slots import Slots
from funczero.layout.where import Where
from funczero.transforms.deal import told
from funczero.transforms.mean import value
from funczero.transforms.pairs import ByLeaf, on_all, plainly
from funczero.transforms.partition import Part, Partition, owners, subset, taken

Optimizer = GradientTransformation | Partition
Elsewhere = Callable[[State, Slots], Reading]  # the rates of an update, which another part of the state keeps


SAYS = {
    "leaf_norms": "squares of its leaves are summed over {axes}, as integers; no rows travel",
    "leafwise": (
        "rows of the mean gradient travel over {axes} to the rank that computes a leaf, and rows of its update back"
    ),
    "whole": (
        "all leaves and their gradients are gathered over {axes} at every update, and its state is whole on every"
        " rank: memory and traffic of a chain without ZeRO"
    ),
}


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


def cuts_of(g: Grad) -> list[str]:
    """The axes over which leaves are cut at this place."""
    return [a for a in g.layout.sharded if g.env.mesh.axes[a].size > 1]


def _placed(g: Grad, tx: GradientTransformation) -> Grad:
    """g as this optimizer may read it: a mean, and leaves as whole as it needs them."""
    g, why = value(g, tx.name), foreign(tx)
    if why is not None:
        raise refuse(g, tx.name, why)
    across = tx.formula is not None and tx.formula.across is not None
    known = across if tx.needs == "leaf_norms" or tx.formula is not None else tx.needs in ("leafwise", "whole")
    if tx.needs != "elementwise" and not known and cuts_of(g):
        raise refuse(g, tx.name, _undeclared(tx, list(g.layout.sharded)))
    return g


def _undeclared(tx: GradientTransformation, axes: list[str]) -> str:
    """Why this optimizer cannot stand in a bracket."""
    without = f"a chain without shard (stage 0), as all_reduce({axes[-1]!r}) in its place"
    if tx.needs is None:
        return (
            f"nothing says that it works value by value, but the leaves are cut over {axes} here; write fz.lift(pair,"
            " needs=...): 'elementwise' if every value of its updates and state depends on its own place alone,"
            f" 'leafwise' if each leaf moves by itself, 'whole' if it needs all at once; or {without}"
        )
    return (
        f"it needs whole leaves (elementwise=False), but they are cut over {axes} here; write {without}, fz.lift(pair,"
        " needs='leafwise') if each leaf moves by itself or needs='whole' if it needs all at once, or an optimizer that"
        " works value by value, as fz.adamw(lr)"
    )


class Entry(NamedTuple):
    """One optimizer in its place: where its state is kept, and which leaves it has."""

    key: str
    tx: GradientTransformation
    part: int | None = None  # of a partition; None: it has all leaves
    by_leaf: ByLeaf | None = None  # of a pair that is handed whole leaves, one at a time

    def init(self, params: Slots, lazy: Lazy, plain: bool) -> Tree:
        """Its state, for its own leaves.

        Args:
          params: this rank's part of them.
          lazy: all leaves, whole.
          plain: does its pair run, though it has a formula?
        """
        if self.tx.formula is not None and not plain:
            return self.tx.init(params)
        if self.by_leaf is not None:
            return self.by_leaf.init(params, lazy)
        if self.tx.needs == "whole":
            every, structure = lazy.at((), params.buffers[0].dtype).trainable(), params.where.structure
            held = tuple(i for i in range(len(structure.leaves)) if not structure.frozen(i))
            axes = [a for a, n, _ in params.where.coords if n > 1]
            if axes and not params.buffers[0].is_meta and not any(q for _, _, q in params.where.coords):
                logging.warning("%s: %s", self.tx.name, SAYS["whole"].format(axes=axes))
            params = every if structure == lazy.structure else taken(every, subset(every.where, held))
        return self.tx.init(params.tree())

    def updates(self, grads: Slots, mine: Slots, ok: Tensor, own: Tree, mesh: Mesh) -> tuple[Slots, Tree]:
        """What its pair adds to its leaves, and its new state.

        Args:
          grads: with their factor.
        """
        if self.by_leaf is not None:
            return self.by_leaf.update(grads, mine, ok, own, mesh)
        if self.tx.needs == "whole":
            return on_all(self.tx, grads, mine, ok, own, mesh)
        return plainly(self.tx, grads, mine, ok, own)

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

    def init(self, params: Slots, lazy: Lazy, plain: bool = False) -> State:
        """Every optimizer's state by its key.

        Args:
          lazy, plain: as Entry's.
        """
        return {
            e.key: e.init(params if held is None else taken(params, where), lazy, plain)
            for e, where, held in self.of(params.where)
        }


def shares_of(g: Grad, tx: Optimizer) -> tuple[Grad, str, Shares]:
    """g with all but the last name of an optimizer or a partition, that name, and who has what."""
    if not isinstance(tx, Partition):
        g = _placed(g, tx)
        return g, tx.name, Shares((_entry(g, tx),), (), [])
    entries: list[Entry] = []
    for i, part in enumerate(tx.parts):
        g = _placed(g, part.tx) if not i else _passed(_placed(g, part.tx), str(tx.parts[i - 1]))
        entries.append(_entry(g, part.tx, i))
    return g, str(tx.parts[-1]), Shares(tuple(entries), tx.parts, [])


def _passed(g: Grad, name: str) -> Grad:
    return g._replace(names=(*g.names, name), arrows=(*g.arrows, g.layout))


def _entry(g: Grad, tx: GradientTransformation, part: int | None = None) -> Entry:
    by_leaf = ByLeaf(tx) if tx.formula is None and tx.needs == "leafwise" else None
    return Entry(slot_name(g, tx.name), tx, part, by_leaf)


def noting(g: Grad, shares: Shares) -> Callable[[Where | None], list[str]]:
    """What a printed chain says of optimizers that need more than each value's own place, where leaves are cut."""
    axes, before = cuts_of(g), g.notes

    def notes(where: Where | None) -> list[str]:
        having = shares.of(where) if where is not None else [(e, None, None) for e in shares.entries]
        return before(where) + [_noted(e, axes, where, held) for e, _, held in having if e.tx.needs in SAYS]

    return notes if axes else before


def _noted(e: Entry, axes: list[str], where: Where | None, held: tuple[int, ...] | None) -> str:
    across = e.by_leaf.across if e.by_leaf else None if e.tx.formula is None else e.tx.formula.across
    said = f"{e.tx.name}: {SAYS[str(e.tx.needs)].format(axes=axes)}"
    if where is None or across is None or e.tx.needs != "leafwise":
        return said
    return f"{said}: {told(where, held, across)}"
