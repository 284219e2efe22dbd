"""The bracket: from here to its end, this rank's shard. The ZeRO stage is where it opens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from funczero.comm.edge import Edge
from funczero.comm.wire import Wire, as_born
from funczero.core.transform import refuse
from funczero.core.types import ChainError, Grad
from funczero.layout.cut import CutRule, Rules
from funczero.layout.spec import P
from funczero.transforms.chain import Bracket, Source, chain, fold, opening
from funczero.transforms.reduce import closed, summed


def shard(
    axis: str,
    *inside: Any,
    rules: Sequence[tuple[str, P]] | CutRule = (),
    threshold: int = 0,
    gather: Wire = as_born,
    scatter: Wire = as_born,
    frozen: Wire | None = None,
) -> Any:
    """`inside` on this rank's part of every leaf: a reduce-scatter where it opens, an all-gather where it closes.

    Law: opening it earlier changes bytes and memory, never values, nor bits when the chain deals the rows. With a
    gradient inside, parameters rest sharded and the bracket has no closing edge. Brackets nest to any depth, outermost
    axis first. A wire that rounds does so once for every sum over the axis, so fewer sums round less.

    Args:
      axis: a mesh axis that the batch is split over.
      inside: transforms, the optimizer, further brackets; or first of all the gradient (ZeRO-3).
      rules: (regex on the path, P): which tensor dim the axis cuts; P() keeps a leaf whole. By default dim 0. Binds
        inner brackets. Or a function (path, shape) -> P, or None for the default. Asked once a leaf, and the same
        answer on every rank.
      threshold: leaves with fewer elements stay whole (DeepSpeed: stage3_param_persistence_threshold).
      gather: how views travel over this axis: to a forward, to an evaluation, where the bracket closes, after a
        restore. Masters are exact, and so is a leaf that the axis leaves whole, for it does not travel.
      scatter: how gradients travel on their way to the sum, which is taken in `policy.accumulate`.
      frozen: how views of leaves that do not learn travel; by default as the others.

    Raises:
      ChainError: there is nothing inside.
      TypeError: a rule is no pair.

    Source: Rajbhandari et al., ZeRO, arXiv 1910.02054.
    """
    if not inside:
        raise ChainError(
            f"shard({axis!r}): there is nothing inside it; write the optimizer inside: shard({axis!r}, adamw(...))"
        )
    for pair in () if callable(rules) else rules:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], P):
            raise TypeError(
                f"shard({axis!r}): rule {pair!r} is not a pair of a regex and a P; write rules=[('w1$', P(None,"
                f" {axis!r}))]"
            )
    own = Edge(axis, Rules(rules if callable(rules) else tuple(rules), threshold), gather, scatter, frozen)
    inside = chain(*inside)
    if isinstance(inside[0], Source):
        source = inside[0]
        return source._replace(
            axes=(axis, *source.axes), edges=(own, *source.edges), transforms=(*source.transforms, *inside[1:])
        )
    return Bracket(own, tuple(inside), _crossed)


def _crossed(g: Grad, bracket: Bracket) -> Grad:
    axis, name = bracket.axis, opening(bracket.edge)
    if bracket.opened:
        opened = g._replace(names=(*g.names, name), arrows=(*g.arrows, g.layout))
    elif g.layout.applied:
        raise refuse(g, name + " ...)", "the update is already applied; put it further left, around the optimizer")
    else:
        opened = summed(g, Edge(axis), name, scattered=True)
    inner = fold(opened, bracket.parts)
    if inner.layout.sharded[-1:] != (axis,):
        raise refuse(
            inner,
            ")",
            f"shard({axis!r}) closes, but the leaves are sharded over {list(inner.layout.sharded)}; close what was"
            " opened inside first",
        )
    return closed(inner, axis, ")")
