"""Values that are hard to get right, and whether two results are one."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
ODD = (float("nan"), float("inf"), -float("inf"))


def hard(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """n values on the CPU: of many sizes, with zeros of both signs, ties, subnormal and the largest numbers, and in
    their last third what is not finite.
    """
    g = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    x = torch.randn(n, generator=g, dtype=torch.float64) * 2.0 ** torch.randint(-9, 9, (n,), generator=g)
    special = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -3.5, info.tiny, info.smallest_normal / 4, -info.tiny / 2]
    late = [info.max / 128, info.max, -info.max, *ODD]
    for values, places in ((special, torch.arange(n)[3::4]), (late, torch.arange(n)[9::16][n // 24 :])):
        x[places] = torch.tensor(values, dtype=torch.float64)[torch.arange(len(places)) % len(values)]
    return x.to(dtype)


def same(x: Tensor, y: Tensor) -> bool:
    """Equal bit for bit, but that any nan is one: torch itself rounds nan to different bits in vectors and tails."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if x.is_floating_point():
        odd = x.isnan()
        if not torch.equal(odd, y.isnan()):
            return False
        x, y = (z.masked_fill(odd, 0).contiguous().view(INTEGERS[z.itemsize]) for z in (x, y))
    return torch.equal(x, y)
