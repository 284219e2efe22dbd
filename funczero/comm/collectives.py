"""Gathers, scatters and sums of parameters over a mesh axis, as its edge says: units of one message, and whole Slots.

Gathers and scatters are each other's transpose, where nothing is rounded on the wire. Sums are taken locally after an
all_to_all, in the fixed tree of order.py: half the bytes of gloo's reduce_scatter, fp32 sums of 16-bit gradients, and
the same bits on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from funczero.comm.edge import Edge
from funczero.comm.launch import launch_backend_scatter, launch_backend_sum, launch_exchange, launch_gather, wait
from funczero.comm.memory import Held, added, remembered
from funczero.comm.pieces import pairs, plan_of, slot_lengths, travels
from funczero.comm.wire import Key, as_born, pack_units, unpack_units
from funczero.core import rng
from funczero.core.order import tree_sum
from funczero.layout.mesh import Mesh
from funczero.layout.slots import Slots
from funczero.layout.where import Where

MESSAGE = 1 << 22  # bytes of neighbouring units that share one message


class Travelling(NamedTuple):
    """A collective under way; `wait()` finishes it."""

    wait: Callable[[], list[Tensor]]  # the units' buffers
    errors: tuple[Tensor, ...] = ()  # the units' new memory, of a wire that has one


# --- one message of units ---------------------------------------------------------------------------------------------
def gather_units(
    where: Where, units: Sequence[int], edge: Edge, mesh: Mesh, buffers: Sequence[Tensor], key: Key = (0,)
) -> Travelling:
    """Start to gather units one step outwards, to `where`, as one message; waiting returns their buffers there.

    Args:
      key: of the update, for wires that draw; the same on all ranks, and whenever the same values are gathered again.
    """
    axis = edge.axis
    size, index, _ = mesh.axes[axis]
    if size == 1:
        return Travelling(lambda: list(buffers))
    inner = where.inner(axis, size, index)
    parts = [b.narrow(0, 0, travels(inner, u, axis)) for u, b in zip(units, buffers, strict=True)]
    wire = edge.views_of(where.structure.units[units[0]].frozen)  # alike in a message
    gather = _gather_born if wire is as_born else _gather_packed
    arrived = gather(inner, units, edge, mesh, parts, key)

    def finish() -> list[Tensor]:
        out = []
        for u, own, rows in zip(units, buffers, arrived(), strict=True):
            make = torch.zeros if where.gaps[u] else torch.empty
            out.append(make(where.lengths[u], dtype=own.dtype, device=own.device))
            here, there = pairs(plan_of(where, u, axis, size), where.views(u, out[-1]), rows, own)
            _copy(here, there)
        return out

    return Travelling(finish)


def scatter_units(
    where: Where,
    units: Sequence[int],
    edge: Edge,
    mesh: Mesh,
    leaves: Sequence[list[Tensor]],
    key: Key = (0,),
    held: Held | None = None,
) -> Travelling:
    """Start to sum units' leaves over an axis and keep this rank's part; waiting returns their buffers there.

    They are one message. The leaves travel in the dtype they come in, or as the edge's wire packs them, and are added
    in `edge.adds`, in the tree over ranks.

    Args:
      key: of this sum, for wires that draw; the same on all ranks.
      held: what a wire with memory remembers; its new memory is the result's `errors`.

    Raises:
      RuntimeError: the wire has memory, and none is given.
    """
    axis = edge.axis
    size, index, _ = mesh.axes[axis]
    inner = where.inner(axis, size, index)
    whole: list[Tensor] = []
    if edge.scatter.memory is not None and size > 1:
        if held is None:
            raise RuntimeError(f"{edge.scatter} over {axis!r} is given no memory here, so what it rounds would be lost")
        whole = [_with_errors(where, u, xs, held, edge) for u, xs in zip(units, leaves, strict=True)]
        leaves = [where.views(u, v) for u, v in zip(units, whole, strict=True)]
    lengths = [inner.lengths[u] for u in units]
    make = torch.zeros if any(where.inner(axis, size, q).gaps[u] for u in units for q in range(size)) else torch.empty
    send = make(size, sum(lengths), dtype=leaves[0][0].dtype, device=leaves[0][0].device)
    columns = send.split_with_sizes(lengths, 1)
    for u, xs, row in zip(units, leaves, columns, strict=True):
        here, there = pairs(plan_of(where, u, axis, size), xs, row, None)
        _copy(there, here)
    if edge.sums == "backend" and size > 1:
        part = launch_backend_scatter(send.to(edge.adds), axis, mesh, tuple(units))
        return Travelling(lambda: list(wait(part).view(-1).split_with_sizes(lengths)))
    if edge.scatter is not as_born and size > 1:
        return _scatter_packed(inner, units, edge, mesh, columns, key, whole, held)
    wire = launch_exchange(send, axis, mesh, tuple(units))
    return Travelling(lambda: list(tree_sum(wait(wire).to(edge.adds) if size > 1 else wire).split_with_sizes(lengths)))


def _gather_born(
    inner: Where, units: Sequence[int], edge: Edge, mesh: Mesh, parts: list[Tensor], key: Key
) -> Callable[[], list[Tensor]]:
    """Start to gather units as they are; the result waits for it: [W, n] by unit."""
    sent = launch_gather(parts[0] if len(parts) == 1 else torch.cat(parts), edge.axis, mesh, tuple(units))
    return lambda: list(wait(sent).split_with_sizes([p.numel() for p in parts], 1))


# --- one message of packed units --------------------------------------------------------------------------------------
def _gather_packed(
    inner: Where, units: Sequence[int], edge: Edge, mesh: Mesh, parts: list[Tensor], key: Key
) -> Callable[[], list[Tensor]]:
    """Start to gather what the wire makes of units; the result waits and reads it: [W, n] by unit."""
    lengths = [slot_lengths(inner, u, p.numel()) for u, p in zip(units, parts, strict=True)]
    frozen = [inner.structure.units[u].frozen for u in units]  # read alike at every update, as their views are kept
    parts_of = [key[:1] if still else key for still in frozen]
    keys = [rng.fold(*k, "gather", edge.axis, u) for u, k in zip(units, parts_of, strict=True)]
    wire, values = edge.views_of(frozen[0]), sum(p.numel() for p in parts)
    packed = pack_units(wire, [parts], lengths, keys)
    sent = launch_gather(packed.rows[0], edge.axis, mesh, tuple(units), wire.name, values)
    return lambda: [torch.stack(xs) for xs in unpack_units(wire, packed, wait(sent), lengths, parts[0].dtype)]


def _scatter_packed(
    inner: Where,
    units: Sequence[int],
    edge: Edge,
    mesh: Mesh,
    columns: Sequence[Tensor],
    key: Key,
    whole: Sequence[Tensor] = (),
    held: Held | None = None,
) -> Travelling:
    """Start to send every rank its rows as the wire packs them; what arrives is read in `edge.adds` and added.

    Args:
      whole: the units' buffers as they were to be sent, for a wire with memory.
    """
    lengths = [slot_lengths(inner, u, c.shape[1]) for u, c in zip(units, columns, strict=True)]
    keys = [rng.fold(*key, "scatter", edge.axis, mesh.index(edge.axis), u) for u in units]
    packed = pack_units(edge.scatter, list(zip(*columns, strict=True)), lengths, keys)
    values = sum(c.shape[1] for c in columns)
    sent = launch_exchange(packed.rows, edge.axis, mesh, tuple(units), edge.scatter.name, values)

    def finish() -> list[Tensor]:
        found = unpack_units(edge.scatter, packed, wait(sent), lengths, edge.adds)
        return [_without_gaps(inner, u, tree_sum(xs)) for u, xs in zip(units, found, strict=True)]

    errors: list[Tensor] = []
    if whole and held is not None and edge.scatter.memory is not None:
        read = unpack_units(edge.scatter, packed, packed.rows, lengths, edge.adds)
        for u, sent_, rows in zip(units, whole, read, strict=True):
            back = _joined(inner.outer, u, edge.axis, mesh, rows, edge.adds)
            errors.append(remembered(edge.scatter.memory, sent_, back, held.errors.buffers[u], held.scale))
    return Travelling(finish, tuple(errors))


def _with_errors(where: Where, unit: int, leaves: list[Tensor], held: Held, edge: Edge) -> Tensor:
    """A unit's buffer in `edge.adds`: its leaves and what is remembered of them."""
    out = torch.zeros(where.lengths[unit], dtype=edge.adds, device=leaves[0].device)
    added(leaves, where.views(unit, held.errors.buffers[unit]), held.scale, where.views(unit, out))
    return out


def _joined(where: Where, unit: int, axis: str, mesh: Mesh, rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    """A unit's buffer out of the rows that the ranks of an axis get of it."""
    out = torch.zeros(where.lengths[unit], dtype=dtype, device=rows[0].device)
    plan = plan_of(where, unit, axis, mesh.axes[axis].size)
    _copy(*pairs(plan, where.views(unit, out), torch.stack(rows), rows[mesh.index(axis)]))
    return out


def _without_gaps(where: Where, unit: int, buffer: Tensor) -> Tensor:
    """The buffer with zeros in its padding, which a wire may have read otherwise."""
    if not where.gaps[unit]:
        return buffer
    out = torch.zeros_like(buffer)
    _copy(where.views(unit, out), where.views(unit, buffer))
    return out


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, source)


# --- Slots ------------------------------------------------------------------------------------------------------------
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
    flying = [(us, gather_units(where, us, edge, mesh, [x.buffers[u] for u in us], key)) for us in messages]
    return Slots(_landed(flying, x), where)


def reduce_scatter(
    x: Slots, edge: Edge, mesh: Mesh, key: Key = (0,), held: Held | None = None
) -> tuple[Slots, Slots | None]:
    """Sum over an axis and keep this rank's part: the transpose of all_gather. Outer axes come first.

    Layout: unreduced over axis, sharded over (...) -> sharded over (..., axis). Sums are taken in `edge.adds`.

    Args:
      key, held: as scatter_units'.

    Returns:
      The part, and the new memory of a wire that has one.
    """
    size, index, _ = mesh.axes[edge.axis]
    inner = x.where.inner(edge.axis, size, index)
    if size == 1:
        return Slots(x.buffers, inner), None
    flying = []
    for us in _messages(x):
        leaves = [x.where.views(u, x.buffers[u]) for u in us]
        flying.append((us, scatter_units(x.where, us, edge, mesh, leaves, key, held)))
    new = {u: e for us, f in flying for u, e in zip(us, f.errors, strict=False)}
    return Slots(_landed(flying, x), inner), None if held is None else with_units(held.errors, new)


def all_reduce(
    x: Slots, edge: Edge, mesh: Mesh, key: Key = (0,), held: Held | None = None
) -> tuple[Slots, Slots | None]:
    """The sum over an axis in `edge.adds`, whole on every rank: a scatter and a gather, or what the backend does.

    The sum, and the new memory of a wire that has one.
    """
    if edge.sums == "tree" or mesh.axes[edge.axis].size == 1:
        part, errors = reduce_scatter(x, edge, mesh, key, held)
        return all_gather(part, edge, mesh, key), errors
    flying = [launch_backend_sum(b.to(edge.adds), edge.axis, mesh) for b in x.buffers]
    return Slots(tuple(wait(b) for b in flying), x.where), None


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


def _landed(flying: list[tuple[list[int], Travelling]], x: Slots) -> tuple[Tensor, ...]:
    done = {u: b for us, f in flying for u, b in zip(us, f.wait(), strict=True)}
    return tuple(done.get(u, b) for u, b in enumerate(x.buffers))


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
