"""Small cases on which a fast form must give the reference's integers."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from funczero.kernels.grid import reference
from funczero.kernels.same import hard, same

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BOUNDS = (((0, 70), (70, 71), (80, 80), (80, 200)), ())
SHIFTS = (0, 37, 60, -20)


def cases(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = DTYPES, shifts: tuple[int, ...] = SHIFTS
) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(words, function, its arguments); an int64 tensor at their end is written into."""
    g = torch.Generator().manual_seed(0)
    for bounds in BOUNDS:
        for shift in shifts:
            moved = torch.arange(len(bounds), device=device) * 3 + shift
            low = torch.randint(-(2**62), 2**62, (205,), generator=g) >> torch.randint(0, 62, (205,), generator=g)
            low, high = low.to(device), (low >> 40).to(device)
            for dtype in dtypes:
                words = f"{dtype}, bounds={bounds}, shift={shift}"
                rows = torch.stack([hard(205, dtype, k) for k in range(2)]).to(device)
                yield f"to_grid_add, {words}", "to_grid_add", (rows, bounds, moved, low)
                yield (
                    f"to_grid_add of finite values, {words}",
                    "to_grid_add",
                    (rows[0, :99].sin(), bounds[:2], moved[:2], low[:99]),
                )
                yield f"add_high, {words}", "add_high", (rows, bounds, moved, low)
                for split in (None, high):
                    yield f"from_grid, {words}", "from_grid", (low, split, bounds, moved, dtype)


def called(module: ModuleType, name: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """What a function returns, and what it has written into a copy."""
    if name == "from_grid":
        return [module.from_grid(*args)]
    into = args[-1].clone()
    returned = getattr(module, name)(*args[:-1], into)
    return [into] if returned is None else [into, returned]


def differs(fast: ModuleType, device: torch.device) -> str:
    """The first case in which a form differs from the reference, in words; "" where none does."""
    for words, name, args in cases(device, (torch.bfloat16, torch.float32), (37,)):
        found, want = (called(module, name, args) for module in (fast, reference))
        if not all(same(x, y) for x, y in zip(found, want, strict=True)):
            return words
    return ""
