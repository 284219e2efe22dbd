"""Ranks begin alike: the same values, key, chain, torch and threads, or one sentence that says whose differ."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funczero.comm.integers import sum_and_compare
from funczero.core import rows, tree
from funczero.core.number import dtype_name
from funczero.core.optimizer import GradientTransformation
from funczero.core.types import Layout, Tree
from funczero.layout.mesh import Mesh
from funczero.transforms.chain import Bracket, Source
from funczero.transforms.model_state import Model
from funczero.transforms.partition import Partition
from funczero.world.entries import BEGINS, GIVEN, Context

WORDS = 1 << 10  # of 8 bytes, in a row of what is summed
HOME = "funczero."  # only what stands in this package is looked into


def begin(params: Any, structure: Any, key: int, mesh: Mesh, model: Model | None = None) -> None:
    """Compare what this rank was given to begin with, a model's own state too; a collective of a few bytes.

    Of tensors the values, of lazy and meta leaves the shape and the dtype alone: nothing is read that this rank would
    not read.

    Raises:
      DivergenceError: another rank was given other values; it names the leaf and the ranks, on all of them.
    """
    ledger = mesh.ledger
    if ledger.ranks == 1:
        return
    spec, units = ledger.describe(structure)
    before = ledger.context
    ledger.enter(Context("step.init", spec=spec, units=units))
    facts = {
        "key": str(key),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "threads": str(torch.get_num_threads()),
    }
    for what, value in facts.items():
        ledger.note(BEGINS, what, value)
    beside = [] if model is None else [(f"model state {p}", x) for p, x in zip(model.paths, model.initial, strict=True)]
    named = [*tree.paths(params), *beside]
    once = {id(x): (path, x) for path, x in reversed(named)}  # tied leaves by their first path
    whole = {path: x for path, x in reversed(once.values()) if isinstance(x, Tensor) and not x.is_meta}
    sums = torch.stack([checksum(x) for x in whole.values()]).tolist() if whole else []
    numbers = dict(zip(whole, sums, strict=True))
    for path, x in reversed(once.values()):
        ledger.note(BEGINS, f"{path!r}", f"{dtype_name(x.dtype)} {tuple(x.shape)}", numbers.get(path, 0))
    try:
        sum_and_compare([torch.zeros(0, dtype=torch.int64, device=mesh.device)], (), mesh)
    finally:
        ledger.enter(before)


def given(batch: Tree, layout: Layout, mesh: Mesh) -> None:
    """Note what batch= calls P() in the ledger, so that ranks which were given others are told at the next sum.

    Raises:
      TypeError, ValueError: the batch is none of what batch= says.
    """
    if layout.cut == 0:
        return
    leaves = rows.opened(batch, layout.cut, "value_and_grad")[0]
    if any(x.dim != rows.WHOLE for x in leaves):
        rows.count(batch, "value_and_grad", layout.cut)
    if mesh.ledger.ranks == 1:
        return
    for path, x, dim in leaves:
        if dim == rows.WHOLE and isinstance(x, Tensor):
            what, number = f"{dtype_name(x.dtype)} {tuple(x.shape)}", _bits(x)
        elif dim == rows.WHOLE:
            text = _plain(x, 0)  # "" for what has no words that every process writes alike
            what, number = type(x).__name__, zlib.crc32(text.encode())
        else:
            continue
        mesh.ledger.note(GIVEN, f"{path!r} of the batch", what, number)


def _bits(x: Tensor) -> int:
    """A tensor's checksum, of the values that are there where it is sparse."""
    return int(checksum(x if x.layout == torch.strided else x.to_dense()))


def checksum(x: Tensor) -> Tensor:
    """An int64 of a tensor's bits and their places, on its device, in two passes and a row's memory.

    >>> a = torch.arange(6.0)
    >>> [bool(checksum(a) == checksum(b)) for b in (a.clone(), a.flip(0), a.double())]
    [True, False, False]
    """
    flat = x.detach().contiguous().view(-1)
    if (
        flat.dtype == torch.bool
        or flat.is_complex()
        or flat.storage_offset() * flat.itemsize % 8
        or flat.stride() != (1,)
    ):
        flat = flat.clone(memory_format=torch.contiguous_format)
    raw = flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)
    n = raw.numel() // 8
    words, rest = raw[: 8 * n].view(torch.int64), raw[8 * n :].long()
    rows = words[: n // WORDS * WORDS].view(-1, WORDS)
    total = torch.tensor(raw.numel(), device=x.device)
    for part in (rows.sum(0), rows.sum(1), words[rows.numel() :], rest):
        total = total * 0x100000001B3 + (part * _weights(part.numel(), x.device)).sum()
    return total


def _weights(n: int, device: torch.device) -> Tensor:
    """Odd numbers, far apart: a value at another place counts otherwise."""
    return torch.arange(n, device=device) * 0x1E3779B97F4A7C16 + 0x7F4A7C15


def settings(parts: Sequence[Any]) -> list[str]:
    """The numbers that a chain's transforms and optimizers were built with, a line a part: a clip's limit, an eps.

    Rates are not among them: they are leaves of the state, which ranks compare at every update.
    """
    lines: list[str] = []
    for p in parts:
        if isinstance(p, Source):
            lines += settings(p.transforms)
        elif isinstance(p, Bracket):
            lines += settings(p.parts)
        elif isinstance(p, (tuple, list)) and not hasattr(p, "_fields"):
            lines += settings(p)
        elif isinstance(p, Partition):
            lines += [f"{part}: {line}" for part in p.parts for line in settings([part.tx])]
        elif isinstance(p, GradientTransformation):
            across = None if p.formula is None else p.formula.across
            own = {
                k: v
                for fn in (p.init, p.update, *(p.formula or ()), *(across or ()))
                for k, v in _closure(fn, 0).items()
            }
            own |= {"small": repr(across.small)} if across else {}
            lines.append(f"{p.name}({_in_words(own)})")
        elif callable(p) and (own := _closure(p, 0)):
            lines.append(f"{getattr(p, '__name__', type(p).__name__)}: {_in_words(own)}")
    return lines


def _in_words(own: dict[str, str]) -> str:
    return ", ".join(f"{k}={own[k]}" for k in sorted(own))


def _closure(fn: Any, depth: int) -> dict[str, str]:
    """What a function of this package has closed over, by name, as far as it is plain."""
    code = getattr(fn, "__code__", None)
    if code is None or depth > 4 or not str(getattr(fn, "__module__", "")).startswith(HOME):
        return {}
    out: dict[str, str] = {}
    for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
        try:
            words = _plain(cell.cell_contents, depth)
        except ValueError:  # not filled yet
            continue
        if words:
            out[name] = words
    return out


def _plain(x: Any, depth: int) -> str:
    """A value in words that are the same in every process; "" for what has none."""
    if x is None or isinstance(x, (bool, int, float, str, torch.dtype)):
        return repr(x)
    if isinstance(x, (tuple, list)) and depth < 5:
        return f"[{', '.join(_plain(y, depth + 1) or type(y).__name__ for y in x)}]"
    if isinstance(x, dict) and depth < 5:
        return (
            f"{{{', '.join(f'{k}: {_plain(v, depth + 1)}' for k, v in sorted(x.items(), key=lambda kv: str(kv[0])))}}}"
        )
    if isinstance(x, partial):
        return (
            f"partial({_plain(x.func, depth + 1)}, {_plain(list(x.args), depth + 1)}, {_plain(x.keywords, depth + 1)})"
        )
    if isinstance(x, type) or hasattr(x, "__code__"):
        return f"{getattr(x, '__qualname__', type(x).__qualname__)}({_in_words(_closure(x, depth + 1))})"
    return ""
