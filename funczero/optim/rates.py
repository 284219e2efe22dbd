"""Learning rate and weight decay: a number, a schedule of applied updates, rules by path, or a tree."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funczero import tree
from funczero.spec import Slots

Rate = float | Callable[[Tensor], Tensor] | Sequence[tuple[str, Any]] | Any
Beta = float | Callable[[Tensor], Tensor]  # one for all leaves


def leaf_rates(rate: Rate, params: Slots, what: str) -> list[Any]:
    """One number or schedule a leaf.

    Rules are (regex on the path, number or schedule) pairs, the first match counts; a rule with regex '' is the default.
    """
    structure = params.where.structure
    if _plain(rate):
        return [rate] * len(structure.leaves)
    if isinstance(rate, (list, tuple)) and rate and all(isinstance(r, tuple) and len(r) == 2 and isinstance(r[0], str) for r in rate):
        out = [tree.rule(rate, leaf.path, None) for leaf in structure.leaves]
        missing = [leaf.path for leaf, r in zip(structure.leaves, out, strict=True) if r is None]
        if missing:
            raise ValueError(f"{what}: no rule matches parameter {missing[0]!r}; end the rules with ('', default)")
        return out
    try:
        flat = structure.treedef.flatten_up_to(rate)
    except ValueError as e:
        raise TypeError(f"{what}: {type(rate).__name__} is neither a number, a schedule, rules [(regex, value), ...] nor a tree like the parameters: {e}") from None
    by_leaf: list[Any] = [None] * len(structure.leaves)
    for place, r in zip(structure.places, flat, strict=True):
        by_leaf[place] = r
    bad = next((leaf.path for leaf, r in zip(structure.leaves, by_leaf, strict=True) if not _plain(r)), None)
    if bad is not None:
        raise TypeError(f"{what}: the value for parameter {bad!r} is neither a number nor a schedule")
    return by_leaf


def _plain(rate: Any) -> bool:
    return callable(rate) or isinstance(rate, (int, float)) and not isinstance(rate, bool)


def at(rate: Any, updates: Tensor) -> float | Tensor:
    """A rate's value after `updates` applied updates; a number on the CPU, where reading it costs nothing."""
    if not callable(rate):
        return float(rate)
    now = torch.as_tensor(rate(updates))
    return now.item() if now.device.type == "cpu" else now.float()


def groups(lr: Rate, decay: Rate, params: Slots, grads: Slots, *moments: Slots) -> list[tuple[Any, Any, list[list[Tensor]]]]:
    """(lr, decay, [params, grads, *moments]) for every pair of rates: whole buffers where all leaves share one, else padded slots."""
    trees = (params, grads, *moments)
    if _plain(lr) and _plain(decay):
        kept = [u for u, g in enumerate(grads.buffers) if g.numel()]
        return [(lr, decay, [[t.buffers[u] for u in kept] for t in trees])]
    found: dict[tuple[Any, Any], list[int]] = {}
    where = params.where
    for i, pair in enumerate(zip(leaf_rates(lr, params, "lr"), leaf_rates(decay, params, "weight_decay"), strict=True)):
        if grads.buffers[where.structure.leaves[i].unit].numel() and where.slots[i].length:
            found.setdefault(pair, []).append(i)

    def slot(t: Slots, i: int) -> Tensor:
        return t.buffers[where.structure.leaves[i].unit][where.slots[i].offset :][: where.slots[i].length]

    return [(*pair, [[slot(t, i) for i in members] for t in trees]) for pair, members in found.items()]


def shown(lr: Rate, updates: Tensor) -> Tensor:
    """The learning rate for the metrics: the number, or the first rule's default; nan for a tree."""
    if isinstance(lr, (list, tuple)):
        lr = tree.rule(lr, "", lr[-1][1]) if lr and isinstance(lr[0], tuple) else float("nan")
    if not _plain(lr):
        lr = float("nan")
    return torch.as_tensor(at(lr, updates), dtype=torch.float64, device=updates.device)


def update_trees(rate: Rate, params: Any, updates: Tensor, what: str) -> Any:
    """A tree of rates for the plain form, whose parameters are an ordinary tree."""
    if _plain(rate):
        return tree.map(lambda p: at(rate, updates), params)
    if isinstance(rate, (list, tuple)) and rate and isinstance(rate[0], tuple):
        named = dict(tree.paths(params))
        flat, treedef = tree.flatten(params)
        return tree.unflatten([at(tree.rule(rate, path, 0.0), updates) for path in named], treedef)
    return tree.map(lambda r: at(r, updates), rate)
