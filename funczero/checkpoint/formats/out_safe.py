"""Safetensors out: one file, or shards with the index that Hugging Face reads; and a folder as save_pretrained lays it
out, with the model's config.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from funczero.checkpoint import manifest
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.formats.entry import Entry, written
from funczero.checkpoint.formats.safe import CODES
from funczero.checkpoint.memory import numpy_view
from funczero.core.number import dtype_name

CONFIGS = ("config.json", "generation_config.json")
LARGEST = 5 * 10**9  # bytes of a file of a folder


def files(entries: list[Entry], out: Path, limit: int | None) -> dict[Path, list[Entry]]:
    """Which file holds what: one, or several of at most so many bytes with numbered names.

    Raises:
      ValueError: safetensors has no name for a dtype.
    """
    groups: list[list[Entry]] = [[]]
    for e in entries:
        if dtype_name(e.dtype) not in CODES:
            raise ValueError(
                f"export: {e.name!r} is {dtype_name(e.dtype)}, which safetensors has no name for; write --dtype=float32"
            )
        if limit and groups[-1] and sum(x.nbytes for x in groups[-1]) + e.nbytes > limit:
            groups.append([])
        groups[-1].append(e)
    n = len(groups)
    names = [out] if n == 1 else [out.with_name(f"{out.stem}-{i + 1:05}-of-{n:05}.safetensors") for i in range(n)]
    return dict(zip(names, groups, strict=True))


def index_of(out: Path) -> Path:
    """The index beside shards."""
    return out.with_name(out.name + ".index.json")


def write(shards: dict[Path, list[Entry]], out: Path, read: Callable[[Entry], Tensor]) -> None:
    """The files, one leaf in memory at a time, and the index of several."""
    for file, mine in shards.items():
        _write(file, mine, read)
    if len(shards) > 1:
        total = sum(e.nbytes for mine in shards.values() for e in mine)
        weights = {e.key: file.name for file, mine in shards.items() for e in mine}
        index_of(out).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, indent=2))


def _write(file: Path, entries: list[Entry], read: Callable[[Entry], Tensor]) -> None:
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
    with written(file) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for e in entries:
            f.write(numpy_view(read(e).view(-1)).view("uint8").data)


def configs(config: Path, entries: list[Entry]) -> dict[str, str]:
    """The files of a model's config, by name, from a folder or a file of it; the dtype is that of the weights.

    Raises:
      CheckpointError: there is none.
    """
    folder, out = (config, {}) if config.is_dir() else (config.parent, {"config.json": config})
    out = out or {name: folder / name for name in CONFIGS if (folder / name).exists()}
    if "config.json" not in out:
        raise CheckpointError(f"export: {str(config)!r} holds no config.json; give the folder of the model it began as")
    texts = {}
    for name, path in out.items():
        try:
            texts[name] = manifest.content(path).decode()
            body = json.loads(texts[name])
        except (OSError, ValueError, RecursionError) as e:
            raise CheckpointError(f"export: {str(path)!r} is no config ({str(e)[:200]})") from None
        kinds = {dtype_name(e.dtype) for e in entries if e.dtype.is_floating_point}
        field = next((k for k in ("dtype", "torch_dtype") if isinstance(body, dict) and k in body), "dtype")
        if name == "config.json" and len(kinds) == 1 and body.get(field, "float32") != (kind := kinds.pop()):
            texts[name] = json.dumps(body | {field: kind}, indent=2) + "\n"
    return texts
