"""Plain weights out of a checkpoint and into one: safetensors both ways, and parameters that stock orbax wrote.

Facts: a safetensors file is the length of a JSON header (u64, little-endian), the header {name: {dtype, shape,
data_offsets}}, and the values without holes.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.checkpoint import folder, manifest, stock
from funczero.checkpoint.checkpointer import Checkpointer
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.memory import numpy_view, torch_dtype
from funczero.checkpoint.names import Names, escape, unescape, whole
from funczero.checkpoint.tools import find, progress, tensors
from funczero.core.number import dtype_name
from funczero.transforms.model_state import MODEL

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


class Entry(NamedTuple):
    """One tensor of an exported file."""

    key: str  # as load_state_dict knows it
    name: str  # of the leaf
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its length in the file."""
        return prod(self.shape) * self.dtype.itemsize


def state_dict_key(name: str) -> str:
    """The key of a parameter: parts joined by dots, escapes undone.

    >>> state_dict_key("params/blocks/0/w"), state_dict_key("params/layers.0.weight")
    ('blocks.0.w', 'layers.0.weight')
    """
    return ".".join(map(unescape, name.split("/")[1:]))


def export(
    path: str | Path, out: str | Path, dtype: str | None = None, shard_size: int | None = None, overwrite: bool = False
) -> list[Path]:
    """The parameters of a checkpoint as safetensors, one leaf in memory at a time, tied names with their values; and
    the model's own state, as a module's state_dict has buffers (one that is not persistent is there, too; one that is
    tied has its first name).

    Args:
      path: a checkpoint, or a folder of them, for the latest.
      out: a file that ends in .safetensors; in shards its name gets numbers, and an index is written beside.
      dtype: of all floating values; None: as they are.
      shard_size: bytes of a file; None: one file.

    Returns: the files.
    """
    where, out = find(path), Path(out)
    found = manifest.load(where)
    if out.suffix != ".safetensors":
        raise ValueError(f"export: {str(out)!r} does not end in .safetensors; only that format is written")
    masters = {n: n for n in found.arrays if n == "params" or n.startswith("params/")}
    if not masters:
        raise CheckpointError(f"export: {str(where)!r} holds no parameters")
    entries, buffers = [], {n.removeprefix(f"{MODEL}/"): n for n in found.arrays if n.startswith(f"{MODEL}/values/")}
    for name, source in (masters | found.ties | buffers).items():
        a = found.arrays[source]
        have = torch_dtype(a.dtype)
        want = torch_dtype(dtype) if dtype and have.is_floating_point else have
        if dtype_name(want) not in CODES:
            raise ValueError(f"export: {name!r} is {a.dtype}, which safetensors has no name for; write --dtype=float32")
        entries.append(Entry(state_dict_key(name) or "weight", source, want, a.shape))
    if twice := [key for key, n in Counter(e.key for e in entries).items() if n > 1]:
        raise CheckpointError(
            f"export: two leaves of {str(where)!r} would both be called {twice[0]!r}; rename one of them"
        )
    files = _shards(entries, out, shard_size)
    index = out.with_name(out.name + ".index.json")
    for file in (*files, *([index] if len(files) > 1 else [])):
        if file.exists() and not overwrite:
            raise FileExistsError(f"export: {str(file)!r} is there already; choose another name, or write --overwrite")
    for file, mine in files.items():
        _write(where, found, file, mine)
    if len(files) > 1:
        weights = {e.key: file.name for file, mine in files.items() for e in mine}
        index.write_text(
            json.dumps({"metadata": {"total_size": sum(e.nbytes for e in entries)}, "weight_map": weights}, indent=2)
        )
    return list(files)


def _shards(entries: list[Entry], out: Path, limit: int | None) -> dict[Path, list[Entry]]:
    groups: list[list[Entry]] = [[]]
    for e in entries:
        if limit and groups[-1] and sum(x.nbytes for x in groups[-1]) + e.nbytes > limit:
            groups.append([])
        groups[-1].append(e)
    n = len(groups)
    names = [out] if n == 1 else [out.with_name(f"{out.stem}-{i + 1:05}-of-{n:05}.safetensors") for i in range(n)]
    return dict(zip(names, groups, strict=True))


def _write(where: Path, found: manifest.Manifest, file: Path, entries: list[Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for e in entries:
        header[e.key] = {
            "dtype": CODES[dtype_name(e.dtype)],
            "shape": list(e.shape),
            "data_offsets": [at, at + e.nbytes],
        }
        at += e.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for e, (_, x) in zip(
                entries, tensors(where, found, [e.name for e in entries], f"export {file.name}"), strict=True
            ):
                f.write(numpy_view(x.to(e.dtype).view(-1)).view("uint8").data)
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)


def import_weights(source: str | Path, directory: str | Path, name: str = "0", zeros: bool = False) -> str:
    """A checkpoint of parameters alone from a safetensors file, an index or a folder of them, or from a tree that stock
    orbax wrote; its name.

    Restored with `only="^params/"`, or whole, in which case every transform starts fresh.

    Args:
      zeros: take chunks that an orbax tree lacks for zeros, which older versions of orbax did not write; otherwise they
        are an error.

    Raises:
      CheckpointError: it cannot be read, or is not whole; it names the file, the leaf and the chunk.
    """
    source = Path(source)
    files = _files(source)
    found = {f"params/{k}": x for k, x in _safetensors(files).items()} if files else stock.read(source, zeros)
    parts = {n: whole(x) for n, x in found.items()}
    with Checkpointer(directory) as ck:
        ck.save_named(Names(parts, {}), folder.check_name(name))
    return name


def _files(source: Path) -> list[Path]:
    """The safetensors files that are meant; none for another kind of source."""
    if source.suffix == ".safetensors":
        return [source]
    index = (
        source
        if source.name.endswith(".index.json")
        else next(iter(sorted(source.glob("*.safetensors.index.json"))), None)
    )
    if index is None:
        return sorted(source.glob("*.safetensors"))
    try:
        names = set(json.loads(manifest.content(index))["weight_map"].values())
        return [index.with_name(Path(f).name) for f in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(
            f"import: {str(index)!r} is no index of safetensors files ({type(e).__name__}: {str(e)[:200]})"
        ) from None


def _safetensors(files: list[Path]) -> dict[str, Tensor]:
    from safetensors import safe_open

    out: dict[str, Tensor] = {}
    for file in files:
        try:
            if not file.is_file():
                raise OSError(f"No such file: {str(file)!r}" if not file.exists() else "it is no regular file")
            with safe_open(file, framework="pt") as f:
                for key in progress(list(f.keys()), f"read {file.name}"):
                    if out.setdefault(escape(key), x := f.get_tensor(key)) is not x:
                        raise ValueError(f"another file has the tensor {key!r}, too")
        except Exception as e:  # whatever a reader in another language makes of a malformed file
            raise CheckpointError(
                f"import: {str(file)!r} cannot be read ({str(e)[:300]}); give a safetensors file, its index, a folder"
                " of them, or an orbax tree"
            ) from None
    return out
