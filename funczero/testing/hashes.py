"""The hash of a tree: equal where all bits are."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from funczero.core.tree import paths


def tree_hash(tree: Any) -> str:
    """sha256 over the paths, dtypes, shapes and bytes of a tree's leaves, in the order of their paths.

    Equal hashes mean equal bits, -0.0 and NaN payloads included; devices, strides and the order of dict keys do not
    count.

    >>> a = {"w": torch.zeros(2, 3), "b": [torch.ones(1)]}
    >>> same, other = {"b": [torch.ones(1)], "w": torch.zeros(3, 2).T}, {"w": torch.zeros(3, 2), "b": [torch.ones(1)]}
    >>> tree_hash(a) == tree_hash(same), tree_hash(a) == tree_hash(other)
    (True, False)
    """
    out = hashlib.sha256()
    for path, leaf in sorted(paths(tree), key=lambda item: item[0]):
        if isinstance(leaf, Tensor):
            out.update(f"{path} {leaf.dtype} {tuple(leaf.shape)}\n".encode())
            out.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            out.update(f"{path} {leaf!r}\n".encode())
    return out.hexdigest()
