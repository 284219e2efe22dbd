"""Sums of integers, which have no order; in them ranks also compare what they launched."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from funczero.comm.launch import sum_over
from funczero.layout.mesh import Mesh


def sum_integers(x: Tensor, axes: tuple[str, ...], mesh: Mesh) -> Tensor:
    """An int64 sum over axes: integers add in any order. One collective where the axes are the whole mesh."""
    return _summed(x, axes, mesh, noted=True)


def _summed(x: Tensor, axes: tuple[str, ...], mesh: Mesh, noted: bool) -> Tensor:
    axes = tuple(a for a in axes if mesh.axes[a].size > 1)
    if axes and mesh.world_group and {a for a, n in mesh.sizes().items() if n > 1} == set(axes):
        return sum_over(x, "+".join(axes), prod(mesh.sizes().values()), mesh.world_group, mesh, noted)
    for a in axes:
        x = sum_over(x, a, mesh.axes[a].size, mesh.axes[a].group, mesh, noted)
    return x


def sum_and_compare(parts: Sequence[Tensor], axes: tuple[str, ...], mesh: Mesh) -> tuple[Tensor, Tensor | None]:
    """The int64 sum of flat `parts` over axes, in which all ranks also compare what they launched (ledger.py).

    Every rank of the mesh takes part. Over the mesh's other axes the parts are the same, and are counted once.

    Returns:
      the sum, the parts one after another; and, on an accelerator, whether the ranks agree, as a bool tensor: it is
        told at the next sum there, without waiting for this one.

    Raises:
      DivergenceError: they do not; on all ranks alike, and before anything is made of the sum.
    """
    ledger, everything = mesh.ledger, tuple(mesh.axes)
    if ledger.ranks == 1:
        return sum_integers(parts[0] if len(parts) == 1 else torch.cat(tuple(parts)), axes, mesh), None
    groups = _alike(mesh) if ledger.replicated else None
    if ledger.later is not None:  # an earlier sum's
        later, ledger.later = ledger.later.tolist(), None
        ledger.agreed(later, groups)
    own = [0] * ledger.ranks * (1 if groups is None else 2)
    name = "+".join(a for a in everything if mesh.axes[a].size > 1)
    own[ledger.place], rows = ledger.seal(name, 8 * sum(p.numel() for p in parts))
    if groups is not None:
        own[ledger.ranks + ledger.place] = rows
    if any(mesh.axes[a].index for a in everything if a not in axes):
        parts = [torch.zeros_like(p) for p in parts]
    table = torch.tensor(own, device=mesh.device)
    total = _summed(torch.cat((table, *parts)), everything, mesh, noted=False)
    table, total = total[: len(own)], total[len(own) :]
    if mesh.device.type == "cpu":
        ledger.agreed(table.tolist(), groups)
        return total, None
    ledger.later = table
    return total, (table[: ledger.ranks] == table[0]).all()


def _alike(mesh: Mesh) -> list[int]:
    """By place in the mesh: which ranks are given the same rows."""
    groups = [0]
    for name, a in mesh.axes.items():
        one = name in mesh.ledger.replicated
        groups = [g if one else g * a.size + i for g in groups for i in range(a.size)]
    return groups
