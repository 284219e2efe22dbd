"""Where a state differs from a step's own, in words; nothing where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import dtype_name
from funczero.layout.place import DEVICE
from funczero.layout.slots import Slots
from funczero.layout.structure import Structure
from funczero.layout.where import Where
from funczero.transforms.accumulate import Accumulate


def _slots(x: Any) -> Iterator[Slots]:
    """Every Slots of a chain's state but for partial sums, which lie where their window has them."""
    if isinstance(x, Slots):
        yield x
    elif isinstance(x, (tuple, list, dict)) and not isinstance(x, Accumulate):
        for y in x.values() if isinstance(x, dict) else x:
            yield from _slots(y)


def structures(have: Structure, want: Structure) -> str:
    """How trees of parameters differ."""
    if have == want:
        return ""
    for a, b in zip(have.leaves, want.leaves, strict=False):
        for what, x, y in (
            ("path", a.path, b.path),
            ("cuts", dict(a.cuts), dict(b.cuts)),
            ("unit", *_units(a, b, have, want)),
        ):
            if x != y:
                return f"parameter {a.path!r} has {what} {x!r} in it, but {y!r} in this step"
    return "its parameters are tied or nested otherwise than this step's"


def _units(a: Any, b: Any, have: Structure, want: Structure) -> tuple[str, str]:
    both = [s.units[leaf.unit] for leaf, s in ((a, have), (b, want))]
    first, second = (f"{u.name or 'none'}{', frozen' * u.frozen}" for u in both)
    return first, second


def places(what: str, have: Where, want: Where) -> str:
    """How the places of two parts differ."""
    if (have.coords, have.place) == (want.coords, want.place):
        return ""
    return f"its {what} lie {_words(have)}, but this step's lie {_words(want)}"


def _words(where: Where) -> str:
    cuts = ", ".join(f"part {i + 1} of {n} over {a!r}" for a, n, i in where.coords)
    place = "" if where.place == DEVICE else f", in {where.place}"
    return (f"cut ({cuts})" if cuts else "whole on every rank") + place


def fit(what: str, have: Slots, dtype: torch.dtype) -> str:
    """How buffers differ from those that their place and a dtype want."""
    lengths = [b.numel() for b in have.buffers]
    if lengths != list(have.where.lengths):
        return f"its {what} have {lengths} elements a unit, but this step's have {list(have.where.lengths)}"
    odd = next((b.dtype for b in have.buffers if b.dtype != dtype), dtype)
    return "" if odd == dtype else f"its {what} are {dtype_name(odd)}, but this step keeps them in {dtype_name(dtype)}"


def chains(have: dict[str, Any], want: dict[str, Any] | None) -> str:
    """How a chain's state differs; `want` is None for an optimizer that looks at values when it starts."""
    if want is None:
        return ""
    if have.keys() != want.keys():
        return f"its chain keeps {sorted(have)}, but this step's keeps {sorted(want)}"
    for name, ours in want.items():
        theirs = have[name]
        if type(theirs) is not type(ours):
            return f"{name!r} keeps a {type(theirs).__name__} in it, but a {type(ours).__name__} in this step"
        if isinstance(ours, Accumulate):
            continue  # an open window, or none
        for a, b in zip(_slots(theirs), _slots(ours), strict=False):
            if a.where != b.where:
                return f"the state of {name!r} lies {_words(a.where)}, but this step's lies {_words(b.where)}"
        (a_flat, a_tree), (b_flat, b_tree) = tree.flatten(theirs), tree.flatten(ours)
        forms = [
            [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else None for x in flat] for flat in (a_flat, b_flat)
        ]
        if a_tree == b_tree and forms[0] != forms[1]:
            i = next(i for i, (x, y) in enumerate(zip(*forms, strict=True)) if x != y)
            here, there = ("no tensor" if (x := f[i]) is None else f"shape {x[0]} in {dtype_name(x[1])}" for f in forms)
            return f"{f'{name}/{tree.paths(ours)[i][0]}'!r} has {here}, but {there} in this step"
    return ""
