"""The Hadamard transform of groups of neighbours in plain torch: sums and differences alone, in one order.

Source: Jia et al., SDP4Bit, arXiv 2410.15526.
"""

from __future__ import annotations

import torch
from torch import Tensor

Lengths = tuple[int, ...]


def hadamard(x: Tensor, lengths: Lengths, width: int) -> Tensor:
    """Every group of `width` neighbours of a part times the Hadamard matrix of ones and minus ones; a part that is no
    multiple of width stays.

    Args:
      x: [n], made of parts of these lengths.
      width: a power of two.

    >>> hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), (4, 1), 4)
    tensor([10., -2., -4.,  0.,  5.])
    """
    parts = [part if part.numel() % width else _butterflies(part, width) for part in x.split(lengths)]
    return torch.cat(parts) if parts else x


def hadamard_back(x: Tensor, lengths: Lengths, width: int) -> Tensor:
    """What `hadamard` was given: the matrix is its own inverse, but for a factor of width.

    >>> hadamard_back(torch.tensor([10.0, -2.0, -4.0, 0.0]), (4,), 4)
    tensor([1., 2., 3., 4.])
    """
    parts = [part if part.numel() % width else _butterflies(part, width).div_(width) for part in x.split(lengths)]
    return torch.cat(parts) if parts else x


def _butterflies(x: Tensor, width: int) -> Tensor:
    step = 1
    while step < width:
        low, high = x.view(-1, 2, step).unbind(1)
        x = torch.stack([low + high, low - high], 1).view(-1)
        step *= 2
    return x
