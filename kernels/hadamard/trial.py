"""Small cases on which a fast form must give the reference's bits."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from funczero.kernels.hadamard import reference
from funczero.kernels.same import hard, same

LENGTHS = ((), (0,), (64,), (37, 1, 64, 0, 128, 5))


def cases(device: torch.device) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(words, function, its arguments)."""
    for dtype in (torch.float32, torch.float64):
        for lengths in LENGTHS:
            for width in (1, 2, 4, 8, 64):
                x = hard(sum(lengths), dtype).to(device)
                for name in ("hadamard", "hadamard_back"):
                    yield f"{name}, {dtype}, lengths={lengths}, width={width}", name, (x, lengths, width)


def differs(fast: ModuleType, device: torch.device) -> str:
    """The first case in which a form differs from the reference, in words; "" where none does."""
    for words, name, args in cases(device):
        if not same(getattr(fast, name)(*args), getattr(reference, name)(*args)):
            return words
    return ""
