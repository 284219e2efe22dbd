"""What crosses ranks and can be differentiated any number of times: gather and scatter, total and vary, in pairs that
are each other's transpose.

For research code that differentiates through sharded values: Hessian-vector products, penalties, unrolled optimizers.
The convention is the sum: the cotangent of a gathered tensor is summed over ranks, and every rank's own cotangent
counts once. A value that is the same on all ranks passes `vary` before it meets values of one rank, and a sum over
ranks is a `total`; without the pair a derivative misses what the other ranks made of the value. They are exact: no wire
of an edge packs what they send. All four know reverse mode, forward mode and vmap, in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funczero.comm.launch import launch_exchange, launch_gather, wait
from funczero.core.order import tree_sum
from funczero.layout.mesh import Mesh


class _Linear(torch.autograd.Function):
    """A linear function of a tensor, over one axis."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, Mesh], output: Tensor) -> None:
        _, ctx.axis, ctx.mesh = inputs


class _Gather(_Linear):
    """[rows, ...] -> [W * rows, ...]."""

    @staticmethod
    def forward(x: Tensor, axis: str, mesh: Mesh) -> Tensor:
        return wait(launch_gather(x.contiguous().reshape(-1), axis, mesh)).reshape(-1, *x.shape[1:]).clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(g, ctx.axis, ctx.mesh), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        return _gathered(dx, ctx.axis, ctx.mesh)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, axis: str, mesh: Mesh) -> tuple[Tensor, int | None]:
        return _over_rows(_gathered, in_dims[0], x, axis, mesh)


class _Scatter(_Linear):
    """[W * rows, ...] on every rank -> the sum's [rows, ...] of this rank."""

    @staticmethod
    def forward(x: Tensor, axis: str, mesh: Mesh) -> Tensor:
        size = mesh.axes[axis].size
        rows = wait(launch_exchange(x.contiguous().reshape(size, -1), axis, mesh))
        return tree_sum(rows).reshape(-1, *x.shape[1:]).clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(g, ctx.axis, ctx.mesh), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        return _scattered(dx, ctx.axis, ctx.mesh)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, axis: str, mesh: Mesh) -> tuple[Tensor, int | None]:
        return _over_rows(_scattered, in_dims[0], x, axis, mesh)


class _Total(_Linear):
    """One value a rank -> their sum, on every rank."""

    @staticmethod
    def forward(x: Tensor, axis: str, mesh: Mesh) -> Tensor:
        rows = wait(launch_gather(x.contiguous().reshape(-1), axis, mesh))
        return tree_sum(rows).reshape(x.shape).clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _varied(g, ctx.axis, ctx.mesh), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        return _totalled(dx, ctx.axis, ctx.mesh)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, axis: str, mesh: Mesh) -> tuple[Tensor, int | None]:
        return _totalled(x, axis, mesh), in_dims[0]


class _Vary(_Linear):
    """One value for all ranks -> the same as a value of this rank."""

    @staticmethod
    def forward(x: Tensor, axis: str, mesh: Mesh) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _totalled(g, ctx.axis, ctx.mesh), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        return _varied(dx, ctx.axis, ctx.mesh)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, axis: str, mesh: Mesh) -> tuple[Tensor, int | None]:
        return _varied(x, axis, mesh), in_dims[0]


Crossing = Callable[[Tensor, str, Mesh], Tensor]
_gathered: Crossing = _Gather.apply
_scattered: Crossing = _Scatter.apply
_totalled: Crossing = _Total.apply
_varied: Crossing = _Vary.apply


def _over_rows(fn: Crossing, dim: int | None, x: Tensor, axis: str, mesh: Mesh) -> tuple[Tensor, int | None]:
    """A batched call is one call with the batch as dim 1: rows stay dim 0."""
    if dim is None:
        return fn(x, axis, mesh), None
    return fn(x.movedim(dim, 1), axis, mesh), 1


def gather_rows(x: Tensor, axis: str, mesh: Mesh) -> Tensor:
    """Every rank's equal rows of dim 0, joined in the order of ranks; differentiable any number of times.

    Transpose: scatter_rows. Layout: split over axis -> whole. `mesh` is a connected Mesh, as step.live_mesh.
    """
    return x if mesh.axes[axis].size == 1 else _gathered(x, axis, mesh)


def scatter_rows(x: Tensor, axis: str, mesh: Mesh) -> Tensor:
    """The sum over ranks of whole tensors, each rank keeping its rows of dim 0; differentiable any number of times.

    Transpose: gather_rows. Layout: partial sum over axis -> split over axis; the rows must divide.

    Raises:
      ValueError: the rows of dim 0 do not divide by the axis.
    """
    size = mesh.axes[axis].size
    if x.shape[0] % size:
        raise ValueError(
            f"scatter_rows: {x.shape[0]} rows do not divide over {axis!r} of size {size}; pad dim 0 to a multiple of it"
        )
    return x if size == 1 else _scattered(x, axis, mesh)


def total(x: Tensor, axis: str, mesh: Mesh) -> Tensor:
    """The sum of every rank's own x, the same on all ranks; differentiable any number of times.

    Transpose: vary. Layout: a value of each rank -> one value for all.
    """
    return x if mesh.axes[axis].size == 1 else _totalled(x, axis, mesh)


def vary(x: Tensor, axis: str, mesh: Mesh) -> Tensor:
    """x, which is the same on all ranks, as a value of this rank, whose derivative every rank has a share in.

    Transpose: total. Layout: one value for all -> a value of each rank.
    """
    return x if mesh.axes[axis].size == 1 else _varied(x, axis, mesh)
