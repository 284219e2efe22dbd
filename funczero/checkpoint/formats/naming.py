"""From the paths in a saved dict to the names of a checkpoint: parameters, moments by leaf, a model's own state."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.formats.leaf import Found, Leaf, refuse_twice
from funczero.checkpoint.names import escape
from funczero.transforms.model_state import MODEL

# what torch's optimizers call a leaf's state -> what the optimizers here call it
FIELDS = {"exp_avg": "mu", "exp_avg_sq": "nu", "momentum_buffer": "trace", "sum": "nu"}
# the optimizer that keeps just these
OWNERS = {("exp_avg", "exp_avg_sq"): "adamw", ("exp_avg",): "lion", ("momentum_buffer",): "sgd", ("sum",): "adagrad"}
HEADS = ("model", "module", "state_dict", "model_state_dict", "app")  # under which programs put a state_dict


class Taken(NamedTuple):
    """What is to be taken of a source, and how."""

    moments: bool = True
    optimizer: str | None = None  # the transform that the moments are for; None: by what there is
    buffers: str | None = None  # a regex: which leaves are the model's own state, and no parameters


def by_path(items: Iterable[tuple[tuple[str, ...], Any]], want: Taken, file: str) -> Found:
    """Leaves at paths, as a state_dict, or a dict of one with an optimizer's by name, has them.

    Raises:
      CheckpointError: there is no tensor, or moments that no optimizer here keeps.
    """
    weights: dict[tuple[str, ...], Leaf] = {}
    kept: dict[tuple[str, str], Any] = {}  # (leaf, field) -> value
    notes = []
    for path, x in items:
        if (at := _optimizer(path)) is not None:
            if at:
                kept[at] = x
        elif isinstance(x, Leaf):
            weights[path] = x
        else:
            notes.append("/".join(path))
    while weights and len(heads := {p[0] for p in weights}) == 1 and heads <= set(HEADS) and min(map(len, weights)) > 1:
        weights = {p[1:]: x for p, x in weights.items()}
    if not weights:
        raise CheckpointError(f"import: {file!r} holds no tensor of a model; give a state_dict, or a dict with one")
    leaves: dict[str, Leaf] = {}
    ties: dict[str, str] = {}
    places: dict[Any, str] = {}
    for path, x in weights.items():
        name = named(".".join(path), x, want)
        refuse_twice(ties if name in ties else leaves, name, file)
        first = name if x.at is None else places.setdefault(x.at, name)
        if first == name or not (first.startswith("params/") and name.startswith("params/")):
            leaves[name] = x
        else:
            ties[name] = first
    told = [f"left out, being no tensors: {', '.join(notes[:5])}{', ...' * (len(notes) > 5)}"] * bool(notes)
    numbered = {leaf for leaf, _ in kept if leaf.isdigit()}
    if numbered and want.moments:
        told.append("the optimizer's state is by number, not by leaf, and was left out")
    kept = {at: x for at, x in kept.items() if at[0] not in numbered}
    more, count = moments(kept, leaves, want, file) if want.moments else ({}, 0)
    return Found({**leaves, **more}, ties, count, count, notes=tuple(told))


def named(key: str, x: Leaf, want: Taken) -> str:
    """The name of a leaf by its key in a state_dict: what is not floating is no parameter, but the model's own."""
    own = not x.dtype.is_floating_point or want.buffers is not None and re.search(want.buffers, key)
    return f"{MODEL}/values/{escape(key)}" if own else f"params/{escape(key)}"


def _optimizer(path: tuple[str, ...]) -> tuple[str, str] | tuple[()] | None:
    """(leaf, field) of an optimizer's state, () of its groups, None of another path."""
    if path[0] in ("param_groups",) or len(path) > 1 and path[1] == "param_groups":
        return ()
    if len(path) > 1 and (path[0] == "state" or path[0].startswith("optim") and path[1] == "state"):
        rest = path[path.index("state") + 1 :]
        return (".".join(rest[:-1]), rest[-1]) if len(rest) > 1 else ()
    flat = re.match(r"(?:optim\w*\.)?(state|param_groups)\.(.+)\.(\w+)$", path[0]) if len(path) == 1 else None
    return None if flat is None else () if flat[1] == "param_groups" else (flat[2], flat[3])


def moments(
    kept: dict[tuple[str, str], Any], leaves: dict[str, Leaf], want: Taken, file: str
) -> tuple[dict[str, Leaf], int]:
    """An optimizer's state by leaf as one of the optimizers here keeps it, and the number of its updates.

    Raises:
      CheckpointError: it is none of theirs, or its leaves were updated so many times and others not.
    """
    fields = tuple(sorted({f for _, f in kept} - {"step"}))
    if not fields:
        return {}, 0
    head = want.optimizer or OWNERS.get(fields)
    if head is None or any(f not in FIELDS for f in fields):
        raise CheckpointError(
            f"import: the optimizer in {file!r} keeps {', '.join(map(repr, fields))[:200]} for a leaf, as none here"
            " does; leave its state out with --without-moments"
        )
    out: dict[str, Leaf] = {}
    counts: dict[int, str] = {}
    for (key, field), x in kept.items():
        name = f"params/{escape(key)}"
        if name not in leaves:
            raise CheckpointError(f"import: {file!r} has {field!r} of {key[:200]!r}, which is no leaf of its model")
        if field == "step":
            counts.setdefault(int(x.read().item()) if isinstance(x, Leaf) else int(x), key)
        elif not isinstance(x, Leaf) or x.shape != leaves[name].shape:
            raise CheckpointError(f"import: {field!r} of {key[:200]!r} in {file!r} has not the shape of its leaf")
        else:
            out[f"{escape(head)}/{FIELDS[field]}/{escape(key)}"] = x
    if len(counts) > 1:
        (a, first), (b, second) = list(counts.items())[:2]
        raise CheckpointError(
            f"import: {file!r} updated {first!r} {a} times and {second!r} {b} times, but an optimizer here has one"
            " count; leave its state out with --without-moments"
        )
    return out, next(iter(counts), 0)
