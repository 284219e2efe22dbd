"""A file as torch.save writes it, leaf by leaf: the pickle describes the tensors, and each storage is a member of the
zip, stored at a multiple of 64 bytes. torch.load(file, weights_only=True, mmap=True) reads it.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.checkpoint.formats.entry import Entry, written
from funczero.checkpoint.formats.pickles import STORAGES
from funczero.checkpoint.memory import numpy_view

ALIGN = 64
TYPES = {dtype: getattr(torch, name) for name, dtype in STORAGES.items() if dtype is not None}


class _Storage(NamedTuple):
    key: str
    entry: Entry


class _Tensor:
    def __init__(self, storage: _Storage) -> None:
        self.storage = storage


class _Pickler(pickle._Pickler):  # the one in python: its persistent_id is asked before a NamedTuple is taken apart
    def persistent_id(self, x: Any) -> Any:
        if not isinstance(x, _Storage):
            return None
        kind = TYPES.get(x.entry.dtype, torch.UntypedStorage)
        n = x.entry.nbytes // (x.entry.dtype.itemsize if kind is not torch.UntypedStorage else 1)
        return "storage", kind, x.key, "cpu", n

    def reducer_override(self, x: Any) -> Any:
        if not isinstance(x, _Tensor):
            return NotImplemented
        e = x.storage.entry
        stride = tuple(prod(max(1, n) for n in e.shape[i + 1 :]) for i in range(len(e.shape)))
        args: Any = (x.storage, 0, e.shape, stride, False, OrderedDict())
        if e.dtype in TYPES:
            return torch._utils._rebuild_tensor_v2, args
        return torch._utils._rebuild_tensor_v3, (*args, e.dtype)


def write(tree: Any, file: Path, read: Callable[[Entry], Tensor]) -> None:
    """A nested dict with an `Entry` in the place of every tensor.

    Args:
      tree: dicts, lists, entries and plain values; the same entry at two places is one storage.
    """
    stored: dict[Entry, _Tensor] = {}

    def described(x: Any) -> Any:
        if isinstance(x, Entry):
            bare = x._replace(key="", field="")
            return stored.setdefault(bare, _Tensor(_Storage(str(len(stored)), bare)))
        if isinstance(x, dict):
            return type(x)((k, described(v)) for k, v in x.items())
        return [described(v) for v in x] if isinstance(x, list) else x

    text = io.BytesIO()
    _Pickler(text, protocol=2).dump(described(tree))
    with written(file) as f, zipfile.ZipFile(f, "w", zipfile.ZIP_STORED, allowZip64=True) as z:
        for name, what in (("data.pkl", text.getvalue()), (".format_version", b"1"), (".storage_alignment", b"64"),
                           ("byteorder", b"little")):  # fmt: skip
            _member(z, f"archive/{name}", [what], len(what))
        for x in stored.values():
            name = f"archive/data/{x.storage.key}"
            _member(
                z,
                name,
                (numpy_view(read(e).view(-1)).view("uint8").data for e in (x.storage.entry,)),
                x.storage.entry.nbytes,
            )
        _member(z, "archive/version", [b"3\n"], 2)


def _member(z: zipfile.ZipFile, name: str, parts: Any, size: int) -> None:
    """One member, its values at a multiple of ALIGN: a field "FB" of the header fills up, as torch does it."""
    info = zipfile.ZipInfo(name)
    assert z.fp is not None
    start = z.fp.tell() + 30 + len(name) + 20 + 4  # header, name, zip64's sizes, the field's own head
    fill = -start % ALIGN
    info.extra = b"FB" + fill.to_bytes(2, "little") + b"Z" * fill
    with z.open(info, "w", force_zip64=True) as member:
        for part in parts:
            member.write(part)
