"""A state handed to another step in memory: another stage, mesh, cut or set of units, as a restore would, without a
disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from absl import logging
from torch import Tensor

from funczero.checkpoint import terms
from funczero.checkpoint.layout import Box, Deal, deal
from funczero.checkpoint.names import Part, is_rate, listed, named
from funczero.checkpoint.preparing import coords_of
from funczero.checkpoint.target import roomy, template, views_of
from funczero.comm.integers import sum_integers
from funczero.core.number import dtype_name
from funczero.core.types import TrainState
from funczero.layout.mesh import Mesh
from funczero.step.step import Step

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def reshard(state: TrainState, step: Step) -> TrainState:
    """A state of another step over the same parameters as a state of this one; a collective of all ranks of the world.

    Law: every leaf that both steps have keeps its bits, so that a run which goes on here has the bits it would have
    had. The rates are those that `step` was built with. What only `step` has, as the moments of another optimizer,
    begins as in `step.init`, and what only `state` has is left behind; both are said, and so are rates that differ.
    Each leaf is whole on every rank for a moment, as integers of 8 bytes a value.

    Args:
      state: any step's; it stays as it is.
      step: where it goes on.

    Raises:
      TypeError, ValueError: it is no state, was donated, holds an open window of micro-batches, or has other parameters
        or dtypes.

    >>> import funczero as fz
    >>> grad = fz.value_and_grad(lambda p, b: ((p["w"] * b).sum(), b.sum()), batch=fz.P("data"))
    >>> one, three = (fz.train_step(*fz.zero(grad, fz.adamw(0.1), stage=s), mesh={"data": 1}) for s in (1, 3))
    >>> state, _ = one(one.init({"w": torch.ones(3)}), torch.ones(2, 3))
    >>> state, _ = three(fz.reshard(state, three), torch.ones(2, 3))
    >>> int(state.step), int(state.updates)
    (2, 2)
    """
    _check(state)
    mesh, structure = step.live_mesh, state.params.where.structure
    rank, ranks = mesh.rank(tuple(mesh.axes))[0], _coords(state, step.live_mesh)
    shapes = [torch.empty(x.shape, dtype=state.params.buffers[0].dtype, device="meta") for x in structure.leaves]
    like, _ = template(step, structure.unflatten(shapes))
    new = roomy(like, mesh.device)
    have, want, said = (named(x, rank, len(ranks)).parts for x in (state, new, like))
    views = {} if new.views is None or new.views.where.memory else views_of(new.views, want)
    moved = {n: p for n, p in want.items() if n in have and not is_rate(n, p)}
    _compare(moved, have)
    share = deal({n: have[n] for n in moved}, ranks, rank)
    missing = [n for n in want if n not in have and not is_rate(n, want[n])]
    whole: dict[str, Tensor] = {}
    for name, part in moved.items():
        x = _joined(name, have[name], share, rank, mesh)
        _fill(part, x)
        if name in views:
            _fill(views[name], x)
        if missing and name.partition("/")[0] == "params":
            whole[name] = x
    for name in (n for n in want if n not in moved and n not in missing):
        _fill(want[name], said[name].value)
    if missing:
        _renew(new, want, missing, step.init(_tree(state, have, whole), int(state.key)), rank, len(ranks))
    if rank == 0:
        _tell(have, want, said, missing)
    return step.fits.settled(new)


def _check(state: Any) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(
            f"reshard: it takes a TrainState, but this is a {type(state).__name__}; give what a step returned"
        )
    if int(state.step) < 0:
        raise ValueError(
            "reshard: this state was donated and its memory is in use; give the state that the step returned"
        )
    for name, own in state.chain.items():
        if getattr(own, "partial", ()):
            raise ValueError(
                f"reshard: {name!r} holds an open window of micro-batches, which lies as the step that took them cuts "
                "it; close it first with step(state, None)"
            )


def _coords(state: TrainState, mesh: Mesh) -> list[Mapping[str, tuple[int, int]]]:
    """Every rank's coordinates in the state, by its place in the mesh."""
    rank, size = mesh.rank(tuple(mesh.axes))
    mine = coords_of(state)
    axes = sorted(mine)
    table = torch.zeros(size, 1 + len(axes), dtype=torch.int64, device=mesh.device)
    table[rank] = torch.tensor([1, *(mine[a][1] for a in axes)])
    rows = sum_integers(table.view(-1), tuple(mesh.axes), mesh).view(size, -1).tolist()
    for axis in axes:
        n = mine[axis][0]
        if n > size or size % n:
            raise ValueError(
                f"reshard: the state is cut over {axis}={n}, but the step runs on {mesh}; hand it over in the world "
                "that made it, or save it and restore it there"
            )
    return [{a: (mine[a][0], i) for a, i in zip(axes, row[1:], strict=True)} for row in rows]


def _compare(moved: dict[str, Part], have: dict[str, Part]) -> None:
    for name, part in moved.items():
        old = have[name]
        if part.shape != old.shape and not terms.folds(part, old.shape):
            raise ValueError(
                f"reshard: {name!r} has shape {old.shape} in the state and {part.shape} in the step; give a step over "
                "the same parameters"
            )
        if part.value.dtype != old.value.dtype:
            here, there = dtype_name(part.value.dtype), dtype_name(old.value.dtype)
            raise ValueError(
                f"reshard: {name!r} is {there} in the state and {here} in the step, and bits would be lost or made "
                f"up; build the step with policy='params={there},...'"
            )


def _joined(name: str, part: Part, share: Deal, rank: int, mesh: Mesh) -> Tensor:
    """A leaf whole on every rank, bit for bit: each value comes from one rank, and the others add zeros."""
    x = part.value
    kind = INTEGERS[x.element_size()]
    total = torch.zeros(part.shape, dtype=torch.int64, device=mesh.device)
    for piece in share.pieces:
        if piece.name == name and piece.holder == rank:
            values = x[piece.box.slices(part.start)].contiguous().view(kind)
            total[piece.box.slices()] = values.to(mesh.device, torch.int64)
    if mesh.sizes() and total.numel():
        total = sum_integers(total.view(-1), tuple(mesh.axes), mesh).view(part.shape)
    return total.to(kind).view(x.dtype)


def _fill(part: Part, whole: Tensor) -> None:
    if terms.folds(part, tuple(whole.shape)):
        return terms.fold(part, whole[terms.source_box(part, tuple(whole.shape)).slices()])
    for x in (part.value, *part.also):
        x.copy_(whole[Box(part.start, tuple(x.shape)).slices()])


def _tree(state: TrainState, have: dict[str, Part], whole: dict[str, Tensor]) -> Any:
    """The whole parameters as the tree that was given to init."""
    structure = state.params.where.structure
    leaves: list[Any] = [None] * len(structure.leaves)
    for name, x in whole.items():
        leaves[have[name].leaf] = x
    return structure.unflatten(leaves)


def _tell(have: dict[str, Part], want: dict[str, Part], said: dict[str, Part], missing: list[str]) -> None:
    """What is not handed over as it is: moments of leaves and optimizers that one side lacks, and rates that differ."""
    lost = [n for n in have if n not in want and not is_rate(n, have[n])]
    if lost:
        logging.warning("reshard: this step has no place for %s, which is left behind", listed(lost))
    if missing:
        logging.warning("reshard: the state has no %s, which begins as in step.init", listed(missing))
    for name in (n for n in want if is_rate(n, want[n]) and n in have):
        old, new = float(have[name].value), float(said[name].value)
        if old == old and new == new and old != new:
            logging.warning("reshard: %r is %g in the state and %g in the step, which counts", name, old, new)


def _renew(new: TrainState, want: dict[str, Part], missing: list[str], fresh: TrainState, rank: int, size: int) -> None:
    """What the old state does not have, as a first state of these very parameters has it."""
    parts = named(fresh, rank, size).parts
    for name in missing:
        for x, y in zip((want[name].value, *want[name].also), (parts[name].value, *parts[name].also), strict=True):
            x.copy_(y)
