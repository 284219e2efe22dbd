"""Which leaf of a checkpoint goes into which leaf of a state: renamed, tied, cast; and what is refused or said where
one has what the other lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from funczero.checkpoint import names, terms
from funczero.checkpoint.arrays import Array
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.manifest import Manifest
from funczero.checkpoint.memory import torch_dtype
from funczero.checkpoint.names import Part
from funczero.core.number import dtype_name


def sources(parts: Iterable[str], manifest: Manifest, rename: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The name under which each leaf is stored, where it is."""
    # keys with dots, as modules and exported files have them, are paths, too
    known = {names.stored(n): n for n in manifest.arrays}
    return {name: _source(name, manifest, known, rename) for name in parts}


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


def twins(
    ties: dict[str, str], source: dict[str, str], manifest: Manifest, rename: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """Second names of the state's tied leaves -> what the checkpoint holds under them beside the first one."""
    mine = sources([n for n, first in ties.items() if first in source], manifest, rename)
    return {n: stored for n, stored in mine.items() if stored in manifest.arrays and stored != source[ties[n]]}


def present(
    parts: dict[str, Part], source: dict[str, str], manifest: Manifest, strict: bool, notes: list[str]
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
        elif strict:
            raise CheckpointError(
                f"restore: the checkpoint has no {names.listed(lost)}; it holds names that begin with"
                f" {heads(manifest.arrays)}; rename=[(regex, replacement)] maps names, strict=False leaves these as"
                " they are"
            )
        else:
            notes.append(f"{len(lost)} leaves are not in the checkpoint and stay as they were: {names.listed(lost)}")
    return {name: part for name, part in parts.items() if source[name] in manifest.arrays}


def refuse_strangers(source: dict[str, str], manifest: Manifest, notes: list[str]) -> None:
    """Parameters that the state has no place for are an error; a transform that the chain no longer has is told."""
    used = set(source.values())
    known = {name.split("/")[0] for name in used}
    left = [
        n
        for n in manifest.arrays
        if n not in used
        and not n.startswith("client/")
        and n != "client"
        and not re.match(r"[^/]+/(partial/|count$)", n)
    ]
    rates = [n for n in left if names.is_rate(n) and n.split("/")[0] in known]
    notes += [
        f"the script has no place for these rates of the checkpoint, which were left out: {names.listed(rates)}"
    ] * bool(rates)
    left = [n for n in left if n not in rates]
    by_head: dict[str, list[str]] = {}
    for n in left:
        by_head.setdefault(n.split("/")[0], []).append(n)
    for head, lost in sorted(by_head.items()):
        if head in known:
            raise CheckpointError(
                f"restore: the checkpoint also holds {names.listed(lost)}, for which the state has no place; restore"
                " with strict=False to leave them out"
            )
    out = sorted(by_head)
    notes += [f"{head!r} of the checkpoint is not in this chain and was left out" for head in out[:8]]
    notes += [f"nor are {len(out) - 8} more transforms of it"] * (len(out) > 8)


def heads(names: Iterable[str]) -> list[str]:
    """How names begin, a few of them, for a message."""
    return sorted({"/".join(n.split("/")[:2]) for n in names})[:8]


def cast_of(name: str, part: Part, array: Array) -> tuple[str, str] | None:
    """From which dtype to which a leaf is cast when it is read; None where it is not.

    Raises:
      CheckpointError: the shapes differ, or a dtype that is not cast.
    """
    if part.shape != array.shape and not terms.folds(part, array.shape):
        raise CheckpointError(
            f"restore: {name!r} has shape {list(part.shape)} in the state and {list(array.shape)} in the checkpoint;"
            " build the state of the same model"
        )
    have, want = torch_dtype(array.dtype), part.value.dtype
    if have == want:
        return None
    if not (have.is_floating_point and want.is_floating_point):
        raise CheckpointError(
            f"restore: {name!r} is {dtype_name(want)} in the state and {array.dtype} in the checkpoint; only"
            " floating dtypes are cast"
        )
    return array.dtype, dtype_name(want)
