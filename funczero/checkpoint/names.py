"""What a checkpoint calls every leaf of a state. No stage, bracket, mesh or tuple index is in a name, so the same run
has the same names everywhere.

`step`, `updates`, `key`; `params/<path>`; `<transform>/<field>/<path>`, as `adamw/mu/blocks/0/w`, `adamw/rates/lr` and
`scale_loss/scale`; `views/<path>` where views remember what was sent. Parts of a path are joined by "/" in manifests
and messages, by "." in the arrays' store and in exported files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funczero.core import tree
from funczero.core.types import TrainState
from funczero.layout.slots import Slots
from funczero.layout.structure import Structure
from funczero.layout.where import Where
from funczero.transforms.accumulate import Accumulate
from funczero.transforms.exact import ExactSums, filled
from funczero.transforms.model_state import MODEL, ModelState

LONGEST = 2048  # characters of a name


class Part(NamedTuple):
    """This rank's part of one leaf."""

    value: Tensor  # a restore fills it in place
    shape: tuple[int, ...]  # of the whole leaf
    start: tuple[int, ...]  # of the part in it
    # the place whose cuts this leaf has; None: every rank holds the whole, or with `own` a row
    where: Where | None = None
    leaf: int = -1  # its number there
    own: bool = False  # does dim 0 count the ranks, so that each holds its row?
    first: bool = False  # does rank 0 alone hold it, and know of it?
    also: tuple[Tensor, ...] = ()  # the same values once more, where a tie is kept apart in memory


class Names(NamedTuple):
    """A state by name, and the names that tied leaves are also known by."""

    parts: dict[str, Part]
    ties: dict[str, str]  # another path of params -> the one that is stored


def escape(key: Any) -> str:
    """One part of a path as it is written: "/", a backslash, ".." and what does not print as %XX.

    >>> escape("a/b"), escape(0), escape("layers.0.weight"), escape(""), escape("..")
    ('a%2Fb', '0', 'layers.0.weight', '%', '%2E%2E')
    """
    if str(key) == "..":
        return "%2E%2E"
    return re.sub(r"[%/\\\x00-\x1f\x7f\ud800-\udfff]", lambda m: f"%{ord(m[0]):02X}", str(key)) or "%"


def unescape(part: str) -> str:
    """What `escape` was given.

    >>> unescape(escape("a/B%C")), unescape("%")
    ('a/B%C', '')
    """
    return re.sub(r"%(D[89A-F][0-9A-F]{2}|[0-9A-F]{2})", lambda m: chr(int(m[1], 16)), part) if part != "%" else ""


def is_rate(name: str, part: Part | None = None) -> bool:
    """Is this a learning rate, weight decay or beta that an optimizer keeps: `adamw/rates/lr`?"""
    pieces = name.split("/")
    return (
        len(pieces) > 2
        and pieces[1] == "rates"
        and pieces[0] != "params"
        and (part is None or part.shape == () and part.value.dtype == torch.float64)
    )


def state_dict_key(name: str) -> str:
    """The key in a state_dict of a parameter, or of a leaf of the model's own state: parts by dots, escapes undone.

    >>> state_dict_key("params/blocks/0/w"), state_dict_key("params/layers.0.weight")
    ('blocks.0.w', 'layers.0.weight')
    >>> state_dict_key("model_state/values/norm.running_mean")
    'norm.running_mean'
    """
    parts = name.removeprefix(f"{MODEL}/").split("/")
    return ".".join(map(unescape, parts[1:]))


def listed(names: Sequence[str]) -> str:
    """Some names, as a message has them."""
    short = [n if len(n) < 100 else f"{n[:80]}... of {len(n)} characters" for n in names[:5]]
    return ", ".join(map(repr, short)) + f" and {len(names) - 5} more" * (len(names) > 5)


def stored(name: str) -> str:
    """A name as the store of arrays has it."""
    return name.replace("/", ".")


def named(state: TrainState, rank: int = 0, size: int = 1) -> Names:
    """Every leaf of a state by its name on disk, in a fixed order.

    Raises:
      ValueError: two leaves have the same name.
      TypeError: a leaf is no tensor, or is cut in a way that nothing tells.
    """
    parts: dict[str, Part] = {}
    masters: Slots = state.params
    for field in ("step", "updates", "key"):
        parts[field] = whole(getattr(state, field))
    _add(parts, ("params",), masters, masters)
    if state.views is not None and state.views.where.memory:
        _add(parts, ("views",), state.views, masters)
    for transform, own in state.chain.items():
        if isinstance(own, Accumulate):
            _window(parts, escape(transform), own, rank, size)
        else:  # these are whole, also where their tree and shapes happen to be those of parameters
            own_form = isinstance(own, (ModelState, ExactSums))
            _add(parts, (escape(transform),), own, None if own_form else masters)
    refuse_collisions(list(parts))
    paths = _paths(masters.where.structure)
    first = {i: p for p, i in reversed(paths)}
    return Names(parts, {"/".join(("params", *p)): "/".join(("params", *first[i])) for p, i in paths if p != first[i]})


def whole(x: Tensor) -> Part:
    """What every rank holds alike."""
    return Part(x, tuple(x.shape), (0,) * x.dim())


def _add(parts: dict[str, Part], path: tuple[str, ...], node: Any, masters: Slots | None) -> None:
    """The leaves below a node of the state."""
    if node is None:
        return
    if isinstance(node, Slots):
        return _mirror(parts, path, [() if x is None else (x,) for x in node.leaves()], node.where)
    # an optimizer of all leaves keeps them whole on every rank
    for where in () if masters is None else (masters.where, Where.whole(masters.where.structure)):
        if (values := _mirrored(node, where)) is not None:
            return _mirror(parts, path, values, where)
    if isinstance(node, Tensor):
        _put(parts, path, whole(node))
        return
    children = _children(node)
    if children is None:
        raise TypeError(
            f"checkpoint: {'/'.join(path)!r} of the state is a {type(node).__name__}; every leaf of a state is a tensor"
        )
    for key, child in children:
        _add(parts, (*path, escape(key)), child, masters)


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, dict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, (list, tuple)) else None


def _mirrored(node: Any, where: Where) -> list[tuple[Tensor, ...]] | None:
    """By leaf number the tensors of a tree that is shaped like the parameters, as a lifted optimizer keeps them;
    None for another tree.
    """
    structure, slots = where.structure, where.slots
    flat, treedef = tree.flatten(node)
    if treedef != structure.treedef or not all(isinstance(x, Tensor) for x in flat):
        return None
    values: list[tuple[Tensor, ...]] = [()] * len(structure.leaves)
    for place, x in zip(structure.places, flat, strict=True):
        if not structure.frozen(place):
            if tuple(x.shape) == (0,) != slots[place].shape:  # another optimizer has it
                continue
            if tuple(x.shape) != slots[place].shape:
                return None
            values[place] += (x,)
    return values


def _mirror(parts: dict[str, Part], path: tuple[str, ...], values: Sequence[tuple[Tensor, ...]], where: Where) -> None:
    seen: set[int] = set()
    for below, i in _paths(where.structure):
        if i not in seen and values[i]:
            seen.add(i)
            lead = [(1,) * len(where.terms), tuple(n for _, n, _ in where.terms), tuple(q for _, _, q in where.terms)]
            first, *others = (x.view((*lead[0], *x.shape)) for x in values[i])
            shape, start = (*lead[1], *where.structure.leaves[i].shape), (*lead[2], *where.slots[i].start)
            _put(parts, (*path, *below), Part(first, shape, start, where, i, also=tuple(others)))


def _paths(structure: Structure) -> list[tuple[tuple[str, ...], int]]:
    """Every path of the parameters in order, with the number of the leaf that stands there."""
    memo = structure.memo
    if "checkpoint paths" not in memo:
        found = pytree.tree_flatten_with_path(structure.unflatten(range(len(structure.leaves))))[0]
        memo["checkpoint paths"] = [(tuple(escape(tree.path_name((k,))) for k in path), i) for path, i in found]
    return memo["checkpoint paths"]


def _window(parts: dict[str, Part], name: str, own: Accumulate, rank: int, size: int) -> None:
    """A streaming accumulate in mid-window: partial sums that each rank has for itself, as rows of arrays with a row
    a rank.
    """
    _put(parts, (name, "count"), whole(own.count))
    for i, partial in enumerate(own.partial):
        for j, x in enumerate(tree.tensors(filled(partial))):
            _put(
                parts,
                (name, "partial", str(i), str(j)),
                Part(x[None], (size, *x.shape), (rank,) + (0,) * x.dim(), own=True),
            )


def _put(parts: dict[str, Part], path: tuple[str, ...], part: Part) -> None:
    name = "/".join(path)
    if name in parts:
        raise ValueError(_collision(name, name))
    parts[name] = part


def refuse_collisions(names: list[str]) -> None:
    """ValueError where two names would be one in the store, one is a leaf and a folder, or one is longer than a
    reader takes.
    """
    if long := next((n for n in names if len(n) > LONGEST), None):
        raise ValueError(
            f"checkpoint: the leaf {long[:60] + '...'!r} has a name of {len(long)} characters, more than {LONGEST};"
            " rename a key"
        )
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(stored(name), name)
        if other != name:
            raise ValueError(_collision(other, name))
    inner = {name[:i] for name in names for i, c in enumerate(name) if c == "/"}
    for name in names:
        if name in inner:
            raise ValueError(
                f"checkpoint: {name!r} is a leaf, and other leaves' names begin with it; rename one of them"
            )


def _collision(a: str, b: str) -> str:
    return (
        f"checkpoint: two leaves would both be stored as {stored(a)!r} ({a!r} and {b!r}); rename a key of the"
        " parameters, or a transform"
    )
