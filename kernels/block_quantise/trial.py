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
    for form in (*reference.INTEGERS, *reference.FLOATS):
        for dtype in dtypes:
            wide = torch.promote_types(dtype, torch.float32)
            for lengths in many[0]:
                for block in many[1]:
                    x = hard(sum(lengths), dtype).to(device)
                    words = f"{form}, {dtype}, lengths={lengths}, block={block}"
                    yield f"quantise, {words}", "quantise", (x, lengths, block, form)
                    codes, tops = reference.quantise(hard(len(x), wide, 1).to(device), lengths, block, form)
                    coded = (codes, tops.to(device))
                    yield f"dequantise, {words}", "dequantise", (*coded, lengths, block, form, dtype)
                    yield f"requantise, {words}", "requantise", (*coded, x, lengths, block, form)


def differs(fast: ModuleType, device: torch.device) -> str:
    """The first case in which a form differs from the reference, in words; "" where none does."""
    for words, name, args in cases(device, (torch.bfloat16, torch.float32)):
        found, want = (_tensors(getattr(module, name)(*args)) for module in (fast, reference))
        if not all(same(x, y) for x, y in zip(found, want, strict=True)):
            return words
    return ""


def _tensors(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)
