"""Looking into checkpoints: what is in one, whether it is whole, how two differ. One process, no torch.distributed,
leaf by leaf.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from funczero.checkpoint import folder, manifest
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.manifest import Manifest
from funczero.checkpoint.memory import torch_dtype
from funczero.checkpoint.reader import opened
from funczero.checkpoint.restore import ask_whole

T = TypeVar("T")


def find(path: str | Path) -> Path:
    """A checkpoint's folder: this one, or the latest of a folder of them."""
    path = Path(path)
    if any((path / mark).exists() for mark in folder.MARKS):
        return path
    return folder.choose(path, "latest", folder.Keep(), fallback=False)[0].path


def size_of(found: Manifest, names: Iterable[str] | None = None) -> int:
    """Bytes of leaves."""
    return sum(
        prod(a.shape) * torch_dtype(a.dtype).itemsize for n, a in found.arrays.items() if names is None or n in names
    )


def progress(items: list[T], what: str) -> Iterator[T]:
    """Items with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    return iter(track(items, what, console=Console(file=sys.stderr), disable=not sys.stderr.isatty()))


def tensors(path: Path, found: Manifest, names: list[str], what: str) -> Iterator[tuple[str, Tensor]]:
    """Leaves one after the other, whole and checked."""
    reader = opened(path / manifest.ARRAYS, found.arrays)
    for name in progress(names, what):
        made: dict[str, Tensor] = {}
        ask_whole(reader, name, found.arrays[name], made)
        reader.finish()
        yield name, made[name]


def plain(text: str) -> str:
    """A text without what a terminal would take for orders: what does not print as Python writes it.

    >>> plain(chr(27) + "[2Jb"), plain("ä b") == "ä b"
    ('\\\\x1b[2Jb', True)
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def inspect(path: str | Path) -> str:
    """A checkpoint on a page: its tree with shapes, dtypes and sizes, its step, its client state. No array is read."""
    where = find(path)
    found = manifest.load(where)
    lines = [
        f"{where}: step {found.step}, {found.updates} updates, commit {found.sequence}, written by {found.world} ranks"
    ]
    if found.metrics:
        lines.append("metrics: " + ", ".join(f"{k} {v:g}" for k, v in found.metrics.items()))
    lines.append("versions: " + ", ".join(f"{k} {v}" for k, v in found.versions.items()))
    if "chain" in found.about:
        lines += ["chain:", *(f"  {line}" for line in found.about["chain"].splitlines())]
    if found.about.get("config") is not None:
        lines.append(f"config: {json.dumps(found.about['config'])}")
    if found.about.get("not finite"):
        lines.append(f"not finite: {', '.join(found.about['not finite'])}")
    lines.append(f"client state: {json.dumps(found.client)}")
    wide = max((len(n) for n in found.arrays), default=0)
    specs = found.about.get("specs", {})
    for name, a in found.arrays.items():
        lines.append(
            f"  {name:<{wide}}  {a.dtype:<10} {str(list(a.shape)):<20}"
            f" {prod(a.shape) * torch_dtype(a.dtype).itemsize:>14,} bytes  {specs.get(name, '')}".rstrip()
        )
    lines += [f"  {other:<{wide}}  is {name}" for other, name in found.ties.items()]
    heads = sorted({n.split("/")[0] for n in found.arrays})
    parts = ", ".join(f"{h} {size_of(found, [n for n in found.arrays if n.split('/')[0] == h]):,}" for h in heads)
    lines.append(f"{len(found.arrays)} leaves, {size_of(found):,} bytes: {parts}")
    return "\n".join(map(plain, lines))


def verify(path: str | Path) -> list[str]:
    """Reads everything once; what is wrong, a sentence each, nothing where all is as it was saved."""
    where = find(path)
    try:
        found = manifest.load(where)
    except CheckpointError as e:
        return [plain(str(e))]
    problems = manifest.check_files(where, found, strangers=True)
    try:
        reader = opened(where / manifest.ARRAYS, found.arrays)
    except CheckpointError as e:
        return list(map(plain, [*problems, str(e)]))
    for name in progress(list(found.arrays), "verify"):
        try:
            ask_whole(reader, name, found.arrays[name], {})
            reader.finish()
        except CheckpointError as e:
            problems.append(str(e))
    return list(map(plain, problems))


def diff(a: str | Path, b: str | Path) -> list[str]:
    """How two checkpoints differ, a line a leaf with the largest difference; nothing where every leaf has the same
    bits.
    """
    (one, left), (two, right) = ((p, manifest.load(p)) for p in (find(a), find(b)))
    out = [
        f"{n}: only in {p}"
        for p, mine, other in ((one, left, right), (two, right, left))
        for n in mine.arrays
        if n not in other.arrays
    ]
    both = []
    for n in left.arrays:
        if n in right.arrays:
            have, other = ((m.arrays[n].dtype, list(m.arrays[n].shape)) for m in (left, right))
            both += [n] * (have == other)
            out += [f"{n}: {have[0]} {have[1]} against {other[0]} {other[1]}"] * (have != other)
    for (n, x), (_, y) in zip(tensors(one, left, both, "diff"), tensors(two, right, both, "diff"), strict=True):
        raw = [t.contiguous().view(-1).view(torch.uint8) for t in (x, y)]
        if not torch.equal(*raw):
            out.append(f"{n}: {_largest(x, y)}")
    if left.client != right.client:
        out.append(f"client state: {json.dumps(left.client)} against {json.dumps(right.client)}")
    return list(map(plain, out))


def _largest(x: Tensor, y: Tensor) -> str:
    if x.dtype == torch.bool:
        return f"{int((x != y).sum())} of {x.numel()} values differ"
    wide = torch.complex128 if x.is_complex() else torch.float64
    gap = (x.to(wide) - y.to(wide)).abs()
    if not bool(gap.isfinite().all()):
        return f"{int((~gap.isfinite()).sum())} of {x.numel()} values are not finite in one of them"
    worst = int(gap.argmax())
    apart = int((gap.view(-1) > 0).sum())
    return (
        f"largest difference {float(gap.view(-1)[worst]):.3g} ({x.view(-1)[worst].item():.6g} against"
        f" {y.view(-1)[worst].item():.6g}), {apart} of {x.numel()} values differ"
    )
