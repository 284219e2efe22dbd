"""A store that is written once: its keys as one node of OCDBT's tree, and the manifest that leads to it.

Facts: a node is columns, of numbers of seven bits a byte, of keys without what they share with the key before; a value
stands in it, or is named by its place in a file. tensorstore compares a node with its checksum and its keys' order.

Source: https://google.github.io/tensorstore/kvstore/ocdbt, "Storage format".
"""

from __future__ import annotations

import os
import struct
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from funczero.kernels.registry import kernel

MOST = 1 << 20  # keys of a node
INLINE = 1024  # bytes of a value that stands in a node
SIZES = {"max_inline_value_bytes": INLINE, "max_decoded_node_bytes": 10**8}
CONFIG = SIZES | {"manifest_kind": "single"}
MAGIC, LEAF = 0x0CDB20DE, 0  # of a node; its height


class Span(NamedTuple):
    """Where a value lies in the store's one file of values."""

    start: int
    size: int


def node(file: str, values: Mapping[str, bytes | Span]) -> bytes:
    """All keys of a store with their values or where those lie.

    Args:
      file: that values lie in, as the store's folder has it.
      values: at least one, at most MOST.
    """
    keys = sorted((key.encode(), value) for key, value in values.items())
    names, path = [key for key, _ in keys], file.encode()
    shared = [len(os.path.commonprefix(pair)) for pair in zip(names, names[1:], strict=False)]
    new = [name[n:] for name, n in zip(names, [0, *shared], strict=True)]
    spans = [value for _, value in keys if isinstance(value, Span)]
    body = [
        bytes([LEAF]),
        (
            _numbers([1, len(path), 0]) + path if spans else _numbers([0])
        ),  # files: one, of a path that is no base of others
        _numbers([len(names)]),
        _numbers(shared),
        _numbers(map(len, new)),
        *new,
        _numbers(value.size if isinstance(value, Span) else len(value) for _, value in keys),
        _numbers(int(isinstance(value, Span)) for _, value in keys),
        _numbers(0 for _ in spans),
        _numbers(span.start for span in spans),
        *(value for _, value in keys if not isinstance(value, Span)),
    ]
    text = b"".join((bytes(2), *body))  # version 0, not compressed
    text = struct.pack(">I", MAGIC) + struct.pack("<Q", 12 + len(text) + 4) + text
    return text + crc(text).to_bytes(4, "little")


def manifest(file: str, at: Span, values: Mapping[str, bytes | Span]) -> bytes:
    """What is written beside the files of a store: where its one node lies.

    Args:
      file: that the node lies in.
    """
    import tensorstore as ts

    indirect = sum(value.size for value in values.values() if isinstance(value, Span))
    sizes = {"num_keys": len(values), "num_tree_bytes": at.size, "num_indirect_value_bytes": indirect}
    root = {"location": f"btreenode::{file}:{at.start}:{at.size}", "statistics": sizes}
    version = {"generation_number": 1, "root_height": LEAF, "commit_time": time.time_ns(), "root": root}
    config = SIZES | {"uuid": uuid.uuid4().hex, "version_tree_arity_log2": 4, "compression": {"id": "zstd"}}
    said: Any = {"config": config, "versions": [version], "version_tree_nodes": []}
    return ts.ocdbt.undump_manifest(said)


def crc(text: bytes) -> int:
    """The checksum of bytes."""
    return kernel("crc32c", torch.device("cpu")).crc32c(torch.frombuffer(bytearray(text), dtype=torch.uint8))


def _numbers(numbers: Iterable[int]) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow.

    >>> _numbers([1, 127, 128, 300]).hex()
    '017f8001ac02'
    """
    out = bytearray()
    for n in numbers:
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        out.append(n)
    return bytes(out)
