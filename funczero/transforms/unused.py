"""Leaves that nobody used in an update are left as they are: parameters and moments, as where torch's grad is None."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.transform import refuse
from funczero.core.types import Grad, State, Updated, Value
from funczero.layout.slots import Slots
from funczero.transforms.shares import Shares

Apply = Callable[[Value, State], tuple[Updated, State]]


def not_here(g: Grad, name: str, why: str) -> None:
    """Refuse `unused="keep"` where it is written.

    Raises:
      ChainError: it is.
    """
    if g.env.keeps:
        raise refuse(g, name, f"{why}, and unused='keep' is written; leave that out here")


def left_alone(g: Grad, shares: Shares, fn: Apply) -> Apply:
    """The last optimizer, which writes nothing where no micro-batch of any rank had a gradient (`unused="keep"`).

    It waits for the packed sum, which knows. Counts of updates and rates go on.

    Raises:
      ChainError: it keeps a state in a form of its own.
    """
    if not g.env.keeps:
        return fn
    for e in shares.entries:
        if e.tx.formula is None:
            not_here(g, e.tx.name, "of a state in a form of its own nobody knows what belongs to one leaf")
    keys = ("params", *(e.key for e in shares.entries))

    def kept(out: Value, state: State) -> tuple[Updated, State]:
        assert out.used is not None
        idle = (~out.used).nonzero().view(-1).tolist()
        old = _parts({k: state[k] for k in keys}, idle, copied=g.env.donate)
        updated, new = fn(out, state)
        if old:  # of frozen leaves alone there is nothing
            torch._foreach_copy_(_parts({k: new[k] for k in keys}, idle), old)
        return updated, new

    return kept


def _parts(state: State, leaves: Sequence[int], copied: bool = False) -> list[Tensor]:
    """What this rank has of some leaves, of parameters and of everything that lies like them, in one order."""
    found = []
    for slots in tree.leaves(state, is_leaf=lambda x: isinstance(x, Slots)):
        if isinstance(slots, Slots):
            parts = slots.trainable().leaves()
            found += [x for i in leaves if (x := parts[i]) is not None]
    return [x.clone() for x in found] if copied else found
