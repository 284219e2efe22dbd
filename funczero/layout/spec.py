"""Partition specs: the names of the mesh axes that tensor dims are split over."""

from __future__ import annotations

from typing import Any

import torch.utils._pytree as pytree

from funczero.core import tree
from funczero.core.rows import WHOLE
from funczero.core.types import ChainError, Tree


class P(tuple[str | tuple[str, ...] | None, ...]):
    """A PartitionSpec: for every tensor dim the mesh axis (or axes, outermost first) it is split over, or None.

    >>> P("data", None), P(("node", "local")), P()
    (P('data', None), P(('node', 'local')), P())
    """

    def __new__(cls, *dims: str | tuple[str, ...] | None) -> P:
        """One entry a tensor dim; missing ones are None."""
        for d in dims:
            names = d if isinstance(d, tuple) else (d,)
            if not all(n is None or isinstance(n, str) for n in names):
                raise TypeError(
                    f"P: {d!r} is not a mesh axis; write a name, a tuple of names or None for every tensor dim"
                )
        return super().__new__(cls, dims)

    def __getnewargs__(self) -> tuple[str | tuple[str, ...] | None, ...]:
        """A copied or pickled spec is made of its dims one by one, or they would become the axes of a single dim."""
        return tuple(self)

    def __repr__(self) -> str:
        return f"P({', '.join(map(repr, self))})"

    def axes(self) -> tuple[tuple[str, int], ...]:
        """Every mesh axis with the tensor dim it splits, in order."""
        return tuple(
            (a, d)
            for d, names in enumerate(self)
            for a in (names if isinstance(names, tuple) else (names,))
            if a is not None
        )


def of_batch(spec: Any) -> tuple[tuple[str, ...], Tree]:
    """The mesh axes that a batch is split over, and how it is cut (rows.py).

    Args:
      spec: one P for all leaves, or a prefix tree of them: `P("data")` has its rows in dim 0, `P(None, "data")` in dim
        1, and P() inside a tree is whole on every rank and in every micro-batch. A single P() is rows in dim 0 that no
        axis splits.

    Raises:
      ChainError: a leaf is split in two dims, or over other axes than another one; something is no spec.

    >>> of_batch({"x": P("data"), "table": P(), "tokens": P(None, "data")})
    (('data',), {'x': 0, 'table': -1, 'tokens': 1})
    >>> of_batch(P()), of_batch("data")
    (((), 0), (('data',), 0))
    """
    if isinstance(spec, str) or type(spec) is tuple and spec and all(isinstance(a, str) for a in spec):
        spec = P(spec)
    if spec == P() and isinstance(spec, P):
        return (), 0
    named = pytree.tree_flatten_with_path(spec)[0]
    for path, x in named:
        _one_dim(tree.path_name(path), x)
    split = [(tree.path_name(path), x) for path, x in named if x.axes()]
    axes = tuple(a for a, _ in split[0][1].axes()) if split else ()
    for name, x in split:
        if tuple(a for a, _ in x.axes()) != axes:
            raise ChainError(
                f"value_and_grad: batch= splits {split[0][0]!r} over {list(axes)}, but {name!r} over"
                f" {[a for a, _ in x.axes()]}; write the same axes for every leaf with rows, and P() for the others"
            )
    return axes, tree.map(lambda x: x.axes()[0][1] if x.axes() else WHOLE, spec)


def _one_dim(name: str, spec: Any) -> None:
    """Refuse what is no spec of rows."""
    at = f" has {name!r}:" if name else " is"
    if not isinstance(spec, P):
        raise ChainError(
            f"value_and_grad: batch={at} {spec!r}, which is no spec; write P('data') for rows, P() for what is whole"
        )
    if len({d for _, d in spec.axes()}) > 1:
        raise ChainError(
            f"value_and_grad: batch={at} {spec}, which splits two dims, but rows lie in one; write"
            f" P({tuple(a for a, _ in spec.axes())!r})"
        )
