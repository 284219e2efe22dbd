"""What crosses ranks and can be differentiated any number of times, in pairs that are each other's transpose.

    gather_rows   parts, one a rank -> the whole, a copy of every rank's own     scatter_rows  its transpose: sums
    total         values, one a rank -> their sum, one for all                   vary          its transpose
    join_rows     parts, one a rank -> the whole, one for all                    own_rows      its transpose

For research code that differentiates through sharded values: Hessian-vector products, penalties, unrolled optimizers.
A value is either *of a rank* or *one for all*, which is the same on every rank. The cotangent of a rank's value counts
once for every rank; that of one value for all is the same on all, and counts once. A value for all passes `vary` before
it meets values of a rank, and a sum over ranks is a `total`; without the pair a derivative misses what the other ranks
made of the value. They are exact: no wire of an edge packs what they send. All six know reverse mode, forward mode and
vmap, in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funczero.comm.launch import launch_exchange, launch_gather, wait
from funczero.core.order import tree_sum
from funczero.layout.mesh import Mesh

Units = tuple[int, ...]  # whose values these are, for ranks to compare
Crossing = Callable[[Tensor, str, Mesh, Units, torch.dtype], Tensor]  # (x, axis, mesh, units, the result's dtype)


def _linear(name: str, forward: Crossing, transpose: Callable[[], Any], rows: bool = True) -> Any:
    """A linear function over an axis, which is its own derivative forwards, and its transpose backwards.

    Args:
      rows: is dim 0 cut or joined? A batched call is one call all the same, with the batch as dim 1.
    """

    class Linear(torch.autograd.Function):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, *ctx.over, ctx.dtype = inputs
            ctx.born = x.dtype

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
            return transpose().apply(g, *ctx.over, ctx.born), None, None, None, None

        @staticmethod
        def jvp(ctx: Any, dx: Tensor, *_: None) -> Any:
            return fn.apply(dx, *ctx.over, ctx.dtype)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *over: Any) -> tuple[Any, int | None]:
            dim = in_dims[0]
            if dim is None or not rows:
                return fn.apply(x, *over), dim
            return fn.apply(x.movedim(dim, 1), *over), 1

    fn: Any = Linear
    fn.forward, fn.__name__, fn.__qualname__ = staticmethod(forward), name, name
    return fn


def _whole(x: Tensor, axis: str, mesh: Mesh, units: Units, dtype: torch.dtype) -> Tensor:
    """[rows, ...] -> [W * rows, ...]."""
    return (
        wait(launch_gather(x.to(dtype).contiguous().reshape(-1), axis, mesh, units)).reshape(-1, *x.shape[1:]).clone()
    )


def _sums(x: Tensor, axis: str, mesh: Mesh, units: Units, dtype: torch.dtype) -> Tensor:
    """[W * rows, ...] on every rank -> the sum's [rows, ...] of this rank."""
    rows = wait(launch_exchange(x.contiguous().reshape(mesh.axes[axis].size, -1), axis, mesh, units))
    return tree_sum(rows.to(dtype)).reshape(-1, *x.shape[1:]).clone()


def _own(x: Tensor, axis: str, mesh: Mesh, units: Units, dtype: torch.dtype) -> Tensor:
    """[W * rows, ...] -> [rows, ...]."""
    n = x.shape[0] // mesh.axes[axis].size
    return x.narrow(0, mesh.index(axis) * n, n).to(dtype, copy=True)


def _sum(x: Tensor, axis: str, mesh: Mesh, units: Units, dtype: torch.dtype) -> Tensor:
    """A tensor a rank -> their sum, on every rank."""
    size, n = mesh.axes[axis].size, x.numel()
    if n < size:  # one message instead of two
        return tree_sum(wait(launch_gather(x.contiguous().reshape(-1), axis, mesh, units)).to(dtype)).reshape(x.shape)
    flat = F.pad(x.reshape(-1), (0, -n % size)).view(size, -1)
    part = tree_sum(wait(launch_exchange(flat, axis, mesh, units)).to(dtype)).reshape(-1)
    return wait(launch_gather(part, axis, mesh, units)).view(-1)[:n].reshape(x.shape).clone()


_Gather: Any = _linear("Gather", _whole, lambda: _Scatter)
_Scatter: Any = _linear("Scatter", _sums, lambda: _Gather)
_Join: Any = _linear("Join", _whole, lambda: _Own)
_Own: Any = _linear("Own", _own, lambda: _Join)
_Total: Any = _linear("Total", _sum, lambda: _Vary, rows=False)
_Vary: Any = _linear("Vary", lambda x, axis, mesh, units, dtype: x.to(dtype, copy=True), lambda: _Total, rows=False)


def gather_rows(x: Tensor, axis: str, mesh: Mesh, dtype: torch.dtype | None = None, units: Units = ()) -> Tensor:
    """Rows of all ranks of an axis, in their order, as a value of every rank: [rows, ...] -> [W * rows, ...].

    Args:
      dtype: in which they travel and are returned; by default their own. The cotangent travels in it too, and is added
        in that of x.
    """
    return _apply(_Gather, x, axis, mesh, dtype, units)


def scatter_rows(x: Tensor, axis: str, mesh: Mesh, dtype: torch.dtype | None = None, units: Units = ()) -> Tensor:
    """This rank's rows of the sum over an axis: [W * rows, ...] -> [rows, ...], in the tree over ranks.

    Args:
      dtype: in which they are added and returned; they travel in their own.

    Raises:
      ValueError: the rows do not divide among the ranks.
    """
    _divides("scatter_rows", x, axis, mesh)
    return _apply(_Scatter, x, axis, mesh, dtype, units)


def join_rows(x: Tensor, axis: str, mesh: Mesh, dtype: torch.dtype | None = None, units: Units = ()) -> Tensor:
    """Rows of all ranks of an axis as one value for all, as what a closing bracket joins: [rows, ...] -> [W * rows,
    ...].
    """
    return _apply(_Join, x, axis, mesh, dtype, units)


def own_rows(x: Tensor, axis: str, mesh: Mesh, units: Units = ()) -> Tensor:
    """This rank's rows of one value for all: [W * rows, ...] -> [rows, ...]."""
    _divides("own_rows", x, axis, mesh)
    return _apply(_Own, x, axis, mesh, None, units)


def total(x: Tensor, axis: str, mesh: Mesh, dtype: torch.dtype | None = None, units: Units = ()) -> Tensor:
    """The sum of a rank's value over all ranks of an axis, one value for all, added in `dtype` in the tree over
    ranks.
    """
    return _apply(_Total, x, axis, mesh, dtype, units)


def vary(x: Tensor, axis: str, mesh: Mesh, dtype: torch.dtype | None = None, units: Units = ()) -> Tensor:
    """One value for all ranks of an axis as a value of this rank, about to meet its own.

    Args:
      dtype: in which it is returned, and its cotangents travel; they are added in that of x.
    """
    return _apply(_Vary, x, axis, mesh, dtype, units)


def _apply(fn: Any, x: Tensor, axis: str, mesh: Mesh, dtype: torch.dtype | None, units: Units) -> Tensor:
    if mesh.axes[axis].size == 1:
        return x if dtype is None else x.to(dtype)
    out: Tensor = fn.apply(x, axis, mesh, units, dtype or x.dtype)
    return out


def _divides(name: str, x: Tensor, axis: str, mesh: Mesh) -> None:
    size = mesh.axes[axis].size
    if not x.dim() or x.shape[0] % size:
        raise ValueError(
            f"{name}({axis!r}): dim 0 of shape {tuple(x.shape)} does not divide among {size} ranks; pad it first"
        )
