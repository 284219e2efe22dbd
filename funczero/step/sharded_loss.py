"""A loss as a function of sharded parameters, for torch.func: its derivatives are those of the loss over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial, reduce
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from funczero.comm.adjoint import gather_rows, total
from funczero.comm.differentiable import dot, pack
from funczero.comm.integers import sum_and_compare
from funczero.core import tree
from funczero.core.rows import counting
from funczero.core.types import TrainState
from funczero.gradients.call import reading
from funczero.gradients.draws import keyed
from funczero.gradients.loss import check_loss, drew
from funczero.gradients.parts import Derivable, Parts
from funczero.gradients.ref import opened_first
from funczero.gradients.synced import Across
from funczero.layout.mesh import Mesh
from funczero.layout.where import Where
from funczero.step.fits import unused
from funczero.step.look import by_path
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
        """The mean loss, 0-d and the same on every rank.

        Raises:
          DivergenceError: ranks did not open the same units, or did not come here alike.
        """
        parts, own = self._parts(params), getattr(self.loss_fn, "keyed", False)
        with Derivable(), opened_first(), nullcontext() if own else keyed(None, self.mesh.device, drew):
            loss, weight, *_ = check_loss(self.loss_fn(parts.tree(), batch), has_aux=False)
        parts.left_alone()
        if get_proxy_mode() is None:  # nothing is compared in a graph
            sum_and_compare([torch.zeros(1, dtype=torch.int64, device=self.mesh.device)], self.batch, self.mesh)
        wide = torch.promote_types(loss.dtype, torch.float32)  # a count is rounded in bfloat16, and inf in float16
        return self.total(loss.to(wide)) / self.total(weight.to(loss.device, wide))

    def tree(self, params: Params) -> Any:
        """The whole parameters as the tree that was given to init; a collective that can be differentiated."""
        whole = self.whole(params)
        return self.where.structure.unflatten([whole[leaf.path] for leaf in self.where.structure.leaves])

    def whole(self, params: Params) -> dict[str, Tensor]:
        """The whole leaves by path, so that a transpose sums their cotangents over ranks and cuts them."""
        parts = self._parts(params)
        found = parts.gathered(range(len(self.where.structure.units)))
        return {self.where.structure.leaves[i].path: found[i] for i in sorted(found)}

    def total(self, x: Tensor) -> Tensor:
        """The sum of a value of each rank over all that the batch is split over."""
        return reduce(lambda y, a: total(y, a, self.mesh), self.batch, x)

    def dot(self, a: Params, b: Params) -> Tensor:
        """The inner product of two trees of parts, over all ranks; what lies on several counts once."""
        by_number = lambda x: {i: x[leaf.path] for i, leaf in enumerate(self.where.structure.leaves)}
        return dot(self.where, by_number(a), by_number(b), self.mesh)

    def rows(self, x: Tensor) -> Tensor:
        """What every rank has of its own rows, joined: [rows, ...] -> [all rows, ...], in the order of ranks."""
        return reduce(lambda y, a: gather_rows(y, a, self.mesh), reversed(self.batch), x)

    def _parts(self, params: Params) -> Parts:
        where = self.where
        apart = [a for a in self.batch if a not in where.axes]
        named = _by_number("sharded_loss", where, params)
        parts = {i: x.detach() if where.structure.frozen(i) else x for i, x in named.items()}
        return Parts(where, parts, self.mesh, apart)


def sharded_loss(step: Step, loss_fn: Callable[..., Any], state: TrainState) -> ShardedLoss:
    """A loss of sharded parameters as a function that torch.func differentiates: `loss(fz.parts(state), rows)`.

    Law: at every stage and on any number of ranks its value and all its derivatives are those of the loss over all rows
    and whole parameters, each rank having its part of them: `grad`, `vjp`, `jvp`, Hessian-vector products in either
    order, `create_graph`, and `vmap` over whole sets of parameters. Units are opened one by one and run again for every
    derivative. Parameters are gathered at their own dtype; wires are straight-through: they pack nothing. What the step
    freezes has zero derivatives. All ranks call it alike. A loss that draws is given its key here, as
    `lambda p, b: loss_fn(p, b, key)`.

    What torch.func would get wrong over shards has a verb of its own: its `vmap` over rows pairs row i of one rank with
    row i of the others (write `per_sample`), and its `hessian` and `jacrev` run over this rank's coordinates alone,
    while the others run over theirs (write `fz.hessian`).

    Args:
      step: whose mesh and batch axes count.
      loss_fn: (params, batch) -> (sum of losses, sum of weights), as value_and_grad's; one of fz.stateless reads the
        buffers of the state.
      state: a state of the step; of its masters only where they lie is read.

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
    mesh, layout = step.live_mesh, step.grad.layout
    loss_fn = counting(loss_fn, layout.cut)
    fn = reading(loss_fn, None, step.grad.env.model, state.model_state, Across(mesh, layout.batch))
    return ShardedLoss(fn, state.params.where, mesh, layout.batch)


def parts(state: TrainState) -> dict[str, Tensor]:
    """This rank's part of every parameter by its path, in its logical shape; copies. A tied leaf has its first path.

    Raises:
      RuntimeError: the state was donated.
    """
    unused("parts", state)
    return by_path(state.params)


def with_parts(state: TrainState, params: Params) -> TrainState:
    """The state with other values of this rank's parts, which may be functions of something: `parts` backwards.

    Its views follow, at the next step or evaluation.

    Raises:
      TypeError, ValueError: a path is missing or too many, or a part has another shape.
      RuntimeError: the state was donated.
    """
    unused("with_parts", state)
    masters, dtype = state.params, state.params.buffers[0].dtype
    named = {i: x.to(dtype) for i, x in _by_number("with_parts", masters.where, params).items()}
    return state._replace(params=pack(masters.where, named, masters))


def _by_number(who: str, where: Where, params: Params) -> dict[int, Tensor]:
    """Parts by leaf number.

    Raises:
      TypeError, ValueError: they are no mapping, a path is missing or too many, or a part has another shape.
    """
    leaves, given = where.structure.leaves, "give what fz.parts(state) returned, by path"
    if not isinstance(params, Mapping):
        raise TypeError(f"{who}: its parameters are a {type(params).__name__}; {given}")
    odd = sorted({str(k) for k in params} ^ {str(leaf.path) for leaf in leaves})
    if odd:
        raise TypeError(f"{who}: {odd[0]!r} is missing or no parameter; {given}")
    for leaf, slot in zip(leaves, where.slots, strict=True):
        have = tuple(params[leaf.path].shape)
        if have != slot.shape:
            raise ValueError(f"{who}: {leaf.path!r} has shape {have}, and this rank's part is {slot.shape}")
    return {i: params[leaf.path] for i, leaf in enumerate(leaves)}


def per_sample(
    loss: ShardedLoss, each: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda g: g, rows: int | None = None
) -> Callable[[Params, Any], dict[str, Tensor]]:
    """The sum over all rows of `each(gradient of that row)`: (params, this rank's rows) -> this rank's parts.

    Law: `each` is given the whole gradient of one row's loss, unsharded, so that a norm in it is the row's own; with
    the identity the sum is the gradient of the sum of losses. What the step freezes has zeros in it.

    Args:
      loss: from sharded_loss; its loss function is asked for one row at a time, as a batch of one.
      each: of one row's gradient by path; pure, as a clip.
      rows: that are differentiated at a time; None: all of this rank's.

    Source: Abadi et al., Deep Learning with Differential Privacy, arXiv 1607.00133.
    """

    def summed(params: Params, batch: Any) -> dict[str, Tensor]:
        gathered: Any = torch.func.vjp(loss.whole, dict(params))
        whole, scatter = gathered
        flat, form = tree.flatten(batch)
        given = [x for x in flat if isinstance(x, Tensor)]

        def one(row: list[Tensor]) -> dict[str, Tensor]:
            left = iter(row)
            alone = tree.unflatten([next(left)[None] if isinstance(x, Tensor) else x for x in flat], form)
            return each(torch.func.grad(lambda p: _local(loss, p, alone))(whole))

        if given and not len(given[0]):  # vmap takes no rows, and this rank goes on with the others
            sums = {k: x * 0 for k, x in whole.items()}
        else:
            sums = {k: x.sum(0) for k, x in torch.func.vmap(one, chunk_size=rows)(given).items()}
        out: dict[str, Tensor] = scatter(sums)[0]
        return out

    return summed


def _local(loss: ShardedLoss, whole: Params, batch: Any) -> Tensor:
    """The sum of losses of some rows of this rank; what is frozen is a constant."""
    structure = loss.where.structure
    leaves = [whole[leaf.path] for leaf in structure.leaves]
    still = [x.detach() if structure.frozen(i) else x for i, x in enumerate(leaves)]
    return check_loss(loss.loss_fn(structure.unflatten(still), batch), has_aux=False)[0]


def jacfwd(
    loss: ShardedLoss, fn: Callable[[Params, Any], Any], coordinates: int | None = None
) -> Callable[[Params, Any], dict[str, Any]]:
    """The derivative of fn along every coordinate of the whole parameters, a jvp each: small models only.

    (params, this rank's rows) -> by path the tree that fn returns, with the whole shape of that leaf in front:
    [*whole shape, *out]. torch's own runs over every rank's coordinates at once, and returns the sum of their columns.

    Args:
      loss: from sharded_loss; only where its parts lie is read.
      fn: (params, rows) -> a tree of tensors, of this rank (a gradient's parts) or for all (a loss).
      coordinates: that are taken at a time; None: all of a leaf's.
    """

    def derived(params: Params, batch: Any) -> dict[str, Any]:
        along = lambda t: torch.func.jvp(lambda p: fn(p, batch), (dict(params),), (t,))[1]
        return dict(_by_coordinate(loss, along, params, coordinates))

    return derived


def jacrev(
    loss: ShardedLoss, fn: Callable[[Params, Any], Params], coordinates: int | None = None
) -> Callable[[Params, Any], dict[str, Any]]:
    """The gradient of every coordinate of what fn returns, by this rank's parts: a vjp each.

    (params, this rank's rows) -> by the path of a and of b [*whole shape of a, *this rank's part of b]. torch's own
    runs over every rank's coordinates at once, and returns the sum of their rows.

    Args:
      loss: from sharded_loss; only where its parts lie is read.
      fn: (params, rows) -> parts like the parameters', by path, as a gradient is. Of a value for all ranks
        torch.func.jacrev is right.
      coordinates: that are taken at a time; None: all of a leaf's.
    """

    def derived(params: Params, batch: Any) -> dict[str, Any]:
        found: Any = torch.func.vjp(lambda p: fn(p, batch), dict(params))
        value, pull = found
        return dict(_by_coordinate(loss, lambda t: pull(t)[0], value, coordinates))

    return derived


def hessian(loss: ShardedLoss, coordinates: int | None = None) -> Callable[[Params, Any], dict[str, dict[str, Tensor]]]:
    """All second derivatives, a Hessian-vector product for every coordinate of the whole parameters: small models only.

    (params, this rank's rows) -> by the path of a and of b [*whole shape of a, *this rank's part of b]. torch's own
    `hessian` over shards would run over every rank's coordinates at once, and return the sum of their blocks.

    Args:
      coordinates: that are taken at a time; None: all of a leaf's.
    """
    gradient: Any = torch.func.grad(loss.__call__)
    return jacfwd(loss, gradient, coordinates)


def _by_coordinate(
    loss: ShardedLoss, linear: Callable[[dict[str, Tensor]], Any], like: Params, coordinates: int | None
) -> Iterator[tuple[str, Any]]:
    """By path a linear function of parts, at every unit vector of the whole leaf: each rank has its part of it."""
    for leaf, slot in zip(loss.where.structure.leaves, loss.where.slots, strict=True):
        n, x = prod(leaf.shape), like[leaf.path]
        units = {k: y.new_zeros((n, *y.shape)) for k, y in like.items()}
        units[leaf.path] = torch.eye(n, dtype=x.dtype, device=x.device).view((n, *leaf.shape))[:, *slot.place]
        if n:
            # what is drawn comes from a key, and so is the same for all coordinates
            found = torch.func.vmap(linear, chunk_size=coordinates, randomness="same")(units)
        else:
            found = tree.map(lambda y: y.new_zeros((0, *y.shape)), linear(dict(like)))
        yield leaf.path, tree.map(partial(_unflattened, leaf.shape), found)


def _unflattened(shape: tuple[int, ...], x: Tensor) -> Tensor:
    return x.reshape((*shape, *x.shape[1:]))
