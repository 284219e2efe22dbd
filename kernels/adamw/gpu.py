"""AdamW and Adam in Triton, for CUDA and ROCm: one pass that neither writes gradients nor waits for the host.

It has the formula of torch's kernel, and not its bits: which products and sums a device's compiler fuses is not the
same for both. So it runs where FUNCZERO_KERNELS=bounded asks for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from funczero.kernels.adamw import reference
from funczero.kernels.adamw.reference import Rates
from funczero.kernels.segments import divided, narrow, stored, widen

BOUND = "moments within 4 units in the last place of their largest term, parameters within 8"
WIDTH = 1024


def update(
    params: list[Tensor],
    grads: list[Tensor],
    mu: list[Tensor],
    nu: list[Tensor],
    count: Tensor,
    factor: Tensor,
    found: Tensor,
    rates: Rates,
) -> None:
    """As the reference's, within BOUND."""
    leaves = [leaf for leaf in zip(params, grads, mu, nu, strict=True) if leaf[0].numel()]
    if any(not x.is_contiguous() or x.dtype != leaf[0].dtype for leaf in leaves for x in leaf):
        reference.update(params, grads, mu, nu, count, factor, found, rates)
        return
    updates, fixed = count.double(), lambda x: torch.full((), x, dtype=torch.float64, device=count.device)
    numbers = torch.stack(
        [
            (rates.lr / (1 - rates.beta1**updates)).double(),
            (1 - rates.beta2**updates).sqrt(),
            (1 - rates.lr * fixed(rates.weight_decay)).double(),
            *(x.double().reshape(()) for x in (factor, found)),
            *map(fixed, (1 - rates.beta1, rates.beta2, 1 - rates.beta2, rates.weight_decay, rates.eps)),
        ]
    )  # numbers in memory, so that a schedule compiles nothing anew and the host waits for nothing
    for leaf in leaves:
        n, dtype = leaf[0].numel(), leaf[0].dtype
        _update[(triton.cdiv(n, WIDTH),)](
            *map(stored, leaf), numbers, n, rates.decoupled, dtype == torch.float64, dtype == torch.bfloat16,
            dtype == torch.float16, WIDTH,
        )  # fmt: skip


@triton.jit
def _update(
    p, g, m, v, numbers, n, DECOUPLED: tl.constexpr, WIDE: tl.constexpr, BFLOAT: tl.constexpr, HALF: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    if tl.load(numbers + 4) == 0:
        at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
        inside = at < n
        C: tl.constexpr = tl.float64 if WIDE else tl.float32
        size, correction, keep = tl.load(numbers).to(C), tl.load(numbers + 1).to(C), tl.load(numbers + 2).to(C)
        weight, beta2, weight2 = tl.load(numbers + 5).to(C), tl.load(numbers + 6).to(C), tl.load(numbers + 7).to(C)
        decay, eps = tl.load(numbers + 8).to(C), tl.load(numbers + 9).to(C)
        param, grad = widen(tl.load(p + at, mask=inside), C, BFLOAT), widen(tl.load(g + at, mask=inside), C, BFLOAT)
        mu, nu = widen(tl.load(m + at, mask=inside), C, BFLOAT), widen(tl.load(v + at, mask=inside), C, BFLOAT)
        grad = grad * tl.load(numbers + 3).to(C)
        if DECOUPLED:
            param = param * keep
        else:
            grad += param * decay
        mu += weight * (grad - mu)
        nu = nu * beta2 + weight2 * grad * grad
        roots = tl.sqrt(nu) if WIDE else tl.sqrt_rn(nu)
        param -= divided(size * mu, divided(roots, correction + tl.zeros([WIDTH], C)) + eps)
        tl.store(m + at, narrow(mu, BFLOAT, HALF), mask=inside)
        tl.store(v + at, narrow(nu, BFLOAT, HALF), mask=inside)
        tl.store(p + at, narrow(param, BFLOAT, HALF), mask=inside)
