"""Leaves of which every rank of a sum has its own: in a world of another size their sum is the first rank's."""

from __future__ import annotations

from math import prod

from torch import Tensor

from funczero.checkpoint.layout import Box
from funczero.checkpoint.names import Part


def folds(part: Part, shape: tuple[int, ...]) -> bool:
    """Is an array of this shape the same leaf, kept by another number of ranks?"""
    if part.where is None or not part.where.terms or shape == part.shape:
        return False
    leaf = part.where.structure.leaves[part.leaf].shape
    lead = len(shape) - len(leaf)
    return lead > 0 and prod(shape[:lead]) > 0 and shape[lead:] == leaf


def source_box(part: Part, shape: tuple[int, ...]) -> Box:
    """What of an array this rank's part is the sum of; nothing where it is not the first rank."""
    assert part.where is not None
    n = len(part.where.terms)
    lead = len(shape) - (len(part.shape) - n)
    first = not any(part.start[:n])
    return Box((0,) * lead + part.start[n:], (*(shape[:lead] if first else (0,) * lead), *part.value.shape[n:]))


def fold(part: Part, found: Tensor) -> None:
    """Fill a part with the sum of what every rank kept."""
    assert part.where is not None
    lead = found.dim() - (part.value.dim() - len(part.where.terms))
    total = found.flatten(0, lead - 1).sum(0) if found.numel() else found.new_zeros(())
    for x in (part.value, *part.also):
        x.copy_(total.expand(x.shape) if not found.numel() else total.view(x.shape))
