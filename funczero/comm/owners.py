"""Parts of leaves to the ranks that compute with them whole, and the results back: one exchange an axis each way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from funczero.comm.launch import launch_uneven, wait
from funczero.layout.mesh import Mesh


def to_owners(
    parts: Sequence[Tensor], axes: Sequence[str], mesh: Mesh, units: tuple[int, ...] = (), alike: int | None = None
) -> Callable[[], Tensor]:
    """Start to send part q to rank q of those along some axes, the outermost axis first; waiting returns what they
    sent here, as [ranks, n] in their order.

    A rank sends what others own: over one axis all parts but its own. Over several the first axis is crossed first.

    Args:
      parts: flat; part q is as long on every rank, and may be empty.
      alike: bytes that all ranks say of this launch; by default those of all parts.
    """
    axis, *rest = axes
    size, index, _ = mesh.axes[axis]
    r = prod(mesh.axes[a].size for a in rest)
    alike = sum(p.nbytes for p in parts) if alike is None else alike
    lengths = [sum(p.numel() for p in parts[q * r : (q + 1) * r]) for q in range(size)]
    mine = [p.numel() for p in parts[index * r : (index + 1) * r]]
    flying = launch_uneven(torch.cat(list(parts)), lengths, [sum(mine)] * size, axis, mesh, alike, units)

    def finish() -> Tensor:
        arrived = wait(flying).view(size, sum(mine))
        if not rest:
            return arrived
        inner = to_owners([x.reshape(-1) for x in arrived.split(mine, 1)], rest, mesh, units, alike)()
        n = mine[mesh.rank(tuple(rest))[0]]
        return inner.view(r, size, n).transpose(0, 1).reshape(size * r, n)

    return finish


def from_owners(
    rows: Tensor,
    lengths: Sequence[int],
    axes: Sequence[str],
    mesh: Mesh,
    units: tuple[int, ...] = (),
    alike: int | None = None,
) -> Callable[[], list[Tensor]]:
    """The way back, and the transpose of to_owners: start to send row q to rank q; waiting returns what each owner
    sent here.

    Args:
      rows: [ranks, n] of what this rank owns; n may be 0.
      lengths: n by owner, the same on every rank.
      alike: as to_owners'.
    """
    axis, *rest = axes
    size, index, _ = mesh.axes[axis]
    r = prod(mesh.axes[a].size for a in rest)
    alike = sum(lengths) * rows.itemsize if alike is None else alike
    owners = [list(lengths[q * r : (q + 1) * r]) for q in range(size)]

    def over(x: Tensor) -> Tensor:
        sent = [x.shape[1]] * size
        return launch_uneven(x.reshape(-1), sent, [sum(o) for o in owners], axis, mesh, alike, units)

    if not rest:
        flying = over(rows)
        return lambda: list(wait(flying).split(list(lengths)))
    n = rows.shape[1]
    inner = from_owners(
        rows.view(size, r, n).transpose(0, 1).reshape(r, size * n),
        [size * m for m in owners[index]],
        rest,
        mesh,
        units,
        alike,
    )

    def finish() -> list[Tensor]:
        parts = [x.view(size, m) for x, m in zip(inner(), owners[index], strict=True)]
        return list(wait(over(torch.cat(parts, 1))).split([m for o in owners for m in o]))

    return finish
