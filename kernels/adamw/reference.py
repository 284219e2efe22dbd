"""AdamW and Adam in torch's own fused kernel, with the factor of the gradient and the skip in it.

Source: Loshchilov and Hutter, arXiv 1711.05101; Kingma and Ba, arXiv 1412.6980; torch.optim.AdamW(fused=True).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

VECTOR = 16  # values; torch's kernel on a CPU rounds what is left over at a leaf's end in another way


class Rates(NamedTuple):
    """The numbers of one update."""

    lr: float | Tensor
    beta1: float
    beta2: float
    weight_decay: float
    eps: float
    decoupled: bool  # AdamW; else Adam, whose decay is in the gradient


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
    """p, m and v after one update, in place.

    Law: elementwise: a value depends on its own old values alone, wherever it lies in however long a leaf. Gradients
    may be written into, and nobody reads them afterwards.

    Args:
      params, grads, mu, nu: leaves in one dtype.
      count: float32, 0-d: applied updates with this one.
      factor: 0-d: what the gradients are to be multiplied by. In float32 they are divided by 1 / factor, in other
        dtypes multiplied by the factor and rounded.
      found: float32, 0-d: 1 where the update is skipped, and then nothing is read; 0 where not.

    >>> p, m, v = torch.ones(16), torch.zeros(16), torch.zeros(16)
    >>> rates = Rates(0.1, 0.9, 0.999, 0.0, 1e-8, True)
    >>> update([p], [torch.full((16,), 4.0)], [m], [v], torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.0), rates)
    >>> p[0], m[0]
    (tensor(0.9000), tensor(0.2000))
    """
    odd = [i for i, x in enumerate(params) if x.is_cpu and x.numel() % VECTOR]
    if odd:
        _on_whole_vectors([params, grads, mu, nu], odd, count, factor, found, rates)
        return
    inverse = (1 / factor).float()
    if grads and grads[0].dtype != torch.float32:  # the kernel takes its scale in float32
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))
        inverse = torch.ones_like(inverse)
    kernel = torch._fused_adamw_ if rates.decoupled else torch._fused_adam_
    kernel(
        params,
        grads,
        mu,
        nu,
        [],
        [count] * len(params),
        lr=rates.lr,
        beta1=rates.beta1,
        beta2=rates.beta2,
        weight_decay=rates.weight_decay,
        eps=rates.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=inverse,
        found_inf=found,
    )


def _on_whole_vectors(
    trees: list[list[Tensor]], odd: list[int], count: Tensor, factor: Tensor, found: Tensor, rates: Rates
) -> None:
    """The update, with copies that zeros fill up in place of the odd leaves."""
    padded = [[*tree] for tree in trees]
    for tree in padded:
        for i in odd:
            tree[i] = torch.nn.functional.pad(tree[i].flatten(), (0, -tree[i].numel() % VECTOR))
    params, grads, mu, nu = padded
    update(params, grads, mu, nu, count, factor, found, rates)
    for old, new in zip(trees, padded, strict=True):
        for i in odd:
            old[i].copy_(new[i][: old[i].numel()].view_as(old[i]))
