"""Several optimizers in one place: which leaves each has, and a part of Slots as Slots."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import kind, shown
from funczero.core.optimizer import GradientTransformation
from funczero.core.types import Tree
from funczero.layout.slots import Slots
from funczero.layout.structure import Leaf, Structure, Unit
from funczero.layout.where import Where


class Chooser(Protocol):
    """A predicate on leaves, as fz.matrices() gives one."""

    def takes(self, leaf: Leaf) -> bool:
        """Is this leaf one of them?"""


# a regex, a predicate on paths or on leaves, or a tree of bools like the parameters
Which = str | Callable[[str], bool] | Chooser | Tree
OTHERS = Unit("(of other optimizers)", False, True)  # where a subset's structure puts the leaves that it does not hold
SUBSETS = "subsets"


class Part(NamedTuple):
    """One optimizer of a partition."""

    which: Which
    tx: GradientTransformation

    def __str__(self) -> str:
        named = str(self.which) if hasattr(self.which, "takes") else getattr(self.which, "__name__", "mask")
        which = repr(self.which) if isinstance(self.which, str) else named
        return f"{self.tx.name}({which})"


class Partition(NamedTuple):
    """Optimizers that share the leaves; it stands in a chain as one of them would."""

    parts: tuple[Part, ...]
    name: str = "partition"


def partition(parts: Sequence[tuple[Which, Any] | tuple[Which, Any, str]]) -> Partition:
    """Several optimizers in one place, each with leaves, rates and a state of its own.

    Law: every leaf moves as under its optimizer alone, bit for bit. The state of each is kept under its name: adamw,
    adamw#2, or the given one. The first part that takes a leaf has it, as rules of rates do, so that a last ("",
    optimizer) has the rest. `metrics.lr` is the last part's.

    Args:
      parts: (which, optimizer) or (which, optimizer, name); which is a regex that is found in a path, a predicate on
        paths, fz.matrices(), or a tree of bools like the parameters. A tied leaf is taken by any of its paths.

    Raises:
      TypeError, ValueError: a part is of no such form; at init: a trained leaf that no part takes, or a part that takes
        none, by path.

    Source: optax.partition; torch's param groups.

    >>> import funczero as fz
    >>> both = fz.partition([("embed|head", fz.adamw(1e-3)), ("", fz.sgd(1e-2, momentum=0.9))])
    >>> [str(part) for part in both.parts]
    ["adamw('embed|head')", "sgd('')"]
    """
    if not isinstance(parts, (list, tuple)) or not parts:
        raise TypeError(
            f"partition: {shown(parts)} is {kind(parts)}, not a list of parts; write partition([(regex, optimizer),"
            " ..., ('', optimizer)])"
        )
    return Partition(tuple(_part(i, part) for i, part in enumerate(parts)))


def _part(i: int, given: Any) -> Part:
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        raise TypeError(
            f"partition: part {i} is {kind(given)}; write (regex, predicate or tree of bools, optimizer), with a name"
            " behind it if you like"
        )
    which, tx, *name = given
    if isinstance(tx, Partition):
        raise TypeError(f"partition: part {i} is a partition itself; write its parts into this one")
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))) or isinstance(tx, type):
        raise TypeError(
            f"partition: part {i} has {shown(tx)} where its optimizer stands; write (which, optimizer), as ('embed',"
            " fz.adamw(lr))"
        )
    if not isinstance(tx, GradientTransformation):
        tx = GradientTransformation(tx.init, tx.update, name=type(tx).__name__)
    if name and (not isinstance(name[0], str) or not re.fullmatch(r"[^/#()|]+", name[0])):
        raise ValueError(
            f"partition: name={name[0]!r} would not tell leaves of the state apart on disk; write a word without / # ("
            " ) and |"
        )
    if isinstance(which, str):
        try:
            re.compile(which)
        except re.error as e:
            raise ValueError(f"partition: {which!r} is no regex ({e}); write one that is found in the paths") from None
    elif (
        not callable(which)
        and not hasattr(which, "takes")
        and (bad := next((p for p, x in tree.paths(which) if not isinstance(x, bool)), None)) is not None
    ):
        raise TypeError(
            f"partition: part {i} says {shown(which)}, which holds no bool at {bad!r}; write a regex, a predicate, or a"
            " tree of bools like the parameters"
        )
    return Part(which, tx._replace(name=name[0]) if name else tx)


def owners(parts: Sequence[Part], structure: Structure) -> list[tuple[int, ...]]:
    """By part: numbers of the trained leaves that it has.

    Raises:
      TypeError, ValueError: a mask of another form, a part that takes nothing, a leaf that none takes; by path.
    """
    left, out = {i for i in range(len(structure.leaves)) if not structure.frozen(i)}, []
    for part in parts:
        taken = _taken(part, structure)
        if not taken:
            what = (
                tree.unmatched(part.which, [leaf.path for leaf in structure.leaves])
                if isinstance(part.which, str)
                else "it takes no parameter"
            )
            raise ValueError(f"partition: {part}: {what}; correct it, or leave it out")
        if len(taken) < len(structure.leaves) and any(not structure.frozen(i) for i in taken) and not taken & left:
            first = structure.leaves[min(taken)].path
            raise ValueError(
                f"partition: {part} has nothing, because a part before it takes {first!r} and all else that it matches;"
                " put it first"
            )
        out.append(tuple(sorted(taken & left)))
        left -= taken
    if left:
        path = structure.leaves[min(left)].path
        raise ValueError(
            f"partition: no part takes parameter {path!r}; end the parts with ('', optimizer), or freeze it:"
            f" fz.freeze({path!r})"
        )
    return out


def _taken(part: Part, structure: Structure) -> set[int]:
    """The leaves that a part matches."""
    if hasattr(part.which, "takes"):
        return {i for i, leaf in enumerate(structure.leaves) if part.which.takes(leaf)}
    if isinstance(part.which, str) or callable(part.which):
        match = tree.matcher(part.which)
        return {i for i, leaf in enumerate(structure.leaves) if match(leaf.path)}
    try:
        flat = structure.treedef.flatten_up_to(part.which)
    except ValueError as e:
        raise TypeError(f"partition: the mask of {part.tx.name} is no tree like the parameters: {e}") from None
    said: dict[int, bool] = {}
    for place, x in zip(structure.places, flat, strict=True):
        if not isinstance(x, bool):
            raise TypeError(
                f"partition: the mask of {part.tx.name} says {shown(x)} of parameter {structure.leaves[place].path!r};"
                " write True or False"
            )
        if said.setdefault(place, x) != x:
            names = " = ".join(tree.names(structure.leaves[place].path))
            raise ValueError(
                f"partition: the mask of {part.tx.name} says two things of one tied parameter, {names}; write the same"
                " at all its paths"
            )
    return {i for i, x in said.items() if x}


# --- a part of Slots --------------------------------------------------------------------------------------------------
def subset(where: Where, held: tuple[int, ...]) -> Where:
    """The place of these leaves alone: the same units, numbers and cuts; what it does not hold has no slot, as a
    frozen leaf has none in a gradient.
    """
    known: dict[tuple[int, ...], Where] = where.memo.setdefault(SUBSETS, {})
    if held not in known:
        full = where.structure
        leaves = tuple(
            x if i in held or full.frozen(i) else replace(x, unit=len(full.units)) for i, x in enumerate(full.leaves)
        )
        part = Structure(full.treedef, full.places, leaves, (*full.units, OTHERS))
        known[held] = Where(part, where.coords, where.place)
    return known[held]


def holds(structure: Structure, leaf: int) -> bool:
    """Is this a leaf of the tree, rather than one that a subset leaves out?"""
    return structure.units[structure.leaves[leaf].unit] != OTHERS


def subsets(where: Where) -> list[Where]:
    """The places that were made of parts of this one."""
    return [y for x in where.memo.get(SUBSETS, {}).values() for y in (x, *subsets(x))]


def taken(slots: Slots, where: Where) -> Slots:
    """A copy of the leaves that a subset holds."""
    parts: list[Tensor | None] = [x if holds(where.structure, i) else None for i, x in enumerate(slots.leaves())]
    return Slots.pack(where, parts, slots.buffers[0].dtype, slots.buffers[0].device)


def put(slots: Slots, part: Slots) -> None:
    """Write the leaves of a subset into the Slots that it is a part of."""
    pairs = [
        (x, y)
        for i, (x, y) in enumerate(zip(slots.leaves(), part.leaves(), strict=True))
        if x is not None and y is not None and holds(part.where.structure, i)
    ]
    if pairs:
        torch._foreach_copy_([x for x, _ in pairs], [y for _, y in pairs])
