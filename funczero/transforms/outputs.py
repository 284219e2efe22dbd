"""What a loss returns beside its sums (aux): sums over the update, this rank's rows, or the rows of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from funczero.comm.words import count, values, words
from funczero.core import order, tree
from funczero.core.number import dtype_name, kind, shown
from funczero.core.types import Tree

RULES = ("sum", "rows", "cat")
Rules = Sequence[tuple[str, str]]  # (regex, rule)


@dataclass(frozen=True)
class Form:
    """The form of an aux tree: a leaf to whoever walks through a state."""

    treedef: TreeSpec
    rules: tuple[str, ...]  # by leaf
    shapes: tuple[tuple[int, ...], ...]  # by leaf, of sums

    @property
    def paths(self) -> list[tuple[str, str]]:
        """(path, rule) of every leaf."""
        return tree.paths(tree.unflatten([*self.rules], self.treedef))


class Aux(NamedTuple):
    """The aux of some micro-batches, in the order of time."""

    sums: Tensor  # [micro-batches, n] float64
    rows: tuple[Tensor, ...]  # this rank's, along dim 0
    cat: tuple[Tensor, ...]  # [micro-batches, ...]
    form: Form

    def joined(self, later: Aux) -> Aux:
        """With those of later micro-batches.

        Raises:
          TypeError: they are another tree.
        """
        if later.form != self.form or [x.shape[1:] for x in self.cat] != [x.shape[1:] for x in later.cat]:
            raise TypeError(
                "value_and_grad: the aux of one micro-batch has another form than that of another: its tree, the shape"
                " of a sum, or of what is joined (cat); return the same form for all"
            )
        rows, cat = (
            tuple(torch.cat([x, y]) for x, y in zip(a, b, strict=True))
            for a, b in ((self.rows, later.rows), (self.cat, later.cat))
        )
        return Aux(torch.cat([self.sums, later.sums]), rows, cat, self.form)

    def __str__(self) -> str:
        """Its form, which must be the same on every rank: what is added or joined is known by its place alone."""
        joined, words = iter(self.cat), []
        for (path, rule), shape in zip(self.form.paths, self.form.shapes, strict=True):
            x = next(joined) if rule == "cat" else None
            of = "" if rule == "rows" else f" {shape}" if x is None else f" {tuple(x.shape[1:])} {x.dtype}"
            words.append(f"{path!r} by {rule}{of}")
        return ", ".join(words)

    def sent(self) -> list[Tensor]:
        """int64 [micro-batches, words]: what travels of it."""
        return [self.sums.contiguous().view(torch.int64), *map(words, self.cat)]

    def read(self, table: Tensor, came: Tensor | None = None) -> Tree:
        """The aux of an update.

        Args:
          table: int64 [micro-batches, words], of all ranks, by global index; its first columns are these.
          came: bool [micro-batches]: those that there are; None: all.
        """
        n, every = self.sums.shape[1], []
        sums, table = table[:, :n].contiguous().view(torch.float64), table[:, n:]
        for x in self.cat:
            k = count(x.shape[1:], x.dtype)
            found, table = values(table[:, :k], x.shape[1:], x.dtype), table[:, k:]
            every.append(found if came is None else found[came])
        return self.built(order.tree_sum(sums), every)

    def built(self, sums: Tensor, every: Sequence[Tensor]) -> Tree:
        """The aux of an update, out of its sums and of what is joined, [micro-batches, ...]."""
        shapes = [s for s, rule in zip(self.form.shapes, self.form.rules, strict=True) if rule == "sum"]
        split = iter(sums.split_with_sizes([prod(s) for s in shapes]) if shapes else ())
        of = {
            "sum": (x.view(s) for x, s in zip(split, shapes, strict=True)),
            "rows": iter(self.rows),
            "cat": (x.flatten(0, 1) if x.dim() > 1 else x for x in every),
        }
        return tree.unflatten([next(of[rule]) for rule in self.form.rules], self.form.treedef)


def aux_of(aux: Any, rules: Rules, device: torch.device) -> Aux:
    """The aux of one micro-batch.

    Raises:
      TypeError, ValueError: a leaf is no number or tensor, or has no rule and is not 0-d; by path.
    """
    named = tree.paths(aux)
    for regex, _ in rules:
        if why := tree.unmatched(regex, [path for path, _ in named]):
            raise ValueError(f"value_and_grad: has_aux: {why.replace('parameter', 'leaf of aux')}; correct it")
    said = tuple(tree.rule(rules, path, "") for path, _ in named)
    flat = [_leaf(path, x, rule, device) for (path, x), rule in zip(named, said, strict=True)]
    chosen = tuple(rule or "sum" for rule in said)
    by = {rule: [x for x, r in zip(flat, chosen, strict=True) if r == rule] for rule in RULES}
    sums = [x.double().reshape(-1) for x in by["sum"]]
    shapes = tuple(tuple(x.shape) if r == "sum" else () for x, r in zip(flat, chosen, strict=True))
    form = Form(tree.flatten(aux)[1], chosen, shapes)
    empty = torch.zeros(0, dtype=torch.float64, device=device)
    return Aux(torch.cat([empty, *sums])[None], tuple(by["rows"]), tuple(x[None] for x in by["cat"]), form)


def _leaf(path: str, x: Any, rule: str, device: torch.device) -> Tensor:
    where = f"aux {path!r}" if path else "aux"
    if not isinstance(x, (Tensor, int, float)):
        remedy = "return numbers and tensors, or leave it out"
        raise TypeError(f"value_and_grad: {where} is {kind(x)}, which cannot be added or joined; {remedy}")
    y = torch.as_tensor(x, device=device)
    what = f"{where} is a tensor of shape {tuple(y.shape)} and {dtype_name(y.dtype)}"
    if not rule and y.dim():
        remedy = (
            f"write x.sum(), or has_aux=[({path!r}, 'rows')] for this rank's rows, 'cat' for all ranks', 'sum' to"
            " add it"
        )
        raise TypeError(f"value_and_grad: {what}, but what has no rule is a 0-d sum; {remedy}")
    if rule in ("", "sum") and y.is_complex():
        raise TypeError(
            f"value_and_grad: {what}, but sums are real; return its real and imaginary part, or leave it out"
        )
    if rule == "rows" and not y.dim():
        raise TypeError(f"value_and_grad: {what} and has no rows; write 'sum', or 'cat' for one value a micro-batch")
    return y


def rules_of(has_aux: Any) -> Rules | None:
    """The rules that `has_aux` means; None where the loss returns no aux.

    Raises:
      TypeError, ValueError: it is no bool and no list of rules.
    """
    if isinstance(has_aux, bool):
        return () if has_aux else None
    want = f"True, or [(regex, rule), ...] with rules of {list(RULES)}"
    if not isinstance(has_aux, (list, tuple)) or not has_aux:
        raise TypeError(f"value_and_grad: has_aux={shown(has_aux)} is {kind(has_aux)}; write {want}")
    for one in has_aux:
        if not isinstance(one, tuple) or len(one) != 2 or not isinstance(one[0], str) or one[1] not in RULES:
            raise ValueError(f"value_and_grad: has_aux has {shown(one)}; write {want}")
    return tuple(has_aux)
