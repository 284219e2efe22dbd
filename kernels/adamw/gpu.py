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
from funczero.kernels.segments import divided, narrow, stored

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
    n = count.double()
    size, correction = rates.lr / (1 - rates.beta1**n), (1 - rates.beta2**n).sqrt()
    keep = 1 - rates.lr * torch.as_tensor(rates.weight_decay, dtype=torch.float64, device=n.device)
    numbers = torch.stack([x.double().reshape(()) for x in (size, correction, keep, factor, found)])
    for p, g, m, v in leaves:
        dtype = p.dtype
        _update[(triton.cdiv(p.numel(), WIDTH),)](
            stored(p), p, g, stored(m), m, stored(v), v, numbers, p.numel(), rates.beta1, rates.beta2,
            rates.weight_decay, rates.eps, rates.decoupled, dtype == torch.float64, dtype == torch.bfloat16,
            dtype == torch.float16, WIDTH,
        )  # fmt: skip


@triton.jit
def _update(
    to_p, p, g, to_m, m, to_v, v, numbers, n, BETA1: tl.constexpr, BETA2: tl.constexpr, DECAY: tl.constexpr,
    EPS: tl.constexpr, DECOUPLED: tl.constexpr, WIDE: tl.constexpr, BFLOAT: tl.constexpr, HALF: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    if tl.load(numbers + 4) == 0:
        at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
        inside = at < n
        C: tl.constexpr = tl.float64 if WIDE else tl.float32
        size, correction, keep = (tl.load(numbers + 0).to(C), tl.load(numbers + 1).to(C), tl.load(numbers + 2).to(C))
        param, grad = tl.load(p + at, mask=inside).to(C), tl.load(g + at, mask=inside).to(C)
        mu, nu = tl.load(m + at, mask=inside).to(C), tl.load(v + at, mask=inside).to(C)
        grad = grad * tl.load(numbers + 3).to(C)
        if DECOUPLED:
            param = param * keep
        else:
            grad += param * DECAY
        mu += (1 - BETA1) * (grad - mu)
        nu = nu * BETA2 + (1 - BETA2) * grad * grad
        roots = tl.sqrt(nu) if WIDE else tl.sqrt_rn(nu)
        zeros = tl.zeros([WIDTH], C)
        param -= divided(size * mu, divided(roots, correction + zeros) + EPS)
        tl.store(to_m + at, narrow(mu, BFLOAT, HALF), mask=inside)
        tl.store(to_v + at, narrow(nu, BFLOAT, HALF), mask=inside)
        tl.store(to_p + at, narrow(param, BFLOAT, HALF), mask=inside)
