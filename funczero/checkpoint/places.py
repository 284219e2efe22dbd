"""Where the values of a store lie in its files: OCDBT's tree of keys, as tensorstore tells it.

Facts: a node's keys lack what all keys below its entry in the parent begin with; small values stand in the nodes
themselves. tensorstore compares a node with its checksum, and says nothing of what the values hold.

Source: https://google.github.io/tensorstore/kvstore/ocdbt, "Storage format".
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from funczero.checkpoint.error import CheckpointError

DEEP = 64  # levels of a tree


class Place(NamedTuple):
    """A value in a file."""

    file: Path
    start: int
    size: int


class Node(NamedTuple):
    """A node of the tree, its keys whole."""

    keys: list[bytes]
    entries: list[dict[str, Any]]


class Places:
    """The newest version of a store; of its nodes those above the keys that are asked for are read, each once."""

    def __init__(self, folder: Path, most: int) -> None:
        """Reads the store's manifest.

        Args:
          most: keys; a store that says it has more is refused before it is read.

        Raises:
          CheckpointError: it holds more keys. What tensorstore raises where it is no store.
        """
        import tensorstore as ts

        self._dump, self._folder, self._nodes = ts.ocdbt.dump, folder, dict[str, Node]()
        self._base = ts.KvStore.open({"driver": "file", "path": f"{folder}/"}).result()
        newest = self._dump(self._base).result()["versions"][-1]["root"]
        if (count := newest["statistics"]["num_keys"]) > most:
            raise CheckpointError(f"checkpoint: the store in {str(folder)!r} holds {count} values instead of {most}")
        self._root: str | None = newest.get("location")  # none where there is no key

    def of(self, name: str) -> Place | bytes | None:
        """Where the value of a key lies, or itself; None where there is none."""
        key, prefix, at = name.encode(), b"", self._root
        for _ in range(DEEP):
            if at is None:
                return None
            node = self._node(at, prefix)
            i = bisect_right(node.keys, key) - 1
            if i < 0:
                return None
            entry = node.entries[i]
            if "location" not in entry:
                return self._value(entry) if node.keys[i] == key else None
            prefix, at = prefix + entry["subtree_common_prefix"], entry["location"]
        raise CheckpointError(f"checkpoint: the store in {str(self._folder)!r} has a tree without an end")

    def _node(self, at: str, prefix: bytes) -> Node:
        if at not in self._nodes:
            entries = self._dump(self._base, at).result()["entries"]
            self._nodes[at] = Node([prefix + e["key"] for e in entries], entries)
        return self._nodes[at]

    def _value(self, entry: dict[str, Any]) -> Place | bytes:
        """A value that stands in its node, or what `value:<folder>:<file>:<start>:<size>` says."""
        if "inline_value" in entry:
            return bytes(entry["inline_value"])
        kind, base, rest = entry["indirect_value"].split(":", 2)
        name, start, size = rest.rsplit(":", 2)
        path = PurePosixPath(base + name)
        if kind != "value" or path.is_absolute() or ".." in path.parts:
            raise CheckpointError(
                f"checkpoint: the store in {str(self._folder)!r} names {str(path)[:100]!r}, which is no value inside it"
            )
        return Place(self._folder / path, int(start), int(size))
