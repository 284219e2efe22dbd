"""Sums over ranks: the linear transforms between a gradient and its mean."""

from __future__ import annotations

from dataclasses import replace
from functools import partial, reduce

import torch

from funczero.comm import collectives, differentiable
from funczero.comm.edge import Edge
from funczero.comm.wire import Key, Wire, as_born
from funczero.core.transform import around, refuse
from funczero.core.types import Grad, Out, Seed, State, Sum, Transform, Updated
from funczero.layout.slots import Slots
from funczero.transforms import exact, feedback
from funczero.transforms.chain import Summed


def with_wires(g: Grad, name: str, edge: Edge) -> Grad:
    """g, whose env knows the wires that this edge brings along.

    Raises:
      ChainError: the axis is not on the mesh, or has a wire for that direction already.
    """
    if edge.axis not in g.env.mesh.axes:
        why = f"{edge.axis!r} is not an axis of the mesh ({g.env.mesh})"
        raise refuse(g, name, f"{why}; write one of {list(g.env.mesh.axes)}")
    if edge.exact:
        return g
    try:
        known = g.env.edges[edge.axis].with_wires(edge).proven(g.env.policy.compute, g.env.mesh.device)
    except (TypeError, ValueError) as error:
        raise refuse(g, name, str(error)) from None
    return g._replace(env=g.env._replace(edges={**g.env.edges, edge.axis: known}))


def summed(g: Grad, edge: Edge, name: str, scattered: bool) -> Grad:
    """g with the partial sum over one axis taken; the axis is the next digit of the order of sums.

    Args:
      edge: the axis, with the wires that this transform brings along.
      scattered: each rank keeps its rows of the sum.
    """
    g, axis = with_wires(g, name, edge), edge.axis
    kind = differentiable if g.env.differentiable else collectives
    fn, sharded = (kind.reduce_scatter, (axis,)) if scattered else (kind.all_reduce, ())
    if not scattered and not g.env.differentiable:
        fn = partial(collectives.all_reduce, reuse=g.owned)
    lay, mesh, edge = g.layout, g.env.mesh, g.env.edges[axis]
    if lay.mean or lay.applied:
        raise refuse(g, name, "it adds up sums, but the mean is already taken; put it further left")
    if axis not in lay.unreduced:
        why = f"it was summed before, or the batch is not split over it (batch={list(lay.batch)})"
        what = f"the gradient is not a partial sum over {axis!r}"
        raise refuse(g, name, f"{what}: {why}; leave it out, or write batch=P({axis!r})")
    order = (*lay.order, (axis, mesh.axes[axis].size))
    layout = replace(lay, unreduced=lay.unreduced - {axis}, sharded=(*lay.sharded, *sharded), order=order)
    offset = mesh.index(axis) * lay.stride

    def before(views: Slots, s: Seed, state: State) -> tuple[Seed, Seed]:
        return s._replace(index=s.index + offset), s

    def after(out: Sum, state: State, s: Seed) -> tuple[Sum, State]:
        if s.grid is not None:  # what all_reduce sums stays in parts until the mean
            if scattered:
                out = out._replace(grads=exact.joined(out.grads, lay.sharded, g.env))
            return exact.scattered(out, edge, g.env, s.grid), state
        grads, errors = fn(out.grads, edge, mesh, (s.key, s.index), feedback.held(state, axis, s))
        return out._replace(grads=grads), feedback.renewed(state, edge, errors)

    if not feedback.remembers(g.env, axis):
        return around(g, name, layout, before, after)
    terms = [a for a in lay.batch if a in lay.unreduced]
    return around(g, name, layout, before, after, lambda p: feedback.empty(p, g.env, axis, lay.sharded, terms))


def all_reduce(axis: str, wire: Wire = as_born) -> Transform:
    """The sum over a mesh axis, whole on every rank; over an axis of size 1 the identity.

    Layout: unreduced over axis -> reduced. Bytes a rank: 2 (W - 1) / W of the gradient's. Bits: the one tree, any W.
    It is a scatter and a gather: directly right of a gradient with units, each unit's gradient is scattered as soon as
    it exists, as a bracket's is.

    Args:
      axis: a mesh axis that the batch is split over.
      wire: how it travels, both ways: the parts to be added, and the sum to all ranks, which has no memory.
    """
    name = f"all_reduce({axis!r}{_said(wire)})"

    def transform(g: Grad) -> Grad:
        joins = wire if wire.memory is None else wire._replace(memory=None)
        return summed(g, Edge(axis, gather=joins, scatter=wire), name, scattered=False)

    transform.__name__ = name
    if wire is not as_born:
        return transform
    return Summed(name, axis, transform, lambda g: closed(g, axis, name))


def reduce_scatter(axis: str, wire: Wire = as_born) -> Transform:
    """The sum over a mesh axis, each rank keeping its rows: the transpose of all_gather, and the opening edge of
    `shard`.

    Layout: unreduced over axis, sharded (...) -> sharded (..., axis). A chain that leaves it so is refused: prefer
    shard(axis, ...).

    Args:
      axis: a mesh axis that the batch is split over.
      wire: how the parts travel.
    """
    name = f"reduce_scatter({axis!r}{_said(wire)})"

    def transform(g: Grad) -> Grad:
        return summed(g, Edge(axis, scatter=wire), name, scattered=True)

    transform.__name__ = name
    return transform


def all_gather(axis: str, wire: Wire = as_born) -> Transform:
    """Gradients or new parameters joined over a mesh axis: the closing edge of `shard`.

    New parameters travel in `policy.compute`.

    Layout: sharded (..., axis) -> sharded (...).

    Args:
      axis: the innermost axis that the leaves are cut over here.
      wire: how the parts travel.
    """
    name = f"all_gather({axis!r}{_said(wire)})"

    def transform(g: Grad) -> Grad:
        g = with_wires(g, name, Edge(axis, gather=wire))
        lay = g.layout
        if lay.sharded[-1:] != (axis,) or axis in lay.rest:
            where = f"sharded over {list(lay.sharded)}" if lay.sharded else "whole"
            raise refuse(g, name, f"the leaves are {where} here, with nothing to join over {axis!r}; leave it out")
        return closed(g, axis, name)

    transform.__name__ = name
    return transform


def _said(wire: Wire) -> str:
    return "" if wire is as_born else f", wire={wire}"


def closed(g: Grad, axis: str, name: str) -> Grad:
    """g with its innermost bracket closed: what is joined are new views, or a gradient.

    Raises:
      ChainError: a gradient should be joined by a wire that sends what is new against an earlier value.
    """
    lay, mesh, edge, compute = g.layout, g.env.mesh, g.env.edges[axis], g.env.policy.compute
    layout = replace(lay, sharded=lay.sharded[:-1])
    if edge.gather.difference and not lay.applied:
        why = f"{edge.gather} sends what is new against an earlier value, and nobody holds one of a gradient"
        raise refuse(g, name, f"{why}; write the wire inside it")
    differs = edge.gather.difference and mesh.axes[axis].size > 1
    join = differentiable.all_gather if g.env.differentiable else collectives.all_gather

    def before(views: Slots, s: Seed, state: State) -> tuple[Seed, tuple[Key, Slots]]:
        run, now = s.at
        return s, ((run, now + 1) if lay.applied else (s.key, s.index), views)  # new views are the next update's

    def after(out: Out, state: State, carried: tuple[Key, Slots]) -> tuple[Out, State]:
        key, views = carried
        if isinstance(out, Sum) and g.env.exact:
            return out._replace(grads=exact.joined(out.grads, layout.sharded, g.env)), state
        if not isinstance(out, Updated):
            return out._replace(grads=join(out.grads, edge, mesh, key)), state
        new = out.params.trainable()
        if not differs:
            return out._replace(params=join(new.to(compute), edge, mesh, key)), state
        # what every rank of the axis has read so far
        held = reduce(lambda x, a: collectives.cut(x, a, mesh), layout.sharded[len(lay.rest) :], views.trainable())
        read = collectives.all_gather_new(new, held, edge, mesh, key)
        return out._replace(params=read.map(lambda n, h: torch.where(out.ok, n, h), held)), state

    return around(g, name, layout, before, after, called=f"the end of shard({axis!r})" if name == ")" else name)
