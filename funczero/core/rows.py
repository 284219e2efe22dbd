"""Which leaves of a batch hold rows, and in which dim: batches opened leaf by leaf, cut into micro-batches, joined.

A cut is a prefix tree of a batch: at each of its leaves the dim that rows lie in, or WHOLE for what every part gets as
it is. None, numbers, text and tensors without dims are whole anyway.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from funczero.core.tree import path_name
from funczero.core.types import Tree

WHOLE = -1  # in the place of a dim
PLAIN = (bool, int, float, complex, str, bytes)  # values that nothing can be cut off


class Leaf(NamedTuple):
    """One leaf of a batch."""

    path: str
    value: Any
    dim: int  # of its rows, or WHOLE

    @property
    def rows(self) -> int:
        """How many it has; -1 where every part gets it as it is."""
        x = self.value
        whole = x is None or self.dim == WHOLE or isinstance(x, PLAIN) or isinstance(x, Tensor) and not x.dim()
        return -1 if whole else x.shape[self.dim]


Build = Callable[[Sequence[Any]], Tree]  # a batch again, out of the values of its leaves


def opened(batch: Tree, cut: Tree = 0, what: str = "batch") -> tuple[list[Leaf], Build]:
    """The leaves of a batch, and what builds it again: through pytrees, mappings and dataclasses.

    A mapping is built as `type(batch)(dict)`, and a dataclass by its arguments, so that `__post_init__` derives the
    rest.

    Args:
      cut: a prefix tree of the batch; fields of mappings and dataclasses are keys of a dict there.

    Raises:
      ValueError: cut is no prefix of the batch.

    >>> [tuple(x) for x in opened({"x": torch.ones(2), "n": 3, "t": {"a": None}}, {"x": 0, "n": 0, "t": WHOLE})[0]][1:]
    [('n', 3, 0), ('t/a', None, -1)]
    """
    leaves: list[Leaf] = []
    build = _open(batch, cut, "", leaves, what)
    return leaves, lambda values: build(iter(values))


def tensors(batch: Tree) -> list[Tensor]:
    """The tensors of a batch."""
    return [x.value for x in opened(batch)[0] if isinstance(x.value, Tensor)]


def count(batch: Tree, what: str, cut: Tree = 0) -> int:
    """Rows of a batch, the same in every leaf that has rows.

    Raises:
      TypeError, ValueError: a leaf that cannot have rows; leaves that disagree; no rows at all.
    """
    return _count(opened(batch, cut, what)[0], what)


def split(batch: Tree, n: int, what: str, cut: Tree = 0) -> list[Tree]:
    """A batch cut into n equal parts, in order: rows in views of their leaves, and all else whole in every part.

    Raises:
      TypeError, ValueError: as count; rows that do not divide by n.

    >>> [p["n"] + p["x"].tolist() for p in split({"x": torch.arange(4), "n": [9]}, 2, "", {"x": 0, "n": WHOLE})]
    [[9, 0, 1], [9, 2, 3]]
    """
    leaves, build = opened(batch, cut, what)
    if n == 1 and all(x.dim == WHOLE for x in leaves):
        return [batch]
    rows = _count(leaves, what)
    if n == 1:
        return [batch]
    if rows % n:
        raise ValueError(
            f"{what}: a batch of {rows} rows does not divide into {n} equal parts; give a multiple of {n} rows"
        )
    parts = [x.value.split(rows // n, x.dim) if x.rows > 0 else [x.value] * n for x in leaves]
    return [build([p[i] for p in parts]) for i in range(n)]


def joined(parts: Sequence[Tree], cut: Tree = 0) -> Tree:
    """Parts of a batch one after another; what is whole comes from the first."""
    if len(parts) == 1:
        return parts[0]
    leaves, build = opened(parts[0], cut)
    others = [leaves, *(opened(p, cut)[0] for p in parts[1:])]
    each = zip(*others, strict=True)
    return build([torch.cat([y.value for y in xs], xs[0].dim) if xs[0].rows >= 0 else xs[0].value for xs in each])


def moved(batch: Tree, device: torch.device) -> Tree:
    """A batch with its tensors on a device."""
    leaves, build = opened(batch)
    return build([x.value.to(device, non_blocking=True) if isinstance(x.value, Tensor) else x.value for x in leaves])


def counting(loss_fn: Callable[..., Any], cut: Tree) -> Callable[..., Any]:
    """A loss function that counts rows (per_row, mean_loss), of batches that are cut like this; others as they are."""
    return getattr(loss_fn, "cut_like", lambda cut: loss_fn)(cut)


def _count(leaves: list[Leaf], what: str) -> int:
    for x in leaves:
        _can_be_cut(x, what)
    have = [(x.rows, x) for x in leaves if x.rows >= 0]
    if not have:
        if any(x.dim == WHOLE and x.value is not None for x in leaves):
            why = "no leaf of the batch has rows, so that every part would be the whole batch and count once more"
            raise ValueError(f"{what}: {why}; give one leaf with rows, as the indices of what the loss is summed over")
        raise ValueError(f"{what}: the batch holds no tensor; give one with rows in dim 0")
    n, first = have[0]
    for m, x in have:
        if m != n:
            raise ValueError(
                f"{what}: the tensors of a batch disagree on their rows: {first.path!r} has {n} in dim {first.dim}, but"
                f" {x.path!r} has {m} in dim {x.dim}; in batch= write P() for a leaf that has no rows"
            )
    return n


def _can_be_cut(leaf: Leaf, what: str) -> None:
    """Refuse what is neither whole nor a tensor with a dim of rows."""
    path, x, dim = leaf
    if x is None or dim == WHOLE or isinstance(x, PLAIN):
        return
    whole = f"in batch= write P() for {path!r} if it belongs to all rows"
    if not isinstance(x, Tensor):
        kind = f"a {type(x).__name__}{' of numbers or text' * (type(x) in (list, tuple))}"
        raise TypeError(f"{what}: {path!r} of the batch is {kind}, which has no rows to cut; give a tensor, or {whole}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{what}: {path!r} of the batch is sparse or nested, and is not cut; give it dense, or {whole}")
    if 0 < x.dim() <= dim:
        raise TypeError(
            f"{what}: {path!r} of the batch has shape {tuple(x.shape)}, so no rows in dim {dim}; in batch= write the"
            " dim of its rows, or P() if it has none"
        )


def _open(node: Any, cut: Tree, path: str, out: list[Leaf], what: str) -> Callable[[Iterator[Any]], Any]:
    """Adds the leaves of a node, and says how it is built from an iterator over all values.

    Under one spec a list or tuple of nothing but numbers or text is a leaf: its members may be one a row.
    """
    listed = type(node) in (list, tuple) and len(node) > 0 and all(isinstance(x, PLAIN) for x in node)
    children = None if listed and isinstance(cut, int) else _children(node)
    if children is None:
        if not isinstance(cut, int):
            if node is not None:
                why = f"batch= has a tree of specs for {path or 'the batch'!r}, which is a {type(node).__name__}"
                raise ValueError(f"{what}: {why}; write one spec there")
            cut = WHOLE
        out.append(Leaf(path, node, cut))
        return next
    pairs, make = children
    specs = _below(cut, [key for key, _ in pairs], path, what)
    inner = [_open(x, c, f"{path}/{key}" if path else key, out, what) for (key, x), c in zip(pairs, specs, strict=True)]

    def build(values: Iterator[Any]) -> Any:
        parts = [b(values) for b in inner]
        try:
            return make(parts)
        except (TypeError, ValueError) as error:
            why = f"{path or 'the batch'!r} is a {type(node).__name__}, which cannot be made again from its leaves"
            raise TypeError(f"{what}: {why} ({error}); give a dict") from error

    return build


def _below(cut: Tree, keys: list[str], path: str, what: str) -> list[Tree]:
    """The cuts of a node's children."""
    if isinstance(cut, int):
        return [cut] * len(keys)
    found = dict((_children(cut) or ([], None))[0])
    odd = sorted(found.keys() ^ set(keys))
    if odd:
        at = f"{path}/{odd[0]}" if path else odd[0]
        said, there = ("names", "does not") if odd[0] in found else ("says nothing of", "does")
        raise ValueError(
            f"{what}: batch= {said} {at!r}, and the batch {there} have it; write one spec for each of {sorted(keys)}"
        )
    return [found[key] for key in keys]


def _children(node: Any) -> tuple[list[tuple[str, Any]], Callable[[list[Any]], Any]] | None:
    """The children of a node by key, and what makes a node of them; None for a leaf."""
    if node is None or isinstance(node, (Tensor, PackedSequence, *PLAIN)):
        return None
    if not pytree.tree_is_leaf(node):
        pairs, form = pytree.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
        return [(path_name(p), x) for p, x in pairs], lambda xs: pytree.tree_unflatten(xs, form)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [f.name for f in dataclasses.fields(node) if f.init]
        again = lambda xs: dataclasses.replace(node, **dict(zip(names, xs, strict=True)))
        return [(name, getattr(node, name)) for name in names], again
    if isinstance(node, Mapping):
        keys = list(node)
        kind: Any = type(node)
        return [(str(k), node[k]) for k in keys], lambda xs: kind(dict(zip(keys, xs, strict=True)))
    return None
