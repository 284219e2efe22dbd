"""Units of parameters over a mesh axis, as its edge says: one message, as born or packed by a wire.

Gathers and scatters are each other's transpose, where nothing is rounded on the wire. Sums are taken locally after an
all_to_all, in the fixed tree of order.py: half the bytes of gloo's reduce_scatter, fp32 sums of 16-bit gradients, and
the same bits on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funczero.comm.edge import Edge
from funczero.comm.exact import Tally
from funczero.comm.launch import apart, launch_backend_scatter, launch_exchange, launch_gather, launch_others, wait
from funczero.comm.memory import Held, added, remembered
from funczero.comm.pieces import Wire, even_of, off_the_wire, on_the_wire, padded, slot_lengths, travels
from funczero.comm.wire import Key, as_born, pack_units, unpack_units
from funczero.core import rng
from funczero.core.order import tree_sum
from funczero.layout.mesh import Mesh
from funczero.layout.where import Where


class Travelling(NamedTuple):
    """A collective under way; `wait()` finishes it."""

    wait: Callable[[], list[Tensor]]  # the units' buffers
    errors: tuple[Tensor, ...] = ()  # the units' new memory, of a wire that has one


# --- one message of units ---------------------------------------------------------------------------------------------
def gather_units(
    where: Where,
    units: Sequence[int],
    edge: Edge,
    mesh: Mesh,
    buffers: Sequence[Tensor],
    key: Key = (0,),
    into: Sequence[Tensor] | None = None,
) -> Travelling:
    """Start to gather units one step outwards, to `where`, as one message; waiting returns their buffers there.

    Args:
      key: of the update, for wires that draw; the same on all ranks, and whenever the same values are gathered again.
      into: buffers there whose padding is zero, which are the result; None: new ones are.
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

    return Travelling(lambda: _joined(where, units, axis, arrived(), buffers, into))


def scatter_units(
    where: Where,
    units: Sequence[int],
    edge: Edge,
    mesh: Mesh,
    leaves: Sequence[list[Tensor]],
    key: Key = (0,),
    held: Held | None = None,
    tally: Tally | None = None,
) -> Travelling:
    """Start to sum units' leaves over an axis and keep this rank's part; waiting returns their buffers there.

    They are one message. The leaves travel in the dtype they come in, or as the edge's wire packs them, and are added
    in `edge.adds`, in the tree over ranks.

    Args:
      key: of this sum, for wires that draw; the same on all ranks.
      held: what a wire with memory remembers; its new memory is the result's `errors`.
      tally: turns what arrives into integers, which are the result; None: it is added as it is.

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
    send = _rows(where, units, axis, size, leaves, lengths)
    if edge.sums == "backend" and size > 1:
        part = launch_backend_scatter(send.to(edge.adds), axis, mesh, tuple(units))
        return Travelling(lambda: list(wait(part).view(-1).split_with_sizes(lengths)))
    if edge.scatter is not as_born and size > 1:
        return _scatter_packed(inner, units, edge, mesh, send.split_with_sizes(lengths, 1), key, whole, held)
    wire = launch_exchange(send, axis, mesh, tuple(units))

    def finish() -> list[Tensor]:
        rows = wait(wire) if size > 1 else wire
        if tally is not None:
            parts = rows.split_with_sizes(lengths, 1)
            return [tally.count(inner, u, part) for u, part in zip(units, parts, strict=True)]
        return list(tree_sum(rows.to(edge.adds) if size > 1 else rows).split_with_sizes(lengths))

    return Travelling(finish)


def _rows(
    where: Where, units: Sequence[int], axis: str, size: int, leaves: Sequence[list[Tensor]], lengths: list[int]
) -> Tensor:
    """Units' leaves as the wire [W, n] to all ranks."""
    even = [even_of(where, u, axis, size) for u in units]
    if None not in even and len({x.dtype for xs in leaves for x in xs}) == 1:
        return torch.cat([x for e, xs in zip(even, leaves, strict=True) if e for x in e.row(xs, size)], 1)
    make = torch.zeros if any(padded(where, u, axis, size) for u in units) else torch.empty
    send = make(size, sum(lengths), dtype=leaves[0][0].dtype, device=leaves[0][0].device)
    columns = send.split_with_sizes(lengths, 1)
    _copy(on_the_wire(where, u, axis, xs, row)[::-1] for u, xs, row in zip(units, leaves, columns, strict=True))
    return send


def _gather_born(
    inner: Where, units: Sequence[int], edge: Edge, mesh: Mesh, parts: list[Tensor], key: Key
) -> Callable[[], list[Wire]]:
    """Start to gather units as they are; the result waits for it: all ranks' rows by unit."""
    flat, lengths = parts[0] if len(parts) == 1 else torch.cat(parts), [p.numel() for p in parts]
    leaves = sum(len(inner.structure.members[u]) for u in units)
    if not apart(flat.nbytes, leaves, edge.axis, mesh):
        sent = launch_gather(flat, edge.axis, mesh, tuple(units))
        return lambda: [(rows,) for rows in wait(sent).split_with_sizes(lengths, 1)]
    index, others = mesh.index(edge.axis), launch_others(flat, edge.axis, mesh, tuple(units))

    def arrived() -> list[Wire]:
        theirs = wait(others).split_with_sizes(lengths, 1)
        return [(rows[:index], own.view(1, -1), rows[index:]) for rows, own in zip(theirs, parts, strict=True)]

    return arrived


# --- one message of packed units --------------------------------------------------------------------------------------
def _gather_packed(
    inner: Where, units: Sequence[int], edge: Edge, mesh: Mesh, parts: list[Tensor], key: Key
) -> Callable[[], list[Wire]]:
    """Start to gather what the wire makes of units; the result waits and reads it: all ranks' rows by unit."""
    lengths = [slot_lengths(inner, u, p.numel()) for u, p in zip(units, parts, strict=True)]
    frozen = [inner.structure.units[u].frozen for u in units]  # read alike at every update, as their views are kept
    parts_of = [key[:1] if still else key for still in frozen]
    keys = [rng.fold(*k, "gather", edge.axis, u) for u, k in zip(units, parts_of, strict=True)]
    wire, values = edge.views_of(frozen[0]), sum(p.numel() for p in parts)
    packed = pack_units(wire, [parts], lengths, keys)
    sent = launch_gather(packed.rows[0], edge.axis, mesh, tuple(units), wire.name, values)
    return lambda: [(torch.stack(xs),) for xs in unpack_units(wire, packed, wait(sent), lengths, parts[0].dtype)]


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
            (back,) = _joined(inner.outer, (u,), edge.axis, [(torch.stack(rows),)], [rows[mesh.index(edge.axis)]])
            errors.append(remembered(edge.scatter.memory, sent_, back, held.errors.buffers[u], held.scale))
    return Travelling(finish, tuple(errors))


def _with_errors(where: Where, unit: int, leaves: list[Tensor], held: Held, edge: Edge) -> Tensor:
    """A unit's buffer in `edge.adds`: its leaves and what is remembered of them."""
    out = torch.zeros(where.lengths[unit], dtype=edge.adds, device=leaves[0].device)
    added(leaves, where.views(unit, held.errors.buffers[unit]), held.scale, where.views(unit, out))
    return out


def _joined(
    where: Where,
    units: Sequence[int],
    axis: str,
    wires: Sequence[Wire],
    owns: Sequence[Tensor],
    into: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Units' buffers out of all ranks' rows along an axis; what that does not cut comes from `owns`."""
    out = list(into) if into is not None else [_made(where, u, own) for u, own in zip(units, owns, strict=True)]
    _copy(off_the_wire(where, u, axis, x, w, own) for u, x, w, own in zip(units, out, wires, owns, strict=True))
    return out


def _made(where: Where, unit: int, like: Tensor) -> Tensor:
    """A unit's buffer, whose padding is zero."""
    make = torch.zeros if where.gaps[unit] else torch.empty
    return make(where.lengths[unit], dtype=like.dtype, device=like.device)


def _without_gaps(where: Where, unit: int, buffer: Tensor) -> Tensor:
    """The buffer with zeros in its padding, which a wire may have read otherwise."""
    if not where.gaps[unit]:
        return buffer
    out = torch.zeros_like(buffer)
    _copy([(where.views(unit, out), where.views(unit, buffer))])
    return out


def _copy(pairs: Iterable[tuple[list[Tensor], list[Tensor]]]) -> None:
    """Copies into the first of each pair what is in the second, all at once."""
    to, source = list[Tensor](), list[Tensor]()
    for here, there in pairs:
        to += here
        source += there
    if to:
        torch._foreach_copy_(to, source)
