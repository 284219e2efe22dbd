"""Values as int64 words: an integer sum to which one rank brings the words, and the others zeros, hands them on bit
for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

WORD = 8  # bytes


def count(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The words of one row of this shape.

    >>> count((3,), torch.float32), count((), torch.bool), count((0, 2), torch.float64)
    (2, 1, 0)
    """
    return -(-prod(shape) * dtype.itemsize // WORD)


def words(x: Tensor) -> Tensor:
    """[rows, ...] of any dtype -> int64 [rows, words].

    >>> x = torch.tensor([[1.0, -0.0, torch.inf]])
    >>> values(words(x), (3,), x.dtype)
    tensor([[1., -0., inf]])
    """
    rows, n = len(x), count(x.shape[1:], x.dtype)
    out = torch.zeros(rows, n * WORD, dtype=torch.uint8, device=x.device)
    if n and rows:
        flat = x.detach().reshape(-1).contiguous().view(torch.uint8).view(rows, -1)
        out[:, : flat.shape[1]] = flat
    return out.view(torch.int64) if out.numel() else out.new_zeros(rows, n, dtype=torch.int64)


def values(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """int64 [rows, words] -> [rows, *shape]: what `words` was given."""
    n = prod(shape) * dtype.itemsize
    raw = x.contiguous().view(torch.uint8)[:, :n] if n and len(x) else x.new_zeros(len(x), n, dtype=torch.uint8)
    return raw.reshape(-1).clone().view(dtype).view(len(x), *shape)  # a clone's memory is aligned
