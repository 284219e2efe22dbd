"""Sums that are the same on any number of ranks: `train_step(..., sums="exact")`, where gradients add as integers.

The first sum turns gradients into integers: they travel to it as they were born, and what is sent after it are
integers. A unit is 2 ** (e - 44), where 2 ** e bounds the largest gradient of a micro-batch that the leaf had in the
last update. So every value is rounded once, alone, and no sum rounds. A value of 2 ** 46 units or more is split, and
its large part waits where the first sum left it until the mean, where all ranks hear whether there is one.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from funczero.comm import collectives
from funczero.comm.edge import Edge
from funczero.comm.exact import Grid, Tally, both, exponents_of, packed, units_of, unpacked, values_of
from funczero.core.types import Env, Layout, Seed, State, Sum
from funczero.kernels.grid.reference import BAD, HALF, OFFSET
from funczero.layout.slots import Slots

if TYPE_CHECKING:
    from funczero.layout.lazy import Lazy

KEY = "exact_sums"  # where a chain keeps the exponents
MOST = 1 << 16  # micro-batches of an update: their integers of 47 bits fit into 64
START = 64  # the shift of the first update: gradients from 2 ** -64 to 2 ** 28
KEPT = 12  # bits that a leaf's largest gradient must have, or the update is skipped


class ExactSums(NamedTuple):
    """How large the gradients of the last update were."""

    exponents: Tensor  # int64 [leaves]: 2 ** exponent bounds a micro-batch's, with a cotangent of one


def bits_of(env: Env) -> int:
    """Bits of a leaf's largest gradient: more than the dtype in which it is handed on can hold."""
    return 56 if env.policy.accumulate == torch.float64 else 44


def start(params: Lazy, env: Env) -> State:
    """The state before the first update."""
    n = len(params.structure.leaves)
    return {KEY: ExactSums(torch.full((n,), bits_of(env) - START, dtype=torch.int64, device=params.device))}


def grid_of(state: State, seed: Seed, env: Env) -> Grid | None:
    """The units of this update; None where sums are not exact."""
    if not env.exact:
        return None
    return Grid(state[KEY].exponents, bits_of(env), seed.cotangent, state["params"].where.structure)


def counted(out: Sum, grid: Grid) -> Sum:
    """A sum in integers; the same where it is one."""
    if out.tops is not None:
        return out
    tally = Tally(grid)
    return noted(out._replace(grads=tally.count_all(out.grads)), tally)


def noted(out: Sum, tally: Tally) -> Sum:
    """A sum whose gradients a tally has just turned into integers, with what it found."""
    where = out.grads.where
    return out._replace(tops=tally.tops(where.structure), high=tally.apart(where))


def added(a: Sum, b: Sum, grid: Grid, reuse: bool) -> Sum:
    """a, in integers, with the gradients of b, in integers or as born, added to it.

    Args:
      reuse: a's memory may be the result's.
    """
    if b.tops is not None:
        return summed(a, b, reuse)
    assert a.tops is not None and a.high is not None
    tally = Tally(grid)
    found = noted(b._replace(grads=tally.count_all(b.grads, a.grads if reuse else a.grads.map(torch.clone))), tally)
    assert found.tops is not None and found.high is not None
    return a._replace(grads=found.grads, tops=torch.maximum(a.tops, found.tops), high=both(a.high, found.high))


def summed(a: Sum, b: Sum, reuse: bool = False) -> Sum:
    """a with the gradients of b, both in integers; with reuse in a's memory."""
    assert a.tops is not None and a.high is not None and b.tops is not None and b.high is not None
    low = a.grads if reuse else a.grads.map(torch.clone)
    torch._foreach_add_(list(low.buffers), list(b.grads.buffers))
    return a._replace(grads=low, tops=torch.maximum(a.tops, b.tops), high=both(a.high, b.high))


def filled(out: Sum) -> Sum:
    """A sum in which every unit has large parts, zeros where it had none: of one form on every rank, for a save."""
    if out.high is None:
        return out
    return out._replace(high=_filled(out.high, {u for u, low in enumerate(out.grads.buffers) if low.numel()}))


def _filled(high: Slots, units: Collection[int]) -> Slots:
    """Large parts of these units alone, zeros where one has none."""
    have = enumerate(zip(high.buffers, high.where.lengths, strict=True))
    return Slots(
        tuple(b[:0] if u not in units else b if b.numel() else b.new_zeros(n) for u, (b, n) in have), high.where
    )


# --- places -----------------------------------------------------------------------------------------------------------
def joined(x: Slots, axes: tuple[str, ...], env: Env) -> Slots:
    """x, gathered from its innermost axes on until it is split over some of `axes` alone."""
    while not set(x.where.axes) <= set(axes):
        x = collectives.all_gather(x, x.where.axes[-1], env.mesh)
    return x


def scattered(out: Sum, edge: Edge, env: Env, grid: Grid) -> Sum:
    """A sum over one more axis, in integers, each rank keeping its part; over an axis of size 1 nothing is added, and
    what was born as floats stays so.
    """
    if out.tops is not None or env.mesh.axes[edge.axis].size == 1:
        grads, _ = collectives.reduce_scatter(out.grads, edge._replace(adds=torch.int64), env.mesh)
        return out._replace(grads=grads)
    tally = Tally(grid)
    grads, _ = collectives.reduce_scatter(out.grads, edge, env.mesh, tally=tally)
    grads = grads.map(lambda b: b if b.numel() else b.long())  # what is empty (frozen) does not travel
    return noted(out._replace(grads=grads), tally)


def _crossed(high: Slots, to: Slots, axes: tuple[str, ...], lay: Layout, env: Env) -> Slots:
    """Large parts, from where the first sum has left them to the place of the small ones."""
    high = joined(high, lay.sharded, env)
    for axis in axes:
        edge = Edge(axis, adds=torch.int64)
        if axis in lay.sharded:
            high, _ = collectives.reduce_scatter(high, edge, env.mesh)
        else:
            high, _ = collectives.all_reduce(high, edge, env.mesh)
    return reduce(lambda x, a: collectives.cut(x, a, env.mesh), to.where.axes[len(high.where.axes) :], high)


def _pending(lay: Layout, env: Env) -> tuple[str, ...]:
    """Axes that are summed after the first sum: small parts have crossed them, and large ones have not.

    Over an axis of size 1 there is no sum.
    """
    sums = [a for a, n in lay.order if a not in env.mesh.axes or n > 1]
    return tuple(a for a in sums[1:] if a in env.mesh.axes)


# --- at the mean ------------------------------------------------------------------------------------------------------
class Read(NamedTuple):
    """What all ranks' codes say of an update."""

    finite: Tensor
    fits: Tensor  # are the units neither too large nor too small for it?
    odd: Tensor  # the first leaf whose units do not fit
    new: State  # exponents
    units: list[int]  # units with large parts that have not crossed all axes


def sent(out: Sum, lay: Layout, env: Env) -> Tensor:
    """What travels of a sum's codes in the packed sum."""
    assert out.tops is not None
    return packed(out.tops, *env.mesh.rank(lay.batch))


def read(flat: Tensor, out: Sum, state: State, grid: Grid, lay: Layout, env: Env) -> Read:
    """What the codes of all ranks say."""
    structure, old = state["params"].where.structure, state[KEY].exponents
    codes = unpacked(flat, env.mesh.rank(lay.batch)[1], len(old))
    size = codes - OFFSET + grid.shifts  # the largest value is below 2 ** size units
    odd = (codes > 0) & (codes < BAD) & ((size > 2 * HALF) | (size < KEPT))
    units = [] if _at_hand(out, lay, env) else units_of(codes, structure, grid)
    new = {KEY: ExactSums(exponents_of(codes, old, grid))}
    return Read((codes < BAD).all(), ~odd.any(), odd.byte().argmax(), new, units)


def _at_hand(out: Sum, lay: Layout, env: Env) -> bool:
    """Have large parts gone the way of the small ones? The same on every rank."""
    assert out.high is not None
    return not _pending(lay, env) and out.high.where.axes == out.grads.where.axes


def values(out: Sum, grid: Grid, lay: Layout, env: Env) -> Slots:
    """The gradients of a sum, of the large parts that this rank has at hand.

    Raises:
      TypeError: a transform has made something else of the integers.
    """
    assert out.high is not None
    if any(b.numel() and b.dtype != torch.int64 for b in out.grads.buffers):
        why = "a transform left of the mean has rewritten gradients, which are integers there"
        raise TypeError(f"sums='exact': {why}; write it right of the mean (pointwise), or left of the first sum")
    high = out.high if _at_hand(out, lay, env) else out.high.map(lambda b: b[:0])
    return values_of(out.grads, high, grid, env.policy.accumulate)


def with_large(out: Sum, units: list[int], grid: Grid, lay: Layout, env: Env) -> Slots:
    """The gradients of a sum, with the large parts of all ranks in these units; a collective."""
    assert out.high is not None
    high = _crossed(_filled(out.high, units), out.grads, _pending(lay, env), lay, env)
    return values_of(out.grads, high, grid, env.policy.accumulate)


def so_far(out: Sum, grid: Grid, env: Env) -> Slots:
    """The gradients of an open window as they lie, in `policy.accumulate`; a collective."""
    full = filled(out)
    assert full.high is not None
    high = full.high
    for axis in out.grads.where.axes[len(high.where.axes) :]:
        high, _ = collectives.reduce_scatter(high, Edge(axis, adds=torch.int64), env.mesh)
    return values_of(out.grads, high, grid, env.policy.accumulate)
