"""From disk into a state of any world, mesh, stage and policy: each rank reads the ranges that it holds, and shapes
never come from disk.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funczero.checkpoint import client, matching, names, terms, window
from funczero.checkpoint.arrays import Array
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.layout import Box
from funczero.checkpoint.manifest import ARRAYS, FILE, Manifest
from funczero.checkpoint.memory import narrowed, torch_dtype
from funczero.checkpoint.names import Part, listed, named
from funczero.checkpoint.parts import Reader
from funczero.checkpoint.reader import opened
from funczero.checkpoint.script_rates import ScriptRates
from funczero.checkpoint.target import Restorer, Want, roomy, views_of
from funczero.core.number import dtype_name
from funczero.core.types import TrainState
from funczero.step.fits import mark_used

BLOCK = 32 << 20  # bytes of a leaf that are read at a time where it is read whole


def fill(
    path: Path, manifest: Manifest, like: TrainState, fresh: Callable[[], TrainState], want: Want, restorer: Restorer
) -> tuple[TrainState, list[str]]:
    """A new state of the form of `like` with what a checkpoint holds, of `fresh()` with what it does not, and notes on
    what was not taken as it is. Where `like` itself is filled it is marked as used up, for the caller to take back.

    Raises:
      CheckpointError: a name is missing, a shape or a kind of dtype differs, an array is damaged.
    """
    notes: list[str] = []
    state, dropped = window.reopened(
        like if restorer.donated else roomy(like, restorer.device), manifest, restorer, notes
    )
    everything, ties = named(state, restorer.rank, restorer.size)
    kept = {n for n in everything if _are_views(n, state)}
    if kept and not any(_are_views(n, state) for n in manifest.arrays):
        everything, kept = {n: p for n, p in everything.items() if n not in kept}, set()
        notes.append("the checkpoint holds no views that remember what was sent, which begin as the parameters")
    asked = _asked({n: p for n, p in everything.items() if n not in dropped}, everything, want)
    source = matching.sources(asked, manifest, want.rename)
    rates = ScriptRates(
        like, {n: p for n, p in asked.items() if names.is_rate(n, p)}, named(like, restorer.rank, restorer.size).parts
    )
    sought = {n: p for n, p in asked.items() if n not in rates.parts or source[n] in manifest.arrays}
    parts = matching.present(sought, source, manifest, want.strict, notes)
    twins = matching.twins(ties, source, manifest, want.rename)
    if want.strict and not want.only:
        matching.refuse_strangers(source | twins, manifest, notes)
    casts = Counter(c for n, p in parts.items() if (c := matching.cast_of(n, p, manifest.arrays[source[n]])))
    notes += _folded(parts, source, manifest)
    views = {} if state.views is None else views_of(state.views, everything)
    views = {n: v for n, v in views.items() if n.replace("params", "views", 1) not in kept & parts.keys()}
    left = [n for n in everything if n not in {*parts, *rates.parts} | dropped and "/partial/" not in n]
    if left:
        _keep(everything, views, left, like if restorer.donated else fresh(), restorer)
    reader = opened(path / ARRAYS, manifest.arrays)
    try:
        for name, part in [*parts.items(), *((n, v) for n, v in views.items() if n in parts)]:
            _read(reader, source[name], manifest.arrays[source[name]], part)
        reader.finish()
        for second in twins:
            if ties[second] in parts:
                _compare(reader, twins[second], source[ties[second]], manifest, parts[ties[second]])
    finally:
        if restorer.donated and int(state.step) >= 0:  # until all ranks say that they have all of it
            mark_used(state, int(state.step))
    notes += rates.settled(set(parts))
    notes += [f"{n} leaves were cast from {a} to {b}, as the policy says" for (a, b), n in casts.items()]
    return state, notes


def _are_views(name: str, state: TrainState) -> bool:
    """Is this a leaf of views that remember what was sent, rather than of a transform of that name?"""
    return state.views is not None and state.views.where.memory and name.split("/")[0] == "views"


def _asked(left: dict[str, Part], everything: dict[str, Part], want: Want) -> dict[str, Part]:
    """What is asked for of the leaves that are left."""
    asked = {n: p for n, p in left.items() if not want.only or any(re.search(regex, n) for regex in want.only)}
    if want.only and not asked:
        raise CheckpointError(
            f"restore: no leaf's name matches {list(want.only)}; names begin with {matching.heads(everything)}"
        )
    return asked


def _keep(
    everything: dict[str, Part], views: dict[str, Part], left: list[str], given: TrainState, restorer: Restorer
) -> None:
    """What is not read stays as it is in a fresh state, or in the one that was given.

    Raises:
      CheckpointError: that one was donated, or an update of it has failed amid its writing.
    """
    if int(given.step) < 0:
        raise CheckpointError(
            f"restore: {listed(left)} would stay as the given state has them, but that one was donated or its update"
            " failed; restore all of it, or give like=(step, params)"
        )
    if restorer.donated:
        return
    parts = named(given, restorer.rank, restorer.size).parts
    others = {} if given.views is None else views_of(given.views, parts)
    for new, old in ((everything, parts), (views, others)):
        for n in (n for n in left if n in new):
            for x in (new[n].value, *new[n].also):
                x.copy_(old[n].value)


def _folded(parts: dict[str, Part], source: dict[str, str], manifest: Manifest) -> list[str]:
    """What is said of leaves that another number of ranks kept."""
    heads = sorted({n.split("/")[0] for n, p in parts.items() if terms.folds(p, manifest.arrays[source[n]].shape)})
    return [
        f"{h!r} was kept by another number of ranks: theirs are added, and the first one has the sum" for h in heads
    ]


def _read(reader: Reader, name: str, array: Array, part: Part) -> None:
    """Ask for a part; where it lies elsewhere or in another dtype it is copied when the bytes are there."""
    if terms.folds(part, array.shape):
        box = terms.source_box(part, array.shape)
        make = lambda: torch.empty(box.shape, dtype=torch_dtype(array.dtype))
        if not prod(box.shape):
            return terms.fold(part, make())
        return reader.ask(name, box, make, lambda read: terms.fold(part, read))
    x, box = part.value, Box(part.start, tuple(part.value.shape))
    direct = x.device.type == "cpu" and x.is_contiguous() and dtype_name(x.dtype) == array.dtype
    copies = part.also if direct else (x, *part.also)
    reader.ask(
        name,
        box,
        (lambda: x) if direct else (lambda: torch.empty(box.shape, dtype=torch_dtype(array.dtype))),
        lambda read: [c.copy_(read) for c in copies],
    )


def _compare(reader: Reader, twin: str, name: str, manifest: Manifest, part: Part) -> None:
    """Refuse a leaf that is one in the state and two in the checkpoint, where this rank's parts of them differ.

    Raises:
      CheckpointError: they do, so that one of the values would be lost.
    """
    array, box = manifest.arrays[twin], Box(part.start, tuple(part.value.shape))
    made: list[Tensor] = []
    if array.shape == part.shape:
        reader.ask(twin, box, lambda: torch.empty(box.shape, dtype=torch_dtype(array.dtype)), made.append)
        reader.finish()
    if not made or not torch.equal(made[0].to(part.value), part.value):
        raise CheckpointError(
            f"restore: {name!r} and {twin!r} are one parameter of the state, but in the checkpoint they differ; leave"
            " one of them out when it is imported (--exclude)"
        )


def load_client(path: Path, manifest: Manifest) -> Any:
    """The client state of a checkpoint."""
    reader, made = opened(path / ARRAYS, manifest.arrays), dict[str, Tensor]()
    try:
        for name in client.names(manifest.client):
            if name not in manifest.arrays:
                raise CheckpointError(
                    f"restore: the client state refers to {str(name)[:80]!r}, which is not in the checkpoint"
                )
            ask_whole(reader, name, manifest.arrays[name], made)
        reader.finish()
        return client.decode(manifest.client, made.__getitem__)
    except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as e:
        raise CheckpointError(
            f"restore: the client state in {FILE!r} has not the form that a save gives it ({type(e).__name__}:"
            f" {str(e)[:200]})"
        ) from None


def read_whole(reader: Reader, name: str, array: Array, dtype: torch.dtype) -> Tensor:
    """A whole array in a dtype, read some rows at a time: in memory are it and a constant."""
    out = _room(name, array, dtype)
    if not array.shape or not out.numel():
        found: dict[str, Tensor] = {}
        ask_whole(reader, name, array, found)
        reader.finish()
        return narrowed(found[name], dtype, name)
    kind = torch_dtype(array.dtype)
    one = out[0].numel() * kind.itemsize * array.chunk[0]  # bytes of rows that chunks hold
    step = array.chunk[0] * max(1, BLOCK // max(1, one))
    for a in range(0, array.shape[0], step):
        here, shape = out[a : a + step], (min(step, array.shape[0] - a), *array.shape[1:])
        box = Box((a,) + (0,) * (len(shape) - 1), shape)
        if kind == dtype:
            reader.ask(name, box, partial(_itself, here))
        else:
            reader.ask(name, box, partial(torch.empty, shape, dtype=kind), partial(_narrowed, here, name))
        reader.finish()  # the store holds a block's bytes a second time while it reads them
    return out


def _itself(x: Tensor) -> Tensor:
    return x


def _narrowed(into: Tensor, name: str, x: Tensor) -> None:
    into.copy_(narrowed(x, into.dtype, name))


def ask_whole(reader: Reader, name: str, array: Array, into: dict[str, Tensor]) -> None:
    """Ask for a whole array, which will be in `into`."""

    made = partial(_room, name, array, torch_dtype(array.dtype))
    reader.ask(name, Box((0,) * len(array.shape), array.shape), made, lambda x: into.update({name: x}))


def _room(name: str, array: Array, dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(array.shape, dtype=dtype)
    except RuntimeError as e:
        raise CheckpointError(
            f"restore: there is no memory for leaf {name!r} of shape {list(array.shape)}"
            f" ({str(e).splitlines()[0][:200]})"
        ) from None
