"""What collectives.py does to whole Slots, made of pieces that can be differentiated any number of times (adjoint.py).

Values and layouts are the collectives', and so are the bits: the same rows travel in the same dtypes and are added in
the same tree. What differs is the grouping of messages, one for all leaves of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funczero.comm.adjoint import gather_rows, join_rows, scatter_rows, total, vary
from funczero.comm.edge import Edge
from funczero.comm.memory import Held
from funczero.comm.wire import Key
from funczero.core import tree
from funczero.layout.mesh import Mesh
from funczero.layout.slots import Slots
from funczero.layout.where import Slot, Where


def outwards(
    where: Where, parts: dict[int, Tensor], mesh: Mesh, dtype: torch.dtype | None = None, shared: bool = False
) -> dict[int, Tensor]:
    """Leaves one step outwards: the parts of all ranks of the innermost axis, joined.

    Args:
      where: of the parts.
      parts: by leaf number.
      dtype: in which they travel and are returned; their cotangents travel in it too, and are added in their own.
      shared: what is joined is one value for all ranks of the axis, rather than a copy of each.
    """
    axis, size, _ = where.coords[-1]
    out = {i: x if dtype is None else x.to(dtype) for i, x in parts.items()}
    if size == 1:
        return out
    cut = [i for i in parts if not where.structure.leaves[i].cut(axis).replicated]
    units = units_of(where, parts)
    if not shared:
        whole = {i: x for i, x in parts.items() if i not in cut}
        out |= over_leaves(where, whole, lambda i: (axis,), mesh, partial(vary, dtype=dtype, units=units))
    if not cut:
        return out
    lengths = [prod(where.slots[i].block) for i in cut]
    flat = torch.cat([_padded(parts[i], n) for i, n in zip(cut, lengths, strict=True)])
    rows = (join_rows if shared else gather_rows)(flat[None], axis, mesh, dtype, units)
    for i, column in zip(cut, rows.split_with_sizes(lengths, 1), strict=True):
        d, slots = _blocks(where.outer, i, axis, size)
        out[i] = torch.cat([r[: prod(s.shape)].view(s.shape) for r, s in zip(column, slots, strict=True)], d)
    return {i: out[i] for i in parts}


def inwards(
    where: Where, leaves: dict[int, Tensor], axis: str, mesh: Mesh, dtype: torch.dtype | None = None
) -> dict[int, Tensor]:
    """Leaves one step inwards: the sum over an axis, each rank keeping its part of a leaf that the axis cuts.

    Args:
      where: of the leaves, before.
      leaves: by leaf number; every rank has a term of its own.
      dtype: in which they are added and returned.
    """
    size, index, _ = mesh.axes[axis]
    if size == 1:
        return dict(leaves)
    cut = [i for i in leaves if not where.structure.leaves[i].cut(axis).replicated]
    out, units = {i: x for i, x in leaves.items() if i not in cut}, units_of(where, leaves)
    if out:
        flat = total(torch.cat([x.reshape(-1) for x in out.values()]), axis, mesh, dtype, units)
        split = flat.split_with_sizes([x.numel() for x in out.values()])
        out = {i: y.view(x.shape) for (i, x), y in zip(out.items(), split, strict=True)}
    if not cut:
        return out
    columns = []
    for i in cut:
        d, slots = _blocks(where, i, axis, size)
        start = where.slots[i].start[d]
        parts = [leaves[i].narrow(d, s.start[d] - start if s.shape[d] else 0, s.shape[d]) for s in slots]
        columns.append(torch.stack([_padded(x, prod(slots[0].block)) for x in parts]))
    rows = scatter_rows(torch.cat(columns, 1), axis, mesh, dtype, units)[0]
    here = where.inner(axis, size, index)
    for i, x in zip(cut, rows.split_with_sizes([c.shape[1] for c in columns]), strict=True):
        shape = here.slots[i].shape
        out[i] = x[: prod(shape)].view(shape)
    return {i: out[i] for i in leaves}


def units_of(where: Where, leaves: Iterable[int]) -> tuple[int, ...]:
    """The units that some leaves lie in, by number."""
    return tuple(sorted({where.structure.leaves[i].unit for i in leaves}))


def _padded(x: Tensor, n: int) -> Tensor:
    return F.pad(x.reshape(-1), (0, n - x.numel()))  # cat drops an empty part, and its derivative with it


def _blocks(outer: Where, i: int, axis: str, size: int) -> tuple[int, list[Slot]]:
    """The dim that an axis cuts a leaf along, and the parts of its ranks.

    Raises:
      TypeError: it is not cut into blocks of a dim, one after another.
    """
    leaf = outer.structure.leaves[i]
    d = leaf.cut(axis).dim
    slots = [outer.inner(axis, size, q).slots[i] for q in range(size)]
    if d is not None:
        place, whole = outer.slots[i].start[d], outer.slots[i].shape
        for s in slots:
            if s.shape[d] and s.start[d] != place or s.shape[:d] + s.shape[d + 1 :] != whole[:d] + whole[d + 1 :]:
                d = None
                break
            place += s.shape[d]
    if d is None:
        what = f"{leaf.path!r} is cut by {leaf.cut(axis)!r}, which is no cut of a dim into blocks"
        raise TypeError(f"differentiable: parameter {what}; leave that rule out here")
    return d, slots


# --- whole Slots ------------------------------------------------------------------------------------------------------
def pack(where: Where, leaves: dict[int, Tensor], like: Slots) -> Slots:
    """Leaves of this place as buffers; those of a unit that has none are empty.

    Args:
      like: whose dtype and device empty buffers have.
    """
    buffers = []
    for members in where.structure.members:
        mine = sorted((i for i in members if i in leaves), key=lambda i: where.slots[i].offset)
        if len(mine) < len(members) and mine:
            missing = next(where.structure.leaves[i].path for i in members if i not in leaves)
            raise ValueError(f"pack: parameter {missing!r} has no value, but others of its unit have")
        if not mine:
            buffers.append(like.buffers[0].new_zeros(0))
            continue
        buffers.append(torch.cat([_padded(leaves[i], where.slots[i].length) for i in mine]))
    return Slots(tuple(buffers), where)


def all_gather(x: Slots, edge: Edge | str, mesh: Mesh, key: Key = (0,)) -> Slots:
    """As collectives.all_gather; what is joined is one value for all ranks of the axis."""
    return pack(x.where.outer, outwards(x.where, x.present(), mesh, shared=True), x)


def reduce_scatter(
    x: Slots, edge: Edge, mesh: Mesh, key: Key = (0,), held: Held | None = None
) -> tuple[Slots, Slots | None]:
    """As collectives.reduce_scatter."""
    size, index, _ = mesh.axes[edge.axis]
    inner = x.where.inner(edge.axis, size, index)
    if size == 1:
        return Slots(x.buffers, inner), None
    return pack(inner, inwards(x.where, x.present(), edge.axis, mesh, edge.adds), x), None


def all_reduce(
    x: Slots, edge: Edge, mesh: Mesh, key: Key = (0,), held: Held | None = None
) -> tuple[Slots, Slots | None]:
    """As collectives.all_reduce, always in the tree: the sum is one value for all ranks of the axis."""
    if mesh.axes[edge.axis].size == 1:
        return x, None
    return x.map(lambda b: total(b, edge.axis, mesh, edge.adds) if b.numel() else b), None


def cut_axes(where: Where, leaf: int) -> tuple[str, ...]:
    """The axes over which a leaf's part is a value of this rank; over all others it is one for all."""
    return tuple(a for a, n, _ in where.coords if n > 1 and not where.structure.leaves[leaf].cut(a).replicated)


def dot(where: Where, a: Mapping[int, Tensor], b: Mapping[int, Tensor], mesh: Mesh) -> Tensor:
    """The inner product of two trees of parts by leaf number, float64 or wider, one value for all ranks."""
    sums: dict[tuple[str, ...], Tensor] = {}
    for i, x in a.items():
        axes = cut_axes(where, i)
        term = (x.double() * b[i].double()).sum()
        sums[axes] = sums[axes] + term if axes in sums else term
    zero = torch.zeros((), dtype=torch.float64, device=mesh.device)
    return sum((over_all(s, axes, mesh, total) for axes, s in sums.items()), zero)


class Varied:
    """Values for all ranks, as each leaf's part must meet them."""

    def __init__(self, where: Where, mesh: Mesh, values: Any) -> None:
        """values: a tree; what is no tensor of floats passes as it is."""
        self.where, self.mesh = where, mesh
        self.known: dict[tuple[str, ...], Any] = {(): values}

    def of(self, leaf: int) -> Any:
        """The values varied over the axes that cut a leaf."""
        axes = cut_axes(self.where, leaf)
        if axes not in self.known:
            self.known[axes] = tree.map(self._over(axes), self.known[()])
        return self.known[axes]

    def _over(self, axes: tuple[str, ...]) -> Callable[[Any], Any]:
        def varied(x: Any) -> Any:
            floats = isinstance(x, Tensor) and x.is_floating_point()
            return over_all(x, axes, self.mesh, vary) if floats else x

        return varied


def unvary(x: Tensor, axis: str, mesh: Mesh) -> Tensor:
    """A value of each rank that is the same on all, as one value for all again."""
    size = mesh.axes[axis].size
    return x if size == 1 else total(x, axis, mesh) / size


def over_leaves(
    where: Where,
    leaves: Mapping[int, Tensor],
    axes: Callable[[int], tuple[str, ...]],
    mesh: Mesh,
    fn: Callable[[Tensor, str, Mesh], Tensor],
) -> dict[int, Tensor]:
    """fn, as vary, of leaves over axes of their own: one message an axis, as long on every rank of the mesh.

    Args:
      where: of the leaves; their parts may be shorter on late ranks, so they are padded.
    """
    groups: dict[tuple[tuple[str, ...], torch.dtype], list[int]] = {}
    for i, x in leaves.items():
        groups.setdefault((axes(i), x.dtype), []).append(i)
    out = dict(leaves)
    for (along, _), members in groups.items():
        if not any(mesh.axes[a].size > 1 for a in along):
            continue
        lengths = [where.slots[i].length for i in members]
        flat = torch.cat([_padded(leaves[i], n) for i, n in zip(members, lengths, strict=True)])
        for i, x in zip(members, over_all(flat, along, mesh, fn).split_with_sizes(lengths), strict=True):
            out[i] = x[: leaves[i].numel()].view(leaves[i].shape)
    return out


def over_all(x: Tensor, axes: Sequence[str], mesh: Mesh, fn: Callable[[Tensor, str, Mesh], Tensor]) -> Tensor:
    """fn over one axis after another: total, or vary."""
    return reduce(lambda y, a: fn(y, a, mesh), axes, x)
