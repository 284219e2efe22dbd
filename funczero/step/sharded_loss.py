"""A loss as a function of sharded parameters, for torch.func: its derivatives are those of the loss over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from funczero.comm.adjoint import gather_rows, total, vary
from funczero.core import tree
from funczero.core.types import TrainState
from funczero.gradients.loss import check_loss
from funczero.layout.mesh import Mesh
from funczero.layout.where import Where
from funczero.step.step import Step

Params = Mapping[str, Tensor]  # by the leaf's path


class ShardedLoss(NamedTuple):
    """`loss(params, batch)`: the mean loss over the rows of all ranks, of this rank's parts of the parameters.

    See `sharded_loss`.
    """

    loss_fn: Callable[..., Any]
    where: Where  # of the parts
    mesh: Mesh
    batch: tuple[str, ...]  # mesh axes that rows are split over

    def __call__(self, params: Params, batch: Any) -> Tensor:
        """The mean loss, 0-d and the same on every rank."""
        loss, weight, _ = check_loss(self.loss_fn(self.tree(params), batch), has_aux=False)
        return self.total(loss) / self.total(weight.to(loss))

    def tree(self, params: Params) -> Any:
        """The whole parameters as the tree that was given to init; a collective that can be differentiated."""
        return self.where.structure.unflatten([self._whole(i, x) for i, x in enumerate(self._checked(params))])

    def total(self, x: Tensor) -> Tensor:
        """The sum of a value of each rank over all that the batch is split over."""
        return reduce(lambda y, a: total(y, a, self.mesh), self.batch, x)

    def dot(self, a: Params, b: Params) -> Tensor:
        """The inner product of two trees of parts, over all ranks; what lies on several counts once."""
        sums: dict[tuple[str, ...], Tensor] = {}
        for i, leaf in enumerate(self.where.structure.leaves):
            axes = tuple(x for x in self.where.axes if x not in self.where.replicas(i))
            term = (a[leaf.path] * b[leaf.path]).sum()
            sums[axes] = sums[axes] + term if axes in sums else term
        return sum((reduce(lambda y, x: total(y, x, self.mesh), axes, s) for axes, s in sums.items()), torch.zeros(()))

    def _checked(self, params: Params) -> list[Tensor]:
        leaves, slots = self.where.structure.leaves, self.where.slots
        if not isinstance(params, Mapping) or set(params) != {leaf.path for leaf in leaves}:
            have = sorted(params)[:4] if isinstance(params, Mapping) else type(params).__name__
            raise TypeError(f"sharded_loss: its parameters are {have}; give what fz.parts(state) returned, by path")
        for leaf, slot in zip(leaves, slots, strict=True):
            shape = tuple(params[leaf.path].shape)
            if shape != slot.shape:
                raise ValueError(f"sharded_loss: {leaf.path!r} has shape {shape}, and this rank's part is {slot.shape}")
        return [params[leaf.path] for leaf in leaves]

    def _whole(self, i: int, x: Tensor) -> Tensor:
        """A leaf over all ranks: joined over the axes that cut it, innermost first, and varied over the others."""
        where, leaf = self.where, self.where.structure.leaves[i]
        x = x.detach() if where.structure.frozen(i) else x
        for axis, size, _ in reversed(where.coords):
            if size > 1 and not leaf.cut(axis).replicated:
                x = _joined(i, x, where, axis, size, self.mesh)
            where = where.outer
        along = [a for a in self.batch if a not in self.where.axes or leaf.cut(a).replicated]
        return reduce(lambda y, a: vary(y, a, self.mesh), along, x)


def _joined(i: int, x: Tensor, where: Where, axis: str, size: int, mesh: Mesh) -> Tensor:
    """A leaf's parts over one axis, whole; each part travels padded to a full one."""
    outer = where.outer
    slots = [outer.inner(axis, size, q).slots[i] for q in range(size)]
    longest, d = prod(slots[0].block), where.structure.leaves[i].cut(axis).dim
    if d is None:
        path, kind = where.structure.leaves[i].path, where.structure.leaves[i].cut(axis)
        raise TypeError(
            f"sharded_loss: {path!r} is cut by {kind!r}, which is no cut of a dim; leave that rule out here"
        )
    flat = F.pad(x.reshape(-1), (0, longest - x.numel()))  # cat drops an empty part, and its derivative with it
    rows = gather_rows(flat[None], axis, mesh)
    return torch.cat([row[: prod(s.shape)].view(s.shape) for row, s in zip(rows, slots, strict=True)], d)


def sharded_loss(step: Step, loss_fn: Callable[..., Any], state: TrainState) -> ShardedLoss:
    """A loss of sharded parameters as a function that torch.func differentiates: `loss(fz.parts(state), rows)`.

    Law: at every stage and on any number of ranks its value and all its derivatives are those of the loss over all rows
    and whole parameters, each rank having its part of them: `grad`, `vjp`, `jvp`, Hessian-vector products in either
    order, `create_graph`, and `vmap` over whole sets of parameters. Parameters are gathered whole, at their own dtype;
    wires pack nothing. What the step freezes has zero derivatives. All ranks call it alike.

    What torch.func would get wrong over shards has a verb of its own: its `vmap` over rows pairs row i of one rank with
    row i of the others (write `per_sample`), and its `hessian` and `jacrev` run over this rank's coordinates alone,
    while the others run over theirs (write `fz.hessian`).

    Args:
      step: whose mesh and batch axes count.
      loss_fn: (params, batch) -> (sum of losses, sum of weights), as value_and_grad's.
      state: a state of the step; only where its masters lie is read.

    >>> import funczero as fz
    >>> fn = lambda p, b: ((p["w"] ** 3 * b).sum(), b.sum())
    >>> grad = fz.value_and_grad(fn, batch=fz.P("data"))
    >>> step = fz.train_step(*fz.zero(grad, fz.sgd(0.1), stage=3), mesh={"data": 1})
    >>> state = step.init({"w": torch.full((), 2.0)})
    >>> loss = sharded_loss(step, fn, state)
    >>> second = torch.func.grad(lambda p: torch.func.grad(loss)(p, torch.ones(4))["w"])
    >>> second(parts(state))["w"].item()
    12.0
    """
    step.fits.look(state)
    return ShardedLoss(loss_fn, state.params.where, step.live_mesh, step.grad.layout.batch)


def parts(state: TrainState) -> dict[str, Tensor]:
    """This rank's part of every parameter by its path, in its logical shape; copies. A tied leaf has its first path."""
    leaves = state.params.where.structure.leaves
    found = zip(leaves, state.params.leaves(), strict=True)
    return {leaf.path: x.clone() for leaf, x in found if x is not None}


def per_sample(
    loss: ShardedLoss, each: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda g: g, rows: int | None = None
) -> Callable[[Params, Any], dict[str, Tensor]]:
    """The sum over all rows of `each(gradient of that row)`: (params, this rank's rows) -> this rank's parts.

    Law: `each` is given the whole gradient of one row's loss, unsharded, so that a norm in it is the row's own; with
    the identity the sum is the gradient of the sum of losses.

    Args:
      loss: from sharded_loss; its loss function is asked for one row at a time, as a batch of one.
      each: of one row's gradient by path; pure, as a clip.
      rows: that are differentiated at a time; None: all of this rank's.

    Source: Abadi et al., Deep Learning with Differential Privacy, arXiv 1607.00133.
    """

    def summed(params: Params, batch: Any) -> dict[str, Tensor]:
        gathered: Any = torch.func.vjp(lambda p: _by_path(loss, p), dict(params))
        whole, scatter = gathered

        def one(row: Any) -> dict[str, Tensor]:
            alone = tree.map(lambda x: x[None], row)
            return each(torch.func.grad(lambda p: _local(loss, p, alone))(whole))

        found = torch.func.vmap(one, chunk_size=rows)(batch)
        out: dict[str, Tensor] = scatter({k: v.sum(0) for k, v in found.items()})[0]
        return out

    return summed


def _by_path(loss: ShardedLoss, params: Params) -> dict[str, Tensor]:
    """Whole leaves by path, so that a transpose scatters their sums."""
    found = enumerate(loss._checked(params))
    return {loss.where.structure.leaves[i].path: loss._whole(i, x) for i, x in found}


def _local(loss: ShardedLoss, whole: Params, batch: Any) -> Tensor:
    """The sum of losses of some rows of this rank."""
    leaves = [whole[leaf.path] for leaf in loss.where.structure.leaves]
    return check_loss(loss.loss_fn(loss.where.structure.unflatten(leaves), batch), has_aux=False)[0]


def hessian(loss: ShardedLoss, coordinates: int | None = None) -> Callable[[Params, Any], dict[str, dict[str, Tensor]]]:
    """All second derivatives, a Hessian-vector product for every coordinate of the whole parameters: small models only.

    (params, this rank's rows) -> by the path of a and of b [*whole shape of a, *this rank's part of b]. torch's own
    `hessian` over shards would run over every rank's coordinates at once, and return the sum of their blocks.

    Args:
      coordinates: that are taken at a time; None: all of a leaf's.
    """

    def second(params: Params, batch: Any) -> dict[str, dict[str, Tensor]]:
        gradient = torch.func.grad(lambda p: loss(p, batch))
        product = lambda t: torch.func.jvp(gradient, (dict(params),), (t,))[1]
        out: dict[str, dict[str, Tensor]] = {}
        for leaf, slot in zip(loss.where.structure.leaves, loss.where.slots, strict=True):
            n, like = prod(leaf.shape), params[leaf.path]
            place = tuple(slice(a, a + m) for a, m in zip(slot.start, slot.shape, strict=True))
            tangents = {k: x.new_zeros((n, *x.shape)) for k, x in params.items()}
            tangents[leaf.path] = torch.eye(n, dtype=like.dtype, device=like.device).view((n, *leaf.shape))[:, *place]
            found = torch.func.vmap(product, chunk_size=coordinates)(tangents) if n else tangents
            out[leaf.path] = {k: x.view((*leaf.shape, *params[k].shape)) for k, x in found.items()}
        return out

    return second
