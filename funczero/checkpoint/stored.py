"""A frozen base on disk as it rests: one safetensors file of codes and scales, which any mesh reads part by part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.formats import out_safe, safe
from funczero.checkpoint.formats.entry import Entry
from funczero.checkpoint.formats.leaf import Leaf
from funczero.comm.integers import sum_integers
from funczero.gradients.stored import empty
from funczero.layout.where import Where
from funczero.step.frozen import Frozen, placed, still
from funczero.step.step import Step

CODES, SCALES = ":codes", ":scales"  # behind a leaf's path


def save_frozen(path: str | Path, base: Frozen) -> Path:
    """Write what fz.frozen(..., storage=...) made; a collective, and rank 0 writes.

    Law: load_frozen has the same bits, on any mesh and at any stage. Memory: one unit as it rests. No rank returns
    before the file is there.

    Args:
      path: a name that ends in .safetensors; its folder is made.

    Returns: the path.

    Raises:
      ValueError: it has no storage of its own, or the name another end.
    """
    path, own = Path(path), base.stored
    if own is None:
        why = "rests in the compute dtype, as the tree that it was made of"
        raise ValueError(f"save_frozen: {base!r} {why}; keep that one, or write fz.frozen(..., storage='int8')")
    if path.suffix != ".safetensors":
        raise ValueError(f"save_frozen: {str(path)!r} does not end in .safetensors")
    structure, first = own.plain.structure, base.env.mesh.rank(tuple(base.env.mesh.axes))[0] == 0
    rests, codes = own.rest.where.structure, None if own.codes is None else own.codes.where.structure
    entries: list[Entry] = []
    for members in structure.members:
        for i in members:
            name, coded = structure.leaves[i].path, bool(own.coded) and own.coded[i]
            dtype, shape = own.rest.buffers[0].dtype, rests.leaves[i].shape
            entries.append(Entry(f"{name}{SCALES if coded else ''}", str(i), dtype, shape))
            if coded and codes is not None:
                entries.append(Entry(f"{name}{CODES}", str(i), torch.uint8, codes.leaves[i].shape))
    last: dict[int, tuple[Tensor, Tensor | None]] = {}

    def read(e: Entry) -> Tensor:
        i = int(e.name)
        unit = structure.leaves[i].unit
        if unit not in last:
            last.clear()
            last[unit] = own.gathered(unit, base.env)
        rest, packed = last[unit]
        form, buffer = (codes, packed) if e.key.endswith(CODES) else (rests, rest)
        assert form is not None and buffer is not None
        leaf: Tensor = Where.whole(form).views(unit, buffer)[structure.members[unit].index(i)]
        return leaf.cpu()

    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
        out_safe.write({path: entries}, path, read)
    else:
        for e in entries:
            read(e)
    mesh = base.env.mesh
    sum_integers(torch.zeros(1, dtype=torch.int64, device=mesh.device), tuple(mesh.axes), mesh)  # the file is there
    return path


def load_frozen(
    path: str | Path,
    what: Any,
    step: Step,
    stage: int = 3,
    units: Sequence[str] | None = None,
    axes: Sequence[str] | None = None,
) -> Frozen:
    """A base from save_frozen's file, each rank its part alone.

    Args:
      what: the tree's form, as fz.frozen was given; its values are not read, so that they may lie on meta.
      step, stage, units, axes: as fz.frozen's.

    Raises:
      CheckpointError: the file is malformed, or holds other leaves, shapes or dtypes than these.
    """
    own, coords, env = placed(what, step, stage, units, axes)
    found, where = safe.read(Path(path)), str(path)
    leaves = own.structure.leaves
    coded = [f"{x.path}{CODES}" in found for x in leaves]
    out = empty(still(own.structure), coords, env.policy.compute, coded if any(coded) else [], own.device)
    wanted = set[str]()
    for i, ((r, c), leaf) in enumerate(zip(out.leaves(), leaves, strict=True)):
        name = f"{leaf.path}{SCALES if c is not None else ''}"
        _fill(r, out.rest.where, i, name, found, where)
        wanted.add(name)
        if c is not None and out.codes is not None:
            _fill(c, out.codes.where, i, f"{leaf.path}{CODES}", found, where)
            wanted.add(f"{leaf.path}{CODES}")
    if odd := sorted(found.keys() - wanted):
        raise CheckpointError(f"load_frozen: {where!r} also holds {odd[0]!r}, which the tree does not have")
    return Frozen(out, env)


def _fill(x: Tensor, at: Where, leaf: int, name: str, found: dict[str, Leaf], file: str) -> None:
    """This rank's rows of one leaf of the file."""
    want = at.structure.leaves[leaf].shape
    if name not in found:
        raise CheckpointError(f"load_frozen: {file!r} has no {name!r}; give the tree that the base was made of")
    have = found[name]
    if have.shape != want or have.dtype != x.dtype:
        what = f"{have.dtype} of shape {list(have.shape)} in {file!r}, and {x.dtype} of shape {list(want)} here"
        raise CheckpointError(
            f"load_frozen: {name!r} is {what}; give the policy and the tree that the base was made of"
        )
    if x.numel():
        first, *others = at.slots[leaf].place or (slice(0, 1),)
        x.copy_(have.rows(first.start, first.stop)[(slice(None), *others)] if want else have.read())
