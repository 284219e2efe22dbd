"""Sums over ranks: the linear transforms between a gradient and its mean."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from funczero.comm import collectives
from funczero.core.transform import after, refuse
from funczero.core.types import Grad, Transform
from funczero.layout.slots import Slots


def _known(g: Grad, name: str, axis: str) -> None:
    if axis not in g.env.mesh.axes:
        raise refuse(g, name, f"{axis!r} is not an axis of the mesh ({g.env.mesh}); write one of {list(g.env.mesh.axes)}")


def summed(g: Grad, axis: str, name: str, fn: Callable[[Slots], Slots], sharded: tuple[str, ...]) -> Grad:
    """g with the partial sum over one axis taken; the axis is the next digit of the order of sums."""
    _known(g, name, axis)
    lay, mesh = g.layout, g.env.mesh
    if lay.mean or lay.applied:
        raise refuse(g, name, "it adds up sums, but the mean is already taken; put it further left")
    if axis not in lay.unreduced:
        why = f"it was summed before, or the batch is not split over it (batch={list(lay.batch)})"
        raise refuse(g, name, f"the gradient is not a partial sum over {axis!r}: {why}; leave it out, or write batch=P({axis!r})")
    layout = replace(lay, unreduced=lay.unreduced - {axis}, sharded=(*lay.sharded, *sharded), order=(*lay.order, (axis, mesh.axes[axis].size)))
    offset = mesh.index(axis) * lay.stride
    return after(g, name, layout, lambda out, state: (out._replace(grads=fn(out.grads)), state), seed=lambda s, state: s._replace(index=s.index + offset))


def all_reduce(axis: str) -> Transform:
    """The sum over a mesh axis, whole on every rank; over an axis of size 1 the identity.

    Layout: unreduced over axis -> reduced. Bytes a rank: 2 (W - 1) / W of the gradient's. Bits: the one tree, any W.
    """

    def transform(g: Grad) -> Grad:
        mesh, wide = g.env.mesh, g.env.policy.accumulate
        return summed(g, axis, f"all_reduce({axis!r})", lambda x: collectives.all_reduce(x, axis, mesh, wide), ())

    transform.__name__ = f"all_reduce({axis!r})"
    return transform


def reduce_scatter(axis: str) -> Transform:
    """The sum over a mesh axis, each rank keeping its rows; the transpose of all_gather, and the opening edge of `shard`.

    Layout: unreduced over axis, sharded (...) -> sharded (..., axis). A chain that leaves it so is refused: prefer shard(axis, ...).
    """

    def transform(g: Grad) -> Grad:
        mesh, wide = g.env.mesh, g.env.policy.accumulate
        return summed(g, axis, f"reduce_scatter({axis!r})", lambda x: collectives.reduce_scatter(x, axis, mesh, wide), (axis,))

    transform.__name__ = f"reduce_scatter({axis!r})"
    return transform


def all_gather(axis: str) -> Transform:
    """Gradients or new parameters joined over a mesh axis: the closing edge of `shard`. New parameters travel in `policy.compute`.

    Layout: sharded (..., axis) -> sharded (...).
    """
    name = f"all_gather({axis!r})"

    def transform(g: Grad) -> Grad:
        _known(g, name, axis)
        lay = g.layout
        if lay.sharded[-1:] != (axis,) or axis in lay.rest:
            where = f"sharded over {list(lay.sharded)}" if lay.sharded else "whole"
            raise refuse(g, name, f"the leaves are {where} here, with nothing to join over {axis!r}; leave it out")
        return closed(g, axis, name)

    transform.__name__ = name
    return transform


def closed(g: Grad, axis: str, name: str) -> Grad:
    """g with its innermost bracket closed."""
    lay, mesh, narrow = g.layout, g.env.mesh, g.env.policy.compute
    ship = (lambda x: x.trainable().to(narrow)) if lay.applied else (lambda x: x)
    layout = replace(lay, sharded=lay.sharded[:-1])
    return after(g, name, layout, lambda out, state: (out._replace(grads=collectives.all_gather(ship(out.grads), axis, mesh)), state))
