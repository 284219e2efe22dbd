"""Gathers, scatters and sums of whole Slots over a mesh axis: units travel as units.py says, small ones together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from math import prod

from torch import Tensor

from funczero.comm.edge import Edge
from funczero.comm.exact import Tally
from funczero.comm.launch import launch_backend_sum, launch_gather, wait
from funczero.comm.memory import Held
from funczero.comm.units import Travelling, gather_units, scatter_units
from funczero.comm.wire import Key
from funczero.layout.mesh import Mesh
from funczero.layout.slots import Slots

MESSAGE = 1 << 22  # bytes of neighbouring units that share one message
UNDER_WAY = 3  # messages at once: a backend sends two, and one is copied meanwhile


def all_gather(x: Slots, edge: Edge | str, mesh: Mesh, key: Key = (0,)) -> Slots:
    """One step outwards: every leaf's parts over an axis, joined. The innermost axis comes first.

    Layout: sharded over (..., axis) -> sharded over (...). Empty buffers (frozen) stay empty.

    Args:
      edge: how the axis is crossed; its name alone reads the exact values.
      key: as gather_units'.
    """
    edge = Edge(edge) if isinstance(edge, str) else edge
    axis = edge.axis
    if not x.where.coords or x.where.coords[-1][0] != axis:
        raise ValueError(
            f"all_gather({axis!r}): the innermost axis of these leaves is {x.where.axes[-1:] or 'none'}; gather that"
            " one first"
        )
    where = x.where.outer
    if mesh.axes[axis].size == 1:
        return Slots(x.buffers, where)
    messages = _messages(x, apart=edge.views_of(True) is not edge.gather)
    buffers, _ = _travelled(
        messages, lambda us: gather_units(where, us, edge, mesh, [x.buffers[u] for u in us], key), x
    )
    return Slots(buffers, where)


def reduce_scatter(
    x: Slots, edge: Edge, mesh: Mesh, key: Key = (0,), held: Held | None = None, tally: Tally | None = None
) -> tuple[Slots, Slots | None]:
    """Sum over an axis and keep this rank's part: the transpose of all_gather. Outer axes come first.

    Layout: unreduced over axis, sharded over (...) -> sharded over (..., axis). Sums are taken in `edge.adds`.

    Args:
      key, held, tally: as scatter_units'.

    Returns:
      The part, and the new memory of a wire that has one.
    """
    size, index, _ = mesh.axes[edge.axis]
    inner = x.where.inner(edge.axis, size, index)
    if size == 1:
        return Slots(x.buffers, inner), None
    buffers, new = _travelled(_messages(x), lambda us: _scattered(x, us, edge, mesh, key, held, tally), x)
    return Slots(buffers, inner), None if held is None else with_units(held.errors, new)


def all_reduce(
    x: Slots, edge: Edge, mesh: Mesh, key: Key = (0,), held: Held | None = None, reuse: bool = False
) -> tuple[Slots, Slots | None]:
    """The sum over an axis in `edge.adds`, whole on every rank: a scatter and a gather, or what the backend does.

    Args:
      reuse: nobody else reads x, whose memory is the sum's where dtypes agree.

    Returns:
      The sum, and the new memory of a wire that has one.
    """
    if mesh.axes[edge.axis].size == 1:
        return x, None
    if edge.sums == "backend":
        flying = [launch_backend_sum(b.to(edge.adds), edge.axis, mesh) for b in x.buffers]
        return Slots(tuple(wait(b) for b in flying), x.where), None

    def launch(units: list[int]) -> Travelling:  # the parts of few messages are there at once
        sent = _scattered(x, units, edge, mesh, key, held)

        def rest() -> list[Tensor]:
            parts, old = sent.wait(), [x.buffers[u] for u in units]
            into = old if reuse and all(a.dtype == b.dtype for a, b in zip(parts, old, strict=True)) else None
            return gather_units(x.where, units, edge, mesh, parts, key, into).wait()

        return Travelling(rest, sent.errors)

    buffers, new = _travelled(_messages(x, apart=edge.views_of(True) is not edge.gather), launch, x)
    return Slots(buffers, x.where), None if held is None else with_units(held.errors, new)


def with_units(x: Slots, new: Mapping[int, Tensor]) -> Slots:
    """x with other buffers of some units."""
    return Slots(tuple(new.get(u, b) for u, b in enumerate(x.buffers)), x.where)


def all_gather_new(x: Slots, held: Slots, edge: Edge, mesh: Mesh, key: Key = (0,)) -> Slots:
    """all_gather of what is new: the held values, and what the wire makes of x less this rank's part of them.

    A leaf that the axis leaves whole does not travel and is x itself.

    Args:
      x: sharded over (..., axis), in any dtype.
      held: sharded over (...), what every rank of the axis holds alike.
    """
    new = x.map(lambda a, b: a.to(edge.adds) - b.to(edge.adds), cut(held, edge.axis, mesh))
    out = all_gather(new, edge, mesh, key)
    out = out.map(lambda d, h: (h.to(edge.adds) + d).to(h.dtype), held)
    for leaf, a, b in zip(x.where.structure.leaves, out.leaves(), x.leaves(), strict=True):
        if a is not None and b is not None and leaf.cut(edge.axis).replicated:
            a.copy_(b)
    return out


def gather_leaf(x: Slots, leaf: int, mesh: Mesh) -> Tensor | None:
    """One leaf, whole and bit for bit, on every rank; None for what has no values (frozen)."""
    where, unit = x.where, x.where.structure.leaves[leaf].unit
    part = x.leaves()[leaf]
    if part is None:
        return None
    for axis, size, _ in reversed(where.coords):
        slot, outer = where.slots[leaf], where.outer
        if len({outer.inner(axis, size, q).slots[leaf].length for q in range(size)}) > 1:
            path = where.structure.leaves[leaf].path
            raise TypeError(
                f"gather_leaf: {path!r} lies whole with one rank of {axis!r}, as the states of a leaf's owner do; save"
                " a checkpoint to read it"
            )
        if not slot.length:
            part = part.new_empty(outer.slots[leaf].shape)
        elif size > 1 and not where.structure.leaves[leaf].cut(axis).replicated:
            flat = part.new_zeros(slot.length)
            flat[: part.numel()] = part.reshape(-1)
            rows, origin = wait(launch_gather(flat, axis, mesh, (unit,))), outer.slots[leaf]
            part = part.new_empty(origin.shape)
            for row, s in zip(rows, (outer.inner(axis, size, q).slots[leaf] for q in range(size)), strict=True):
                place = tuple(slice(a - o, a - o + n) for a, o, n in zip(s.start, origin.start, s.shape, strict=True))
                part[place] = row[: prod(s.shape)].view(s.shape)
        where = outer
    return part.detach().clone()


def _messages(x: Slots, apart: bool = False) -> list[list[int]]:
    """Units that travel together: small ones share a message, large ones overlap each other's copies.

    Empty ones (frozen) stay.

    Args:
      apart: units that learn and those that do not share no message, because they are packed otherwise.
    """
    frozen = [apart and u.frozen for u in x.where.structure.units]
    out: list[list[int]] = []
    room = 0
    for u, b in enumerate(x.buffers):
        if b.numel():
            if not out or b.nbytes > room or frozen[out[-1][-1]] != frozen[u]:
                out.append([])
                room = MESSAGE
            out[-1].append(u)
            room -= b.nbytes
    return out


def _scattered(
    x: Slots, units: list[int], edge: Edge, mesh: Mesh, key: Key, held: Held | None, tally: Tally | None = None
) -> Travelling:
    leaves = [x.where.views(u, x.buffers[u]) for u in units]
    return scatter_units(x.where, units, edge, mesh, leaves, key, held, tally)


def _travelled(
    messages: list[list[int]], launch: Callable[[list[int]], Travelling], x: Slots
) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
    """The buffers of x after its messages, few of them under way at once, since each takes memory; and by unit the new
    memory of a wire that has one.
    """
    flying, done, new = deque[tuple[list[int], Travelling]](), dict[int, Tensor](), dict[int, Tensor]()

    def land() -> None:
        units, message = flying.popleft()
        done.update(zip(units, message.wait(), strict=True))
        new.update(zip(units, message.errors, strict=False))

    for units in messages:
        if len(flying) == UNDER_WAY:
            land()
        flying.append((units, launch(units)))
    while flying:
        land()
    return tuple(done.get(u, b) for u, b in enumerate(x.buffers)), new


def cut(x: Slots, axis: str, mesh: Mesh) -> Slots:
    """One step inwards without communication: this rank's part."""
    size, index, _ = mesh.axes[axis]
    inner = x.where.inner(axis, size, index)
    if size == 1:
        return Slots(x.buffers, inner)
    out = Slots.zeros(inner, x.buffers[0].dtype, x.buffers[0].device)
    for i, (a, b) in enumerate(zip(x.leaves(), out.leaves(), strict=True)):
        if a is not None and b is not None and b.numel():
            slot, origin = inner.slots[i], x.where.slots[i]
            b.copy_(
                a[tuple(slice(s - o, s - o + n) for s, o, n in zip(slot.start, origin.start, slot.shape, strict=True))]
            )
    return Slots(tuple(b[: n.numel()] for b, n in zip(out.buffers, x.buffers, strict=True)), inner)
