"""Arrays of a tree that stock orbax wrote, as somebody else's: what it says is bounded before it is believed, and a
chunk that is missing is no zero.
"""

from __future__ import annotations

import json
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funczero.checkpoint import manifest
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.formats.leaf import Leaf
from funczero.checkpoint.memory import numpy_view, torch_dtype
from funczero.checkpoint.names import escape
from funczero.checkpoint.tools import progress

# leaves may have so many bytes, or so many times those of the files: more is no compression of weights
FREE, RATIO = 64 << 20, 1000


def read(source: Path, zeros: bool) -> dict[str, Leaf]:
    """Leaves by their names here: of an orbax tree, and of its "params" alone where it has them.

    Args:
      zeros: chunks that are not there are zeros.
    """
    root = next((p for p in (source, source / "state", source / "default") if (p / "_METADATA").exists()), None)
    if root is None:
        raise CheckpointError(
            f"import: {str(source)!r} holds neither safetensors nor a tree of orbax; give a .safetensors file, its"
            " index, a folder of them, or an orbax tree"
        )
    try:
        tree = json.loads(manifest.content(root / "_METADATA"))
        kind = "zarr3" if tree.get("use_zarr3") else "zarr"
        paths = [tuple(str(k["key"]) for k in entry["key_metadata"]) for entry in tree["tree_metadata"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(
            f"import: {str(root / '_METADATA')!r} is none of orbax's ({type(e).__name__}: {str(e)[:200]})"
        ) from None
    mine = [p for p in paths if p and p[0] == "params"]
    disk, asked, out = sum(p.stat().st_size for p in root.rglob("*") if p.is_file()), 0, {}
    for path in progress(mine or paths, "read"):
        key = ".".join(path)
        try:
            if ".." in key.split("/") or key.startswith("/") or "\\" in key:
                raise ValueError("its name leads out of the tree")
            values = _opened(root, kind, key, zeros)
            asked += prod(values.shape) * torch_dtype(values.dtype.name).itemsize
            if asked > max(FREE, RATIO * disk):
                raise ValueError(
                    f"its shape is {list(values.shape)}, with which the leaves would have {asked} bytes; the files have"
                    f" {disk}"
                )
            chunk = values.chunk_layout.read_chunk.shape or values.shape
            if any(c > max(1, n) for c, n in zip(chunk, values.shape, strict=True)):
                raise ValueError(f"its chunks of {list(chunk)} are larger than its shape {list(values.shape)}")
        except Exception as e:
            raise _unread(key, root, tree, e) from None
        rows = partial(_rows, values, partial(_unread, key, root, tree))
        x = Leaf(torch_dtype(values.dtype.name), tuple(values.shape), rows, str(root))
        out["/".join(("params", *(escape(p) for p in (path[1:] if mine else path))))] = x
    return out


def _rows(values: Any, unread: Any, a: int, b: int) -> Tensor:
    """Some rows of an array."""
    try:
        part = values[a:b] if values.ndim else values
        x = torch.empty(tuple(part.shape), dtype=torch_dtype(values.dtype.name))
        numpy_view(x)[...] = part.read().result()
        return x
    except Exception as e:
        raise unread(e) from None


def _unread(key: str, root: Path, tree: dict[str, Any], e: Exception) -> CheckpointError:
    """Why an array cannot be read."""
    hint = (
        ""
        if tree.get("store_array_data_equal_to_fill_value") or "missing" not in str(e)
        else "; its writer may have left out chunks of zeros: if so, write --zeros"
    )
    why = str(e).split(" [tensorstore")[0].split(" [source")[0][:400]
    return CheckpointError(f"import: {key!r} of {str(root)!r} cannot be read ({why}{hint})")


def _opened(root: Path, kind: str, key: str, zeros: bool) -> Any:
    import tensorstore as ts

    base = {"driver": "file", "path": f"{root}/"}
    packed = (root / "manifest.ocdbt").exists()
    kv = (
        {"driver": "ocdbt", "base": base, "path": key + "/"} if packed else {"driver": "file", "path": f"{root}/{key}/"}
    )
    return ts.open({"driver": kind, "kvstore": kv, "fill_missing_data_reads": zeros}, open=True, read=True).result()
