"""From disk into a state of any world, mesh, stage and policy: each rank reads the ranges that it holds, and shapes
never come from disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funczero.checkpoint import client, names
from funczero.checkpoint.arrays import Array, CheckpointError, Reader, dtype_name, nbytes, room, torch_dtype
from funczero.checkpoint.layout import Box
from funczero.checkpoint.manifest import ARRAYS, FILE, Manifest
from funczero.checkpoint.names import Part, named
from funczero.core import tree
from funczero.core.types import Sum, TrainState
from funczero.layout.lazy import Fill
from funczero.layout.place import DEVICE, Place
from funczero.layout.slots import Slots
from funczero.layout.where import Where
from funczero.transforms.accumulate import Accumulate


class Want(NamedTuple):
    """What a restore asks for."""

    strict: bool = True
    only: tuple[str, ...] = ()  # regexes on names; others stay as they are in `like`
    rename: tuple[tuple[str, str], ...] = ()  # (regex, replacement) from the state's names to the checkpoint's


class Context(NamedTuple):
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


def fill(
    path: Path, manifest: Manifest, like: TrainState, fresh: Callable[[], TrainState], want: Want, context: Context
) -> tuple[TrainState, list[str]]:
    """A new state of the form of `like` with what a checkpoint holds, of `fresh()` with what it does not, and notes on
    what was not taken as it is.

    Raises:
      CheckpointError: a name is missing, a shape or a kind of dtype differs, an array is damaged.
    """
    notes: list[str] = []
    state, dropped = _windows(like if context.donated else roomy(like, context.device), manifest, context, notes)
    everything = named(state, context.rank, context.size).parts
    asked = {
        n: p
        for n, p in everything.items()
        if n not in dropped and (not want.only or any(re.search(regex, n) for regex in want.only))
    }
    if want.only and not asked:
        raise CheckpointError(
            f"restore: no leaf's name matches {list(want.only)}; names begin with {_heads(everything)}"
        )
    # keys with dots, as modules and exported files have them, are paths, too
    known = {names.stored(n): n for n in manifest.arrays}
    source = {name: _source(name, manifest, known, want.rename) for name in asked}
    rates = Rates(
        like, {n: p for n, p in asked.items() if names.is_rate(n, p)}, named(like, context.rank, context.size).parts
    )
    parts = _present(
        {n: p for n, p in asked.items() if n not in rates.parts or source[n] in manifest.arrays},
        source,
        manifest,
        want,
        notes,
    )
    if want.strict and not want.only:
        _refuse_strangers(source, manifest, notes)
    cast: dict[tuple[str, str], int] = {}
    for name, part in parts.items():
        _check(name, part, manifest.arrays[source[name]], cast)
    views = {} if state.views is None else views_of(state.views, everything)
    if not context.donated:
        _keep(everything, views, {*parts, *rates.parts}, dropped, fresh, context)
    reader = Reader(path / ARRAYS, manifest.arrays)
    for name, part in [*parts.items(), *((n, v) for n, v in views.items() if n in parts)]:
        _read(reader, source[name], manifest.arrays[source[name]], part)
    reader.finish()
    notes += rates.settled(set(parts))
    notes += [f"{n} leaves were cast from {a} to {b}, as the policy says" for (a, b), n in cast.items()]
    return state, notes


class Rates:
    """The rates among the leaves: what the script says of them, and what the checkpoint does.

    The checkpoint's value counts, and a script that says another is told. One that the checkpoint lacks comes from the
    script.
    """

    def __init__(self, like: TrainState, parts: dict[str, Part], given: dict[str, Part]) -> None:
        """parts: the rates that are restored; given: the leaves of `like`, whose rates are never on the meta device."""
        self.parts = parts
        self.said = {n: float(given[n].value) for n in parts}
        # later a schedule's leaf is what it last wrote, and nobody's word
        self.fresh = like.updates.is_meta or not int(like.updates)

    def settled(self, read: set[str]) -> list[str]:
        """Fill in what was not read; notes on what the script and the checkpoint do not have alike."""
        lacks, notes = [], []
        for name, part in self.parts.items():
            said = self.said[name]
            kept = float(part.value) if name in read else math.nan
            if kept != kept:  # not there, or saved before a schedule wrote it
                part.value.fill_(said)
                lacks += [f"{name} = {said!r}"] if said == said else []
            elif self.fresh and said == said and kept != said:
                notes.append(
                    f"{name!r} is {kept!r} in the checkpoint, which counts, and {said!r} in the script; write another"
                    " value into the restored state"
                )
        return [f"the checkpoint says nothing of these rates, which come from the script: {', '.join(lacks)}"] * bool(
            lacks
        ) + notes


def _keep(
    everything: dict[str, Part],
    views: dict[str, Part],
    read: set[str],
    dropped: set[str],
    fresh: Callable[[], TrainState],
    context: Context,
) -> None:
    """What is not read stays as it is in a fresh state, or in the one that was given."""
    left = [n for n in everything if n not in read and n not in dropped and "/partial/" not in n]
    if left:
        given = fresh()
        parts = named(given, context.rank, context.size).parts
        others = {} if given.views is None else views_of(given.views, parts)
        for mine, theirs in ((everything, parts), (views, others)):
            for n in (n for n in left if n in mine):
                for x in (mine[n].value, *mine[n].also):
                    x.copy_(theirs[n].value)


def load_client(path: Path, manifest: Manifest) -> Any:
    """The client state of a checkpoint."""
    reader, made = Reader(path / ARRAYS, manifest.arrays), dict[str, Tensor]()
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


def ask_whole(reader: Reader, name: str, array: Array, into: dict[str, Tensor]) -> None:
    """Ask for a whole array, which will be in `into`."""

    def made() -> Tensor:
        try:
            return torch.empty(array.shape, dtype=torch_dtype(array.dtype))
        except RuntimeError as e:
            raise CheckpointError(
                f"restore: there is no memory for leaf {name!r} of shape {list(array.shape)}"
                f" ({str(e).splitlines()[0][:200]})"
            ) from None

    reader.ask(name, Box((0,) * len(array.shape), array.shape), made, lambda x: into.update({name: x}))


def _read(reader: Reader, name: str, array: Array, part: Part) -> None:
    """Ask for a part; where it lies elsewhere or in another dtype it is copied when the bytes are there."""
    x, box = part.value, Box(part.start, tuple(part.value.shape))
    direct = x.device.type == "cpu" and x.is_contiguous() and dtype_name(x.dtype) == array.dtype
    copies = part.also if direct else (x, *part.also)
    reader.ask(
        name,
        box,
        (lambda: x) if direct else (lambda: torch.empty(box.shape, dtype=torch_dtype(array.dtype))),
        lambda read: [c.copy_(read) for c in copies],
    )


def _source(name: str, manifest: Manifest, known: dict[str, str], rename: Sequence[tuple[str, str]]) -> str:
    """The name under which a leaf is stored."""
    for regex, replacement in rename:
        name = re.sub(regex, replacement, name)
    if names.stored(name) in known:
        return known[names.stored(name)]
    pieces = name.split("/")
    for k in range(1, len(pieces)):  # a tied leaf, and its moments, are stored under its first path
        tied = manifest.ties.get("/".join(("params", *pieces[k:])))
        if tied is not None and (other := "/".join((*pieces[:k], *tied.split("/")[1:]))) in manifest.arrays:
            return other
    return name


def _present(
    parts: dict[str, Part], source: dict[str, str], manifest: Manifest, want: Want, notes: list[str]
) -> dict[str, Part]:
    """The parts that the checkpoint has. A transform that it knows nothing of starts fresh, half of one is an error."""
    missing = [name for name in parts if source[name] not in manifest.arrays]
    by_head: dict[str, list[str]] = {}
    for name in missing:
        by_head.setdefault(name.split("/")[0], []).append(name)
    for head, lost in by_head.items():
        known = any(n == head or n.startswith(head + "/") for n in manifest.arrays)
        if not known and head != "params":
            notes.append(f"the checkpoint holds nothing of {head!r}, which starts fresh")
        elif want.strict:
            raise CheckpointError(
                f"restore: the checkpoint has no {names.listed(lost)}; it holds names that begin with"
                f" {_heads(manifest.arrays)}; rename=[(regex, replacement)] maps names, strict=False leaves these as"
                " they are"
            )
        else:
            notes.append(f"{len(lost)} leaves are not in the checkpoint and stay as they were: {names.listed(lost)}")
    return {name: part for name, part in parts.items() if source[name] in manifest.arrays}


def _refuse_strangers(source: dict[str, str], manifest: Manifest, notes: list[str]) -> None:
    """Parameters that the state has no place for are an error; a transform that the chain no longer has is told."""
    used = set(source.values())
    heads = {name.split("/")[0] for name in used}
    left = [
        n
        for n in manifest.arrays
        if n not in used
        and not n.startswith("client/")
        and n != "client"
        and not re.match(r"[^/]+/(partial/|count$)", n)
    ]
    rates = [n for n in left if names.is_rate(n) and n.split("/")[0] in heads]
    notes += [
        f"the script has no place for these rates of the checkpoint, which were left out: {names.listed(rates)}"
    ] * bool(rates)
    left = [n for n in left if n not in rates]
    by_head: dict[str, list[str]] = {}
    for n in left:
        by_head.setdefault(n.split("/")[0], []).append(n)
    for head, mine in sorted(by_head.items()):
        if head in heads:
            raise CheckpointError(
                f"restore: the checkpoint also holds {names.listed(mine)}, for which the state has no place; restore"
                " with strict=False to leave them out"
            )
    out = sorted(by_head)
    notes += [f"{head!r} of the checkpoint is not in this chain and was left out" for head in out[:8]]
    notes += [f"nor are {len(out) - 8} more transforms of it"] * (len(out) > 8)


def _heads(names: Any) -> list[str]:
    return sorted({"/".join(n.split("/")[:2]) for n in names})[:8]


def _check(name: str, part: Part, array: Array, cast: dict[tuple[str, str], int]) -> None:
    if part.shape != array.shape:
        raise CheckpointError(
            f"restore: {name!r} has shape {list(part.shape)} in the state and {list(array.shape)} in the checkpoint;"
            " build the state of the same model"
        )
    have, want = torch_dtype(array.dtype), part.value.dtype
    if have != want:
        if not (have.is_floating_point and want.is_floating_point):
            raise CheckpointError(
                f"restore: {name!r} is {dtype_name(want)} in the state and {array.dtype} in the checkpoint; only"
                " floating dtypes are cast"
            )
        cast[array.dtype, dtype_name(want)] = cast.get((array.dtype, dtype_name(want)), 0) + 1


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


def window(state: TrainState) -> dict[str, Any]:
    """How the partial sums of a streamed accumulate lie, as JSON, for whoever continues the window."""
    out: dict[str, Any] = {}
    for name, own in state.chain.items():
        if isinstance(own, Accumulate) and own.partial:
            out[name] = {"count": int(own.count), "partial": [_form(p) for p in own.partial]}
    return out


def _form(out: Sum) -> dict[str, Any]:
    try:
        aux = None if out.aux is None else pytree.treespec_dumps(out.aux[1])
    except Exception:  # a node type that has no name in JSON
        aux = ""
    aux = aux if aux is None or _plain(aux) else ""
    tensors = {"loss": out.loss, "weight": out.weight, "aux": None if out.aux is None else out.aux[0], "bad": out.bad}
    forms = {k: None if x is None else [dtype_name(x.dtype), list(x.shape)] for k, x in tensors.items()}
    return {
        **forms,
        "spec": aux,
        "axes": list(out.grads.where.axes),
        "grads": [[dtype_name(b.dtype), list(b.shape)] for b in out.grads.buffers],
    }


def _plain(spec: str) -> bool:
    """Can a tree's form be read without importing what it names? Enums and default factories are imported by torch;
    escapes could hide them.
    """
    return not re.search(r"__enum__|defaultdict|\\u", spec)


def _windows(state: TrainState, manifest: Manifest, context: Context, notes: list[str]) -> tuple[TrainState, set[str]]:
    """The state with empty partial sums of a window that is continued, and the counts of those that are replayed
    from their start.
    """
    chain, dropped = dict(state.chain), set()
    for name, own in state.chain.items():
        form = manifest.window.get(name) if isinstance(own, Accumulate) else None
        partial: tuple[Sum, ...] = ()
        if form is not None:
            same = context.chain is not None and (manifest.world, manifest.about.get("chain")) == (
                context.size,
                context.chain,
            )
            if same and all(p["spec"] != "" for p in form["partial"]):
                partial = _continued(form, state, context)
            else:
                dropped.add(f"{names.escape(name)}/count")
                notes.append(
                    f"{form['count']} micro-batches of an open window were left out: go on with the first one of update"
                    f" {manifest.step}; parameters have not moved"
                )
        if isinstance(own, Accumulate):
            chain[name] = Accumulate(torch.zeros(own.count.shape, dtype=own.count.dtype), partial)
    return state._replace(chain=chain), dropped


def _continued(form: dict[str, Any], state: TrainState, context: Context) -> tuple[Sum, ...]:
    try:
        return tuple(_empty(p, state, context) for p in form["partial"])
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise CheckpointError(
            f"restore: the open window in {FILE!r} has not the form that a save gives it ({type(e).__name__}: {e})"
        ) from None


def _empty(form: dict[str, Any], state: TrainState, context: Context) -> Sum:
    where: Where = state.params.where
    here = Where(where.structure, tuple((a, *context.coords[context.rank][a]) for a in form["axes"]))
    # gradients lie where a forward reads
    device = (state.params if state.views is None else state.views).buffers[0].device
    lengths = [0 if u.frozen else n for n, u in zip(here.lengths, where.structure.units, strict=True)]
    make = lambda x: None if x is None else torch.zeros(x[1], dtype=torch_dtype(x[0]), device=device)
    scalars = [x[1] for k in ("loss", "weight", "aux", "bad") if (x := form[k]) is not None]
    if [x[1] for x in form["grads"]] not in ([[n] for n in lengths], [[n] for n in here.lengths]) or any(
        prod(x) > 1 << 24 for x in scalars
    ):
        raise CheckpointError(
            "restore: the open window's sums do not fit this model; restore without the step, and the update is"
            " replayed"
        )
    if form["aux"] is not None and not _plain(form["spec"]):
        raise ValueError("its metrics are no plain tree")
    aux = None if form["aux"] is None else (make(form["aux"]), pytree.treespec_loads(form["spec"]))
    buffers: Any = tuple(make(x) for x in form["grads"])
    loss, weight, bad = make(form["loss"]), make(form["weight"]), make(form["bad"])
    return Sum(loss, weight, aux, Slots(buffers, here), bad=bad)  # type: ignore[arg-type]
