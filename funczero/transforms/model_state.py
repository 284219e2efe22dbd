"""A model's own state: what a forward changes beside gradients, as running statistics, counters and hidden states.

Every micro-batch of an update reads the state as it was before it. What they return is combined at the mean, in the
order of gradients, by a rule a leaf; so the new state does not depend on ranks, stages or the order of time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from funczero.comm.words import count, values, words
from funczero.core import order, tree
from funczero.core.number import dtype_name, kind, shown
from funczero.core.types import State, Tree

MODEL = "model_state"  # where a chain keeps it
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]  # ([n, ...] of micro-batches, their weights [n], old) -> new
Rule = str | Combine  # "mean", "sum", "first", "rows", or a function of your own


class ModelState(NamedTuple):
    """A model's state, whole and the same on every rank."""

    values: Tree


def _mean(new: Tensor, weights: Tensor, old: Tensor) -> Tensor:
    wide, shape = torch.promote_types(new.dtype, torch.float64), (-1, *[1] * (new.dim() - 1))
    terms = torch.where(weights.view(shape) > 0, new.to(wide) * weights.view(shape), 0.0)
    return order.tree_sum(terms) / order.tree_sum(weights)


def _exact_mean(new: Tensor, weights: Tensor, old: Tensor) -> Tensor:
    """Where all values are one it is that one, and nothing is rounded."""
    return torch.where((new == new[:1]).all(0), new[0], _mean(new, weights, old).to(new.dtype))


def _sum(new: Tensor, weights: Tensor, old: Tensor) -> Tensor:
    return old + order.tree_sum(new - old)


def _first(new: Tensor, weights: Tensor, old: Tensor) -> Tensor:
    return new[0]


def _rows(new: Tensor, weights: Tensor, old: Tensor) -> Tensor:
    return new.flatten(0, 1)


EXACT: dict[str, Combine] = {"mean": _exact_mean, "sum": _sum, "first": _first, "rows": _rows}
SMOOTH = EXACT | {"mean": _mean}  # for derivatives


@dataclass(frozen=True, eq=False)
class Model:
    """The form of a model's state: its first values, and a rule for every leaf."""

    treedef: TreeSpec
    paths: tuple[str, ...]
    initial: tuple[Tensor, ...]
    rules: tuple[Rule, ...]

    def __str__(self) -> str:
        kinds = Counter(rule if isinstance(rule, str) else "a rule of its own" for rule in self.rules)
        by = ", ".join(f"{n} by {rule}" for rule, n in kinds.items())
        return f"{len(self.paths)} leaves of {sum(x.numel() for x in self.initial)} values ({by})"

    def init(self, device: torch.device) -> State:
        """Its entry in the state of a chain; copies."""
        return {MODEL: ModelState(tree.unflatten([x.to(device, copy=True) for x in self.initial], self.treedef))}

    def given(self, state: State, index: int, of: int) -> Tree:
        """What micro-batch `index` of `of` reads: a copy that is its own, of leaves by rows its rows alone."""
        flat = zip(self.paths, tree.leaves(state[MODEL].values), self.rules, strict=True)
        return tree.unflatten(
            [_part(p, x, index, of).clone() if rule == "rows" else x.clone() for p, x, rule in flat], self.treedef
        )

    def returned(self, new: Any, given: Tree) -> tuple[Tensor, ...]:
        """What a loss returned as its state, checked, as leaves [1, ...].

        Args:
          given: what it was given.

        Raises:
          TypeError: it is no tree like the given one, or a leaf has another shape or dtype; by path.
        """
        try:
            flat = self.treedef.flatten_up_to(new)
        except ValueError as error:
            what = f"the loss function returned {kind(new)} as model state, which is no tree like the one it was given"
            raise TypeError(f"value_and_grad: {what} ({error}); return one value for every leaf") from None
        for path, x, old in zip(self.paths, flat, tree.leaves(given), strict=True):
            if not isinstance(x, Tensor) or x.shape != old.shape or x.dtype != old.dtype:
                want = f"a tensor of shape {tuple(old.shape)} and {dtype_name(old.dtype)}"
                have = f"{tuple(x.shape)} and {dtype_name(x.dtype)}" if isinstance(x, Tensor) else kind(x)
                raise TypeError(
                    f"value_and_grad: model state {path!r} came back as {have}; return {want}, as it was given"
                )
        return tuple(x[None] for x in flat)

    # --- at the mean -------------------------------------------------------------------------------------------------
    def sent(self, moved: Sequence[Tensor], first: bool) -> tuple[Tensor, Tensor]:
        """This rank's words: one row for each of its micro-batches; and those of the very first one, else zeros.

        Args:
          moved: by leaf [micro-batches, ...].
          first: has this rank the first micro-batch?
        """
        empty = torch.zeros(len(moved[0]), 0, dtype=torch.int64, device=moved[0].device)
        rows = [words(x) for x, rule in zip(moved, self.rules, strict=True) if rule != "first"]
        own = torch.cat([empty[:1], *(words(x[:1]) for x, r in zip(moved, self.rules, strict=True) if r == "first")], 1)
        return torch.cat([empty, *rows], 1), own[0] if first else torch.zeros_like(own[0])

    def combined(
        self, rows: Tensor, first: Tensor, weights: Tensor, state: State, ok: Tensor, came: Tensor | None = None
    ) -> State:
        """The entry after an update; the old one where it is skipped.

        Args:
          rows, first: the words of all micro-batches, by global index, and those of the first one.
          weights: [micro-batches].
          came: bool [micro-batches]: those that there are; None: all.
        """
        new, n = [], len(rows)
        for x, rule in zip(tree.leaves(state[MODEL].values), self.rules, strict=True):
            shape = (len(x) // n, *x.shape[1:]) if rule == "rows" else tuple(x.shape)
            k = count(shape, x.dtype)
            if rule == "first":
                found, first = values(first[None, :k], shape, x.dtype), first[k:]
            else:
                found, rows = values(rows[:, :k], shape, x.dtype), rows[:, k:]
            if came is not None and rule == "rows":
                found = torch.where(came.view(-1, *[1] * len(shape)), found, x.view(n, *shape))
            elif came is not None and rule != "first":
                found = found[came]
            new.append(found)
        return self.ruled(new, weights if came is None else weights[came], state, ok)

    def ruled(
        self,
        new: Sequence[Tensor],
        weights: Tensor,
        state: State,
        ok: Tensor,
        rules: Mapping[str, Combine] = EXACT,
    ) -> State:
        """The entry after an update, of what all micro-batches returned, by leaf [micro-batches, ...]."""
        out = []
        for path, xs, x, rule in zip(self.paths, new, tree.leaves(state[MODEL].values), self.rules, strict=True):
            y = (rules[rule] if isinstance(rule, str) else rule)(xs, weights, x)
            if y.shape != x.shape:
                why = f"made shape {tuple(y.shape)} of {tuple(x.shape)}"
                raise ValueError(f"value_and_grad: the rule of model state {path!r} {why}; return the leaf's own shape")
            out.append(torch.where(ok, y.to(x.dtype), x))
        return {MODEL: ModelState(tree.unflatten(out, self.treedef))}


def model_of(initial: Tree, rules: Sequence[tuple[str, Rule]]) -> Model:
    """The form of a state.

    Args:
      initial: its first values, a tree of tensors.
      rules: (regex, rule): the first whose regex is found in a leaf's path counts. By default floats are combined by
        their "mean", all others by "first".

    Raises:
      TypeError, ValueError: a leaf is no tensor; a rule is none, finds no leaf, or cannot be that leaf's.
    """
    named = tree.paths(initial)
    if not named:
        raise ValueError("value_and_grad: the model state has no leaf; leave out state, and the loss takes none")
    for path, x in named:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"value_and_grad: model state {path!r} is {kind(x)}; give a tree of tensors, as"
                f" torch.tensor({shown(x)})"
            )
    paths = tuple(path for path, _ in named)
    for regex, rule in rules:
        if not (callable(rule) or isinstance(rule, str) and rule in EXACT):
            raise ValueError(
                f"value_and_grad: {shown(rule)} is no rule of a model state; write one of {list(EXACT)}, or a function"
                " (values, weights, old) -> new"
            )
        if why := tree.unmatched(regex, paths):
            raise ValueError(
                f"value_and_grad: a rule of the model state finds no leaf: {why.replace('parameter', 'leaf')}"
            )
    chosen = tuple(tree.rule(rules, path, _default(x)) for path, x in named)
    for (path, x), rule in zip(named, chosen, strict=True):
        if rule == "mean" and not (x.is_floating_point() or x.is_complex()):
            raise ValueError(
                f"value_and_grad: model state {path!r} is {dtype_name(x.dtype)}, which has no mean; write 'first' or"
                " 'sum' for it"
            )
        if rule == "sum" and x.dtype == torch.bool:
            raise ValueError(f"value_and_grad: model state {path!r} is bool, which has no sum; write 'first' for it")
        if rule == "rows" and not x.dim():
            raise ValueError(
                f"value_and_grad: model state {path!r} is 0-d and has no rows; write 'mean', 'sum' or 'first' for it"
            )
    return Model(tree.flatten(initial)[1], paths, tuple(x.detach() for _, x in named), chosen)


def _part(path: str, x: Tensor, index: int, of: int) -> Tensor:
    """The rows of one micro-batch."""
    if len(x) % of:
        why = f"has {len(x)} rows, which do not divide by the {of} micro-batches of an update"
        raise ValueError(f"value_and_grad: model state {path!r} {why}; give as many rows as the global batch")
    return x.narrow(0, index * (len(x) // of), len(x) // of)


def _default(x: Tensor) -> Rule:
    return "mean" if x.is_floating_point() or x.is_complex() else "first"
