"""What is right by the letter and seldom meant: said once, by name, on one rank. Nothing here changes a value or
sends a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from absl import logging
from torch import Tensor

from funczero.core import tree
from funczero.core.number import dtype_name
from funczero.core.policy import Policy
from funczero.core.rows import opened
from funczero.core.types import Layout, Updated
from funczero.layout.slots import Slots

# updates after which equal losses on all ranks are no accident: weights that begin at zero give one equal loss
LOOKS = 3


def narrow(params: Any, policy: Policy) -> str:
    """A model in a narrower dtype than the policy computes in."""
    bits = torch.finfo(policy.compute).bits
    odd = [(path, x.dtype) for path, x in tree.paths(params) if torch.finfo(x.dtype).bits < bits]
    if not odd:
        return ""
    have, there = map(dtype_name, (odd[0][1], policy.compute))
    who = f"parameter {odd[0][0]!r}{f' and {len(odd) - 1} more' * (len(odd) > 1)}"
    return (
        f"init: {who} came in {have}, but the policy computes in {there}; write policy='compute={have}' to compute as"
        " the model did"
    )


def nested(params: Any, units: Sequence[str]) -> str:
    """Lists of lists as units: an inner list is one unit, whatever it holds."""
    for u in units:
        at: Any = params
        for key in u.split("/"):
            at = (
                at.get(key)
                if isinstance(at, dict)
                else at[int(key)] if isinstance(at, (list, tuple)) and key.isdigit() and int(key) < len(at) else None
            )
        inner = [x for x in at if isinstance(x, (list, tuple)) and len(x) > 1] if isinstance(at, (list, tuple)) else []
        if inner and all(
            not pytree.tree_is_leaf(y) and tree.flatten(x[0])[1] == tree.flatten(y)[1] for x in inner for y in x
        ):
            each = ", ".join(repr(f"{u}/{i}") for i in range(min(len(inner), 2)))
            return (
                f"value_and_grad: units={u!r} is a list of lists of blocks, and each inner list is gathered as one"
                f" unit; write units=({each}, ...) for its blocks"
            )
    return ""


class Early:
    """Looks at the first updates of a step, and then no more."""

    def __init__(self, batch: tuple[str, ...], rows: bool) -> None:
        """batch: mesh axes that the batch is split over; rows: is the batch one of rows?"""
        self.batch, self.updates = batch, 0
        self.alike = rows
        self.used: set[int] | None = set()  # leaves of which this rank has seen a gradient; None: nobody looks any more
        self.idle: dict[int, Tensor] = {}  # copies of the others

    @property
    def open(self) -> bool:
        """Is there anything left to look for?"""
        return self.updates < LOOKS

    def before(self, masters: Slots) -> None:
        """Before the second update: copies of what the first had no gradient for."""
        if self.updates == 1 and self.used is not None:
            structure = masters.where.structure
            parts = enumerate(masters.leaves())
            self.idle = {
                i: x.detach().clone()
                for i, x in parts
                if x is not None and not structure.frozen(i) and i not in self.used
            }

    def after(self, out: Updated, masters: Slots, batch: Any, layout: Layout) -> list[str]:
        """What to say of an update."""
        self.updates += 1
        said = [self._decayed(masters)] if self.idle and bool(out.ok) else []
        if self.updates > 1:
            self.used, self.idle = None, {}
        self.alike = (
            self.alike
            and bool(out.weight > 0)
            and self._alike(out.logs.get("rows"), layout)
            and not _constant(batch, layout)
        )
        if self.alike and self.updates == LOOKS:
            said.append(
                f"train_step: in the first {LOOKS} updates all ranks had the same losses and weights, as if each were"
                " given the same rows, so that each row counts once a rank; give every rank its own with"
                " step.local_rows(batch)"
            )
        return [x for x in said if x]

    def _alike(self, rows: Tensor | None, layout: Layout) -> bool:
        """Does every micro-batch weigh and cost the same on all ranks?"""
        digits = layout.order[::-1]  # the slowest first
        over = [d for d, (name, n) in enumerate(digits) if name in self.batch and n > 1]
        if rows is None or not over:
            return False
        if len(rows) < layout.stride:  # dealt unevenly, so that ranks had not the same
            return False
        table = rows.view(*(n for _, n in digits), -1)
        return all(bool((table == table.narrow(d, 0, 1)).all()) for d in over)

    def _decayed(self, masters: Slots) -> str:
        """Parameters that no gradient reached and that shrank all the same: every value by one factor."""
        leaves, names = masters.leaves(), []
        for i, old in self.idle.items():
            new = leaves[i]
            if self.used is not None and i not in self.used and new is not None and old.numel():
                a, b = old.double().flatten(), new.double().flatten()
                ratio = torch.dot(a, b) / torch.dot(a, a).clamp(min=torch.finfo(torch.float64).tiny)
                if not torch.equal(a, b) and bool((b - ratio * a).abs().max() <= 1e-5 * a.abs().max()):
                    names.append(masters.where.structure.leaves[i].path)
        if not names:
            return ""
        which = f"{', '.join(map(repr, names[:4]))}{f' and {len(names) - 4} more' * (len(names) > 4)}"
        return (
            f"train_step: the loss did not use {which}, and weight decay shrinks what has no gradient, where torch"
            " leaves it; write fz.freeze(...) for it"
        )


def _constant(batch: Any, layout: Layout) -> bool:
    """Are all rows of a batch one row? Then equal rows on all ranks are meant."""
    found = [(x, d) for _, x, d in opened(batch, layout.cut)[0] if isinstance(x, Tensor) and -1 < d < x.dim()]
    return all(torch.equal(x, x.narrow(d, 0, 1).expand_as(x)) for x, d in found if x.numel())


def say(said: set[str], *words: str) -> None:
    """One line each, once."""
    for x in words:
        if x and x not in said:
            said.add(x)
            logging.warning("%s", x)
