"""Small cases on which a fast form must give the reference's checksums."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from funczero.kernels.crc32c import reference
from funczero.kernels.same import same


def cases(device: torch.device) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(words, function, its arguments); a file's content stands for the file."""
    x = torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).to(device)
    for start, n in ((0, 0), (0, 1), (3, 7), (1, 8), (5, 1003), (0, 5000)):
        for before in (0, 0xE3069283):
            yield f"crc32c, {n} bytes from {start}, before={before}", "crc32c", (x[start : start + n], before)
        yield f"read, {n} bytes from {start}", "read", (x, start, torch.zeros(n, dtype=torch.uint8, device=device))
        yield f"write, {n} bytes at {start}", "write", (x[start : start + n], start)


def called(module: ModuleType, name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What a function returns and fills, as tensors."""
    if name == "crc32c":
        return (torch.tensor(module.crc32c(*args)),)
    if name == "write":
        with tempfile.TemporaryFile() as file:
            crc = module.write(file.fileno(), args[1], args[0])
            return torch.tensor(crc), torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    content, start, out = args
    with tempfile.TemporaryFile() as file:
        file.write(content.numpy().tobytes())
        file.flush()
        crc = module.read(file.fileno(), start, out.zero_())
    return torch.tensor(crc), out.clone()


def differs(fast: ModuleType, device: torch.device) -> str:
    """The first case in which a form differs from the reference, in words; "" where none does."""
    for words, name, args in cases(device):
        if not all(same(x, y) for x, y in zip(called(fast, name, args), called(reference, name, args), strict=True)):
            return words
    return ""
