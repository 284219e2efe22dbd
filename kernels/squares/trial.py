"""Small cases on which a fast form must give the reference's integers."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from funczero.kernels.same import hard, same
from funczero.kernels.squares import reference
from funczero.kernels.squares.reference import CHUNK

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cases(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = DTYPES, sizes: tuple[tuple[int, ...], ...] = ()
) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(words, function, its arguments)."""
    for dtype in dtypes:
        for lengths in ((0,), (1,), (13, 0, 200), *sizes):
            xs = [hard(n, dtype, k).to(device) for k, n in enumerate(lengths)]
            given = {
                "": xs,
                ", finite": [x[: len(x) * 2 // 3] for x in xs],
                ", of one size": [x.nan_to_num(0, 1, 1).sin() for x in xs],
                ", zeros": [torch.zeros_like(x) for x in xs],
            }
            for wide in (False, True):
                for kind, ys in given.items():
                    yield f"square_bins, {dtype}, lengths={lengths}, wide={wide}{kind}", "square_bins", (ys, wide)


def called(module: ModuleType, name: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """What a function returns."""
    return [getattr(module, name)(*args)]


def differs(fast: ModuleType, device: torch.device) -> str:
    """The first case in which a form differs from the reference, in words; "" where none does."""
    for words, _, args in cases(device, (torch.bfloat16, torch.float32), ((CHUNK + 5, 40),)):
        if not same(fast.square_bins(*args), reference.square_bins(*args)):
            return words
    return ""
