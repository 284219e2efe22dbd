"""Folders of torch.distributed.checkpoint (DCP): what their .metadata says, read as inert values, and the tensors'
chunks, each a zip of torch.save of its own in a file of a rank.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from funczero.checkpoint import manifest
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.formats.leaf import Found, Leaf, sizes
from funczero.checkpoint.formats.naming import Taken, by_path
from funczero.checkpoint.formats.pickles import Thing, dtypes, loads, things
from funczero.checkpoint.formats.torch_file import Part, flat
from funczero.checkpoint.formats.torch_file import read as read_zip

META = ".metadata"
HOME, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
KNOWN = {
    **things(
        *(f"{HOME} {name}" for name in (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )),
        f"{FILES} _StorageInfo", "pathlib PosixPath", "pathlib._local PosixPath",
    ),
    "collections OrderedDict": lambda: OrderedDict,
    "torch Size": lambda: tuple,
    "torch.serialization _get_layout": lambda: str,
    **dtypes(),
}  # fmt: skip
CHUNKS = 1 << 22  # of all tensors


def is_one(folder: Path) -> bool:
    """Is this such a folder?"""
    return (folder / META).is_file()


def read(folder: Path, want: Taken) -> Found:
    """The leaves of a folder.

    Raises:
      CheckpointError: it is malformed, or holds what is not read; it names the file and the leaf.
    """
    path = folder / META
    try:
        told = _fields(loads(manifest.content(path), str(path), KNOWN), "Metadata")
        stored = {_index(k): _fields(v, "_StorageInfo") for k, v in told["storage_data"].items()}
        paths = told.get("planner_data") or {}
        items = []
        for key, x in told["state_dict_metadata"].items():
            where = tuple(map(str, paths[key])) if isinstance(paths, dict) and paths.get(key) else (str(key),)
            if _is(x, "TensorStorageMetadata"):
                items.append((where, _tensor(folder, str(key), x.fields, stored)))
            elif _is(x, "BytesStorageMetadata"):
                items += _plain(folder, where, stored.get((str(key), None, None)))
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f"import: {str(path)!r} cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(
            f"import: {str(path)!r} is no metadata of torch.distributed.checkpoint ({type(e).__name__}: {str(e)[:200]})"
        ) from None
    return by_path(items, want, str(folder))


def _is(x: Any, kind: str) -> bool:
    return isinstance(x, Thing) and x.kind.rpartition(" ")[2] == kind


def _fields(x: Any, kind: str) -> dict[str, Any]:
    if not _is(x, kind):
        raise ValueError(f"it holds something else in the place of {kind}")
    return x.fields


def _index(x: Any) -> tuple[str, tuple[int, ...] | None, None]:
    """(key, offset) of a chunk; a number beside it is a hint."""
    fields = _fields(x, "MetadataIndex")
    offset = fields.get("offset")
    return str(fields["fqn"]), None if offset is None else tuple(offset), None


def _plain(folder: Path, where: tuple[str, ...], info: dict[str, Any] | None) -> list[tuple[tuple[str, ...], Any]]:
    """What is no tensor: groups and numbers of an optimizer; others are left out, in print."""
    small = info is not None and where[-1] == "step" and type(info.get("length")) is int and info["length"] < 1 << 16
    if not small:
        return [(where, None)]
    assert info is not None
    return [((*where, *below), x) for below, x in flat(read_zip(_part(folder, info)))]


def _part(folder: Path, info: dict[str, Any]) -> Part:
    """Where an item lies."""
    name, at, size = info["relative_path"], info["offset"], info["length"]
    if info.get("transform_descriptors"):
        raise CheckpointError(
            f"import: {str(folder)!r} was written through {str(info['transform_descriptors'])[:80]}, which is not read;"
            " save it without extensions"
        )
    if not isinstance(name, str) or name != Path(name).name or name in ("", "..") or "\x00" in name:
        raise CheckpointError(f"import: {str(folder / META)!r} names the file {str(name)[:100]!r}, which is not in it")
    if type(at) is not int or type(size) is not int or at < 0 or size < 0:
        raise ValueError("an item lies at no place")
    return Part(folder / name, at, size)


def _tensor(folder: Path, key: str, told: dict[str, Any], stored: dict[Any, dict[str, Any]]) -> Leaf:
    """A tensor of chunks, which must cover it without overlap."""
    state = told["properties"].fields
    dtype = state.get("dtype", (state.get("state") or [None])[0])
    shape = sizes(told["size"], key, str(folder))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key[:200]!r} has no dtype that is read")
    boxes = []
    for chunk in told["chunks"]:
        start = sizes(_fields(chunk, "ChunkStorageMetadata")["offsets"], key, str(folder))
        size = sizes(chunk.fields["sizes"], key, str(folder))
        if len(start) != len(shape) or any(a + n > m for a, n, m in zip(start, size, shape, strict=True)):
            raise ValueError(f"a chunk of {key[:200]!r} lies outside of it")
        if prod(size) or not shape:
            boxes.append((start, size, _part(folder, stored[key, start, None])))
    if len(boxes) > CHUNKS or sum(prod(n) for _, n, _ in boxes) != prod(shape) or _overlap(boxes):
        raise CheckpointError(f"import: the chunks of {key[:200]!r} in {str(folder)!r} do not cover it once")
    return Leaf(dtype, shape, partial(_rows, key, dtype, shape, boxes), str(folder))


def _overlap(boxes: list[Any]) -> bool:
    """Do two chunks share a value? Those that are cut in dim 0 alone are compared in order."""
    boxes = sorted(boxes, key=lambda b: b[0])
    apart = lambda a, b: any(x + n <= y or y + m <= x for x, n, y, m in zip(a[0], a[1], b[0], b[1], strict=True))
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            if b[0] and b[0][0] >= a[0][0] + a[1][0]:
                break
            if not apart(a, b):
                return True
    return False


def _rows(key: str, dtype: torch.dtype, shape: tuple[int, ...], boxes: list[Any], a: int, b: int) -> torch.Tensor:
    out = torch.empty((b - a, *shape[1:]) if shape and len(boxes) != 1 else (), dtype=dtype)
    for start, size, part in boxes:
        low, high = (max(a, start[0]), min(b, start[0] + size[0])) if shape else (0, 1)
        if low >= high:
            continue
        leaf = read_zip(part)
        if not isinstance(leaf, Leaf) or leaf.dtype != dtype or leaf.shape != size:
            raise CheckpointError(
                f"import: {str(part.path)!r} holds something else at {part.at} than {key[:200]!r}, as its metadata says"
            )
        if not shape:
            return leaf.read()
        if len(boxes) == 1:
            return leaf.rows(a, b)
        at = (slice(low - a, high - a), *(slice(s, s + n) for s, n in zip(start[1:], size[1:], strict=True)))
        out[at] = leaf.rows(low - start[0], high - start[0])
    return out
