"""Safetensors: one file, or Hugging Face's shards with their index, as leaves that are read from their places.

Facts: a file is the length of a JSON header (u64, little-endian), the header {name: {dtype, shape, data_offsets}}, and
the values without holes. A reader takes headers of at most 100 MB.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import torch

from funczero.checkpoint import manifest
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.formats.leaf import Leaf, placed, refuse_twice, regular, sizes

HEADER = 100_000_000  # bytes
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
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for name, code in CODES.items()}


def files_of(source: Path) -> list[Path]:
    """The safetensors files that are meant by a file, an index or a folder; none for another kind of source.

    Raises:
      CheckpointError: an index cannot be read.
    """
    if source.suffix == ".safetensors":
        return [source]
    index = source if source.name.endswith(".index.json") else index_of(source)
    return sorted(source.glob("*.safetensors")) if index is None else sorted({f for f in weight_map(index).values()})


def index_of(folder: Path) -> Path | None:
    """The index of a folder; CheckpointError where there are several."""
    found = sorted(folder.glob("*.safetensors.index.json")) if folder.is_dir() else []
    if len(found) > 1:
        raise CheckpointError(f"import: {str(folder)!r} holds {len(found)} indices; name the one that is meant")
    return found[0] if found else None


def weight_map(index: Path) -> dict[str, Path]:
    """Which file holds which tensor, as an index says.

    Raises:
      CheckpointError: it is no index.
    """
    try:
        names = json.loads(manifest.content(index))["weight_map"]
        return {str(key): index.with_name(Path(file).name) for key, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(
            f"import: {str(index)!r} is no index of safetensors files ({type(e).__name__}: {str(e)[:200]})"
        ) from None


def read(source: Path) -> dict[str, Leaf]:
    """The leaves of a file, an index or a folder of them by their keys; of an index just what it names.

    Raises:
      CheckpointError: a file is malformed, lacks what the index says, or two have one key.
    """
    index = source if source.name.endswith(".index.json") else index_of(source)
    said = weight_map(index) if index is not None and source.suffix != ".safetensors" else None
    out: dict[str, Leaf] = {}
    for file in files_of(source):
        for key, leaf in header(file).items():
            if said is None or said.get(key) == file:
                refuse_twice(out, key, str(file))
                out[key] = leaf
    if said is not None and (lost := sorted(said.keys() - out.keys())):
        raise CheckpointError(
            f"import: {str(index)!r} says that {str(said[lost[0]])!r} holds {lost[0][:200]!r}, which it does not"
        )
    return out


def header(file: Path) -> dict[str, Leaf]:
    """The leaves of one file.

    Raises:
      CheckpointError: it is malformed; every size is compared with the file's before it is believed.
    """
    size = regular(file)
    try:
        with file.open("rb") as f:
            first = f.read(8)
            n = struct.unpack("<Q", first)[0] if len(first) == 8 else size
            if n > min(HEADER, size - 8):
                raise ValueError(f"its header would have {n} bytes, the file has {size}")
            text = f.read(n)
        entries = json.loads(text)
        if not isinstance(entries, dict):
            raise ValueError("its header is no mapping")
        entries.pop("__metadata__", None)
        leaves = {key: _leaf(file, key, entry, 8 + n, size) for key, entry in entries.items()}
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as e:
        raise CheckpointError(
            f"import: {str(file)!r} cannot be read ({type(e).__name__}: {str(e)[:300]}); it is no safetensors file, or"
            " was cut"
        ) from None
    ends = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
    if (
        any(a[1] != b[0] for a, b in zip(ends, ends[1:], strict=False))
        or ends
        and (ends[0][0], ends[-1][1])
        != (
            0,
            size - 8 - n,
        )
    ):
        raise CheckpointError(f"import: {str(file)!r} has leaves that overlap, or bytes that belong to none")
    return leaves


def _leaf(file: Path, key: str, entry: Any, start: int, size: int) -> Leaf:
    shape = sizes(entry["shape"], key, str(file))
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{key[:200]!r} has dtype {str(entry['dtype'])[:40]!r}, which is none of this torch")
    dtype = DTYPES[entry["dtype"]]
    a, b = entry["data_offsets"]
    if type(a) is not int or type(b) is not int or not 0 <= a <= b <= size - start:
        raise ValueError(f"{key[:200]!r} lies outside of the file")
    if b - a != prod(shape) * dtype.itemsize:
        raise ValueError(f"{key[:200]!r} has {b - a} bytes, but shape {list(shape)} of {entry['dtype']} needs others")
    return placed(file, start + a, dtype, shape)
