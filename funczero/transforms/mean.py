"""The mean: left of it are sums, in any order; right of it are values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from funczero.comm.adjoint import total
from funczero.comm.differentiable import Varied, dot, over_all, pack
from funczero.comm.exact import Grid
from funczero.comm.integers import sum_and_compare
from funczero.comm.norm import folds, norm_of, square_bins
from funczero.core import order
from funczero.core.straight import root, straight
from funczero.core.transform import after, around, refuse
from funczero.core.types import Env, Grad, Layout, Seed, State, Sum, Transform, Tree, Value
from funczero.layout.slots import Slots
from funczero.transforms import exact
from funczero.transforms.model_state import MODEL, SMOOTH
from funczero.world.entries import RETURNED


def mean(g: Grad) -> Grad:
    """The sum becomes a value: divided by the weight, through `factor` alone, with one packed integer collective an
    update.

    Every loss and weight travels as its float64 bits at its global micro-batch index (zero elsewhere), with the norm's
    integer bins: integer sums have no order. Left of it are sums, right of it values. A weight of zero leaves ok false.
    With them every rank's checksum of what it launched: ranks that did not do the same raise here, and nothing is
    applied.
    """
    lay, env = g.layout, g.env
    if lay.mean:
        raise refuse(
            g, "mean", "the mean is already taken, here or by a nonlinear transform left of it; leave this one out"
        )
    if lay.unreduced:
        raise refuse(g, "mean", _partial(lay))

    if env.exact:
        _countable(g)
    here, model = order.indices(lay, env.mesh.index), env.model
    places = torch.tensor(here, device=env.mesh.device)

    def fn(out: Sum, given: State, grid: Grid | None = None) -> tuple[Value, State]:
        micros = None if out.micros is None else int(out.micros)
        head = torch.stack([out.loss.double(), out.weight.double()], 1).view(torch.int64)
        marks = [torch.ones_like(head[:, :1])] if g.streams else []  # a window may close early
        columns = [head, *marks, *([] if out.aux is None else out.aux.sent())]
        rows, first = (head[:, :0], head[0, :0]) if model is None else model.sent(out.moved, here[0] == 0)
        own = torch.cat([*columns, rows], 1)
        if micros is not None:  # copies in empty places count for nothing
            own = torch.where((places[: len(own)] < micros)[:, None], own, 0)
            env.mesh.ledger.note(RETURNED, "micro-batches", str(micros))
        bits = own.new_zeros(lay.stride, own.shape[1]).index_copy_(0, places[: len(own)], own)
        none, grads, codes = first.new_zeros(0), out.grads, first.new_zeros(0)
        if grid is not None:
            out = exact.counted(out, grid)
            grads, codes = exact.values(out, grid, lay, env), exact.sent(out, lay, env)
        parts = [bits.view(-1), first, _norm_bins(grads, lay, env), none if out.used is None else out.used, codes]
        if out.bad is not None:
            parts.append(_place_of(out.bad, lay, env))
        if out.aux is not None and env.mesh.ledger.ranks > 1:
            env.mesh.ledger.note(RETURNED, "aux", str(out.aux))
        packed, alike = sum_and_compare(parts, lay.batch, env.mesh)
        flat, first, bins, used, codes, bad = packed.split_with_sizes(
            [x.numel() for x in parts[:5]] + [sum(x.numel() for x in parts[5:])]
        )
        table = flat.view(lay.stride, -1)[:micros]
        came = None if len(own) == len(here) else table[:, 2] > 0
        scalars = table[:, :2].contiguous().view(torch.float64)
        loss, weight = order.tree_sum(scalars)
        logs: dict[str, Tensor] = {"rows": scalars}
        ok, moved = weight > 0, dict[str, Tree]()
        if grid is not None:
            found = exact.read(codes, out, given, grid, lay, env)
            moved, ok = found.new, ok & found.finite & found.fits
            logs["unfit"] = torch.where(found.fits | ~found.finite, -1, found.odd)
            if found.units:
                grads = exact.with_large(out, found.units, grid, lay, env)
                bins, _ = sum_and_compare([_norm_bins(grads, lay, env)], lay.batch, env.mesh)
            grads = exact.joined(grads, lay.sharded, env)
        finite = bins[0] == 0 if alike is None else (bins[0] == 0) & alike
        factor = 1 / weight.clamp(min=torch.finfo(torch.float64).tiny)
        norm = torch.where(finite, norm_of(bins, folds(grads.buffers[0].dtype)) * factor, torch.inf)
        ok, new = ok & finite, moved
        aux = None if out.aux is None else out.aux.read(table[:, 2 + len(marks) :], came)
        if model is not None:
            new |= model.combined(table[:, own.shape[1] - rows.shape[1] :], first, scalars[:, 1], given, ok, came)
        where = None if out.bad is None else _first_bad(bad, len(out.bad))
        uses = None if out.used is None else used > 0
        return Value(loss * factor, weight, aux, grads, factor, norm, ok, where, logs, uses), new

    def formula(out: Sum, given: State) -> tuple[Value, State]:
        return _differentiable(out, given, lay, env, places)

    def units(views: Slots, seed: Seed, state: State) -> tuple[Seed, Grid | None]:
        grid = exact.grid_of(state, seed, env)
        return seed._replace(grid=grid), grid

    def both(out: Sum, state: State, grid: Grid | None) -> tuple[Value, State]:
        given = {} if model is None else {MODEL: state[MODEL]}
        if grid is not None:
            given |= {k: state[k] for k in (exact.KEY, "params")}
        if not env.differentiable:
            found, new = fn(out, given, grid)
        else:
            found, new = straight(fn, formula, out, given)
        return found, {**state, **new}

    init = (lambda params: exact.start(params, env)) if env.exact else None
    return around(g, "mean", replace(lay, phase="value"), units, both, init)


def _countable(g: Grad) -> None:
    """Refuse what exact sums cannot be.

    Raises:
      ChainError: a differentiable step; more micro-batches than integers can hold.
    """
    if g.env.differentiable:
        why = "integers have no derivative, and sums of another kind would have other bits"
        raise refuse(g, "mean", f"sums='exact': {why}; build the step to be differentiated with sums='tree'")
    if g.layout.stride > exact.MOST:
        why = f"an update of {g.layout.stride} micro-batches has more than the {exact.MOST} that its integers can hold"
        raise refuse(g, "mean", f"sums='exact': {why}; make micro-batches larger, or write sums='tree'")


def _differentiable(out: Sum, given: State, lay: Layout, env: Env, places: Tensor) -> tuple[Value, State]:
    """The same of plain operations, for derivatives."""

    def everywhere(x: Tensor) -> Tensor:  # [micro-batches of this rank, ...] -> of all
        own = x.new_zeros(lay.stride, *x.shape[1:]).index_copy(0, places[: len(x)], x)
        return over_all(own, lay.batch, env.mesh, total)

    scalars = everywhere(torch.stack([out.loss.double(), out.weight.double()], 1))
    loss, weight = order.tree_sum(scalars)
    squares, factor = _squares(out.grads, env), 1 / weight.clamp(min=torch.finfo(torch.float64).tiny)
    finite = squares.isfinite()
    norm = torch.where(finite, root(squares) * factor, torch.inf)
    ok, aux, new = finite & (weight > 0), None, dict[str, Tree]()
    bad = None if out.bad is None else torch.full((2,), -1, device=scalars.device)
    if out.aux is not None:
        aux = out.aux.built(order.tree_sum(everywhere(out.aux.sums)), [everywhere(x) for x in out.aux.cat])
    if env.model is not None:
        moved = [everywhere(x) for x in out.moved]
        new = env.model.ruled(moved, scalars[:, 1], given, ok, SMOOTH)
    return Value(loss * factor, weight, aux, out.grads, factor, norm, ok, bad, {"rows": scalars}), new


def _squares(grads: Slots, env: Env) -> Tensor:
    """The sum of squares over the whole tree, float64, one value for all ranks."""
    leaves = grads.present()
    return dot(grads.where, leaves, leaves, env.mesh)


def _norm_bins(grads: Slots, lay: Layout, env: Env) -> Tensor:
    """This rank's share of the norm: every value counted on one rank, replicas each count a part of it."""
    spare, mine = tuple(a for a in lay.batch if a not in grads.where.axes), []
    for u, buffer in enumerate(grads.buffers):
        for axes, start, stop in grads.where.sections[u] if buffer.numel() else ():
            index, size = env.mesh.rank(spare + tuple(a for a in axes if a in lay.batch))
            n = stop - start
            mine.append(buffer[start + n * index // size : start + n * (index + 1) // size])
    none = torch.zeros(0, dtype=grads.buffers[0].dtype, device=grads.buffers[0].device)
    return square_bins(*mine or [none], of=grads.where.structure.values)


def global_norm(grads: Slots, factor: Tensor, lay: Layout, env: Env) -> Tensor:
    """The norm of factor * grads over the whole tree, for a gradient that was rewritten since the mean; one
    collective.
    """

    def exact(grads: Slots, factor: Tensor) -> Tensor:
        bins, _ = sum_and_compare([_norm_bins(grads, lay, env)], lay.batch, env.mesh)
        return torch.where(bins[0] == 0, norm_of(bins, folds(grads.buffers[0].dtype)) * factor, torch.inf)

    def formula(grads: Slots, factor: Tensor) -> Tensor:
        squares = _squares(grads, env)
        return torch.where(squares.isfinite(), root(squares) * factor, torch.inf)

    norm: Tensor = straight(exact, formula, grads, factor) if env.differentiable else exact(grads, factor)
    return norm


def _place_of(bad: Tensor, lay: Layout, env: Env) -> Tensor:
    index, size = env.mesh.rank(lay.batch)
    table = torch.zeros(size, len(bad), dtype=torch.int64, device=bad.device)
    table[index] = bad
    return table.view(-1)


def _first_bad(flat: Tensor, leaves: int) -> Tensor:
    """[leaf, rank] of the first non-finite leaf, [-1, -1] where there is none."""
    table = flat.view(-1, leaves) > 0
    leaf = table.any(0).byte().argmax()
    rank = table[:, leaf].byte().argmax()
    return torch.where(table.any(), torch.stack([leaf, rank]), -1)


def _partial(lay: Layout) -> str:
    axes = [a for a in lay.batch if a in lay.unreduced]
    return (
        f"the gradient is still a partial sum over mesh axes {axes}; put all_reduce({axes[0]!r}) or shard({axes[0]!r},"
        " ...) before it"
    )


def value(g: Grad, name: str) -> Grad:
    """g as a value that a nonlinear transform may read: the mean is inserted here, once."""
    if g.layout.applied:
        raise refuse(
            g,
            name,
            "the update is already applied; put it further left, inside the bracket and before the last optimizer",
        )
    if g.layout.unreduced:
        raise refuse(g, name, _partial(g.layout))
    return g if g.layout.mean else mean(g)


def pointwise(name: str, fn: Callable[[Tensor, Tensor], Tensor]) -> Transform:
    """A nonlinear transform that rewrites gradients value by value: fn(grads, factor) -> grads; zero must stay zero."""

    def transform(g: Grad) -> Grad:
        g = value(g, name)

        def rewrite(out: Value, state: State) -> tuple[Value, State]:
            if not g.env.differentiable:
                return rewritten(out, out.grads.map(lambda b: fn(b, out.factor.to(b.dtype)))), state
            factor = Varied(out.grads.where, g.env.mesh, out.factor)
            leaves = {i: fn(x, factor.of(i).to(x.dtype)) for i, x in out.grads.present().items()}
            return rewritten(out, pack(out.grads.where, leaves, out.grads)), state

        return after(g, name, g.layout, rewrite)

    transform.__name__ = name
    return transform


def with_factor(out: Value, env: Env) -> dict[int, Tensor]:
    """The gradient's leaves by number, multiplied by the factor, as this rank's part of each must meet it."""
    varied = Varied(out.grads.where, env.mesh, out.factor) if env.differentiable else None
    factors = {i: out.factor if varied is None else varied.of(i) for i in out.grads.present()}
    return {i: x * factors[i].to(x.dtype) for i, x in out.grads.present().items()}


def rewritten(out: Value, grads: Slots) -> Value:
    """A value with other gradients: their factor is one and their norm unknown."""
    logs = out.logs if out.norm is None else {"grad_norm": out.norm, **out.logs}
    return out._replace(grads=grads, factor=torch.ones_like(out.factor), norm=None, logs=logs)
