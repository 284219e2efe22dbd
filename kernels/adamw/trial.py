"""Small updates on which a fast form must give the reference's bits."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from funczero.kernels.adamw import reference
from funczero.kernels.adamw.reference import Rates
from funczero.kernels.same import hard, same

RATES = (
    Rates(1e-3, 0.9, 0.999, 0.01, 1e-8, True),
    Rates(1e-3, 0.9, 0.999, 0.01, 1e-8, False),
    Rates(0.1, 0.3, 0.95, 0.0, 1e-3, True),
    Rates(0.1, 0.0, 0.0, 0.0, 1e-8, False),
)
FACTORS = (1.0, 0.7, 2.0**-17 / 3, 2.0**-9)
SIZES = (512, 0, 37, 1)

Case = tuple[list[list[Tensor]], Tensor, Tensor, Tensor, Rates]


def cases(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Case]]:
    """(words, the arguments of `update` with the four lists as one)."""
    for dtype in dtypes:
        columns = [hard(sum(SIZES), dtype, k).to(device) for k in range(4)]
        trees = [[*x.split(SIZES)] for x in (*columns[:3], columns[3].abs())]
        for rates in RATES:
            for k, factor in enumerate(FACTORS):
                count, scale, found = (torch.tensor(x, device=device) for x in (k * 40.0 + 1, factor, 0.0))
                yield f"{dtype}, {rates}, factor={factor}", (trees, count, scale, found, rates)


def called(module: ModuleType, case: Case) -> list[Tensor]:
    """Parameters and moments after an update of copies."""
    trees, count, factor, found, rates = case
    params, grads, mu, nu = ([x.clone() for x in tree] for tree in trees)
    module.update(params, grads, mu, nu, count, factor, found, rates)
    return [*params, *mu, *nu]


def differs(fast: ModuleType, device: torch.device) -> str:
    """The first update in which a form differs from the reference, in words; "" where none does."""
    for k, (words, case) in enumerate(cases(device, (torch.bfloat16, torch.float32))):
        if k % 3 == 0 and not all(same(x, y) for x, y in zip(called(fast, case), called(reference, case), strict=True)):
            return words
    return ""
