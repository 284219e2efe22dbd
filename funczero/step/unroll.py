"""Many steps as one function, and many states as one, as meta-learning and ensembles want a differentiable step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.straight import straight
from funczero.gradients.layers import captured


def unroll(
    fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Sequence[Any], remat: int | None = None
) -> tuple[Any, list[Any]]:
    """(carry after all of xs, what fn returned beside it): `carry, y = fn(carry, x)`, one x after another.

    Law: values and derivatives are the loop's. With remat only every remat-th carry is kept, and the steps between run
    once more for a derivative: n steps hold n / remat + remat of them instead of n.

    Args:
      fn: pure, as a differentiable step; with remat it may capture no tensor that is differentiated: hand it in through
        the carry or xs.
      xs: one a step, as batches, or trees of a batch and its learning rate.
      remat: steps between what is kept; None keeps every step's.

    Raises:
      TypeError: fn captures a tensor that is differentiated.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.

    >>> grow = lambda c, x: (c * x, c)
    >>> unroll(grow, torch.tensor(1.0), [torch.tensor(2.0)] * 3)
    (tensor(8.), [tensor(1.), tensor(2.), tensor(4.)])
    >>> last = lambda x: unroll(grow, torch.tensor(1.0), [x] * 3, remat=2)[0]
    >>> torch.func.grad(last)(torch.tensor(2.0))
    tensor(12.)
    """
    if remat is None:
        return _looped(fn, carry, xs)
    if isinstance(remat, bool) or not isinstance(remat, int) or remat < 1:
        raise ValueError(f"unroll: remat={remat!r} is not a number of steps; write an int of at least 1, or None")
    for x in captured(fn, transformed=True, owned=True):
        what = f"a tensor of shape {tuple(x.shape)}"
        raise TypeError(f"unroll: fn captures {what}, whose derivative would be lost; hand it in through carry or xs")
    ys: list[Any] = []
    chunk = lambda carry, xs: _looped(fn, carry, xs)
    for first in range(0, len(xs), remat):
        carry, found = straight(chunk, chunk, carry, list(xs[first : first + remat]))
        ys += found
    return carry, ys


def _looped(fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Sequence[Any]) -> tuple[Any, list[Any]]:
    ys = []
    for x in xs:
        carry, y = fn(carry, x)
        ys.append(y)
    return carry, ys


def stack(trees: Sequence[Any]) -> Any:
    """Like trees as one, every tensor with a new dim 0: states of many seeds, for vmap over a differentiable step.

    Raises:
      ValueError: there are none, or they are not alike.

    >>> stack([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])["w"].shape
    torch.Size([2, 2])
    """
    if not trees:
        raise ValueError("stack: there is nothing to stack; give at least one tree")
    (first, form), *others = [tree.flatten(t) for t in trees]
    for n, (flat, spec) in enumerate(others, 1):
        if spec != form or [_shape(x) for x in flat] != [_shape(x) for x in first]:
            raise ValueError(f"stack: tree {n} is not like tree 0; give trees of one form, shapes and dtypes")
    columns = zip(first, *(flat for flat, _ in others), strict=True)
    return tree.unflatten([torch.stack(xs) if isinstance(xs[0], Tensor) else xs[0] for xs in columns], form)


def unstack(stacked: Any) -> list[Any]:
    """The trees that were stacked: `stack` backwards.

    >>> [t["w"].tolist() for t in unstack({"w": torch.tensor([[1.0], [2.0]])})]
    [[1.0], [2.0]]
    """
    flat, form = tree.flatten(stacked)
    n = next((len(x) for x in flat if isinstance(x, Tensor)), 0)
    pick = lambda i: [x[i] if isinstance(x, Tensor) else x for x in flat]
    return [tree.unflatten(pick(i), form) for i in range(n)]


def _shape(x: Any) -> Any:
    return (x.shape, x.dtype) if isinstance(x, Tensor) else x
