"""Small cases on which a fast form must give the reference's bits."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from funczero.kernels.block_quantise import reference
from funczero.kernels.same import hard, same

LENGTHS = ((37, 1, 64, 0, 5),)
BLOCKS = (16, 33)
MORE = (*LENGTHS, (), (0,), (1,), (130, 257)), (1, *BLOCKS)  # for tests


def cases(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    many: tuple[tuple[tuple[int, ...], ...], tuple[int, ...]] = (LENGTHS, BLOCKS),
) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(words, function, its arguments); many: lengths and blocks."""
    for dtype in dtypes:
        wide = torch.promote_types(dtype, torch.float32)
        for lengths in many[0]:
            x, other = hard(sum(lengths), dtype).to(device), hard(sum(lengths), wide, 1).to(device)
            for block in many[1]:
                for form in (*reference.INTEGERS, *reference.FLOATS):
                    words, given = f"{form}, {dtype}, lengths={lengths}, block={block}", (lengths, block, form)
                    coded = reference.quantise(other, *given)
                    yield f"quantise, {words}", "quantise", (x, *given)
                    yield f"dequantise, {words}", "dequantise", (*coded, *given, dtype)
                    yield f"requantise, {words}", "requantise", (*coded, x, *given)


def differs(fast: ModuleType, device: torch.device) -> str:
    """The first case in which a form differs from the reference, in words; "" where none does."""
    for words, name, args in cases(device, (torch.bfloat16, torch.float32)):
        found, want = (_tensors(getattr(module, name)(*args)) for module in (fast, reference))
        if not all(same(x, y) for x, y in zip(found, want, strict=True)):
            return words
    return ""


def _tensors(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)
