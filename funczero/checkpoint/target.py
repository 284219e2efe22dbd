"""What is to be restored, by whom, and the state that is filled: its form without memory, and new memory for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.checkpoint.memory import nbytes, room
from funczero.checkpoint.names import Part
from funczero.core import tree
from funczero.core.types import TrainState
from funczero.layout.lazy import Fill
from funczero.layout.place import DEVICE, Place
from funczero.layout.slots import Slots


class Want(NamedTuple):
    """What a restore asks for."""

    strict: bool = True
    only: tuple[str, ...] = ()  # regexes on names; others stay as they are in `like`
    rename: tuple[tuple[str, str], ...] = ()  # (regex, replacement) from the state's names to the checkpoint's


class Restorer(NamedTuple):
    """Who restores."""

    rank: int
    size: int
    coords: list[dict[str, tuple[int, int]]]  # of all ranks
    chain: str | None  # as printed
    device: torch.device  # of a state that is built
    donated: bool = False  # may `like` itself be filled?


def template(step: Any, params: Any) -> tuple[TrainState, Callable[[], TrainState]]:
    """The form of a step's state, without memory, and how to make a fresh one for what a checkpoint does not hold."""
    made: dict[int, Fill] = {}
    empty = lambda x: made.setdefault(
        id(x), Fill(tuple(x.shape), x.dtype, partial(torch.zeros, tuple(x.shape), dtype=x.dtype))
    )
    for path, x in tree.paths(params):
        if not isinstance(x, (Tensor, Fill)):
            raise TypeError(
                f"restore: parameter {path!r} of like= is a {type(x).__name__}; give (step, params) with params a tree"
                " of tensors, meta tensors do"
            )
    shapes = tree.map(empty, params)
    fresh = lambda: step.init(shapes)
    try:
        return step.abstract(shapes), fresh
    except (NotImplementedError, RuntimeError):  # an optimizer that looks at values when it starts
        state = fresh()
        return state, lambda: state


def roomy(like: TrainState, device: torch.device) -> TrainState:
    """A state of the same form in new memory, every part in its place, its values still to be filled in; padding is
    zero.
    """

    def new(x: Any, place: Place = DEVICE) -> Any:
        if isinstance(x, Slots):
            buffers = tuple(new(b, x.where.place) for b in x.buffers)
            for buffer, gap in zip(buffers, x.where.gaps, strict=True):
                if gap:
                    buffer.zero_()
            return Slots(buffers, x.where)
        if not isinstance(x, Tensor):
            return x
        own = device if x.is_meta else x.device
        if place != DEVICE:
            return place.empty(x.numel(), x.dtype, own).view(x.shape)
        if own.type != "cpu" or nbytes(x) < 4 << 20:
            return torch.empty_like(x, device=own)
        return room(nbytes(x)).view(x.dtype).view(x.shape)

    return tree.map(new, like, is_leaf=lambda x: isinstance(x, Slots))


def views_of(views: Slots, parts: dict[str, Part]) -> dict[str, Part]:
    """Wider copies of the masters: the same leaves, other ranges."""
    leaves, slots = views.leaves(), views.where.slots
    out = {}
    for name, part in parts.items():
        if name == "params" or name.startswith("params/"):
            x = leaves[part.leaf]
            assert x is not None
            out[name] = part._replace(value=x, start=slots[part.leaf].start, where=views.where)
    return out
