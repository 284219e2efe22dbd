"""AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero import tree
from funczero.optim import rates
from funczero.spec import Slots
from funczero.types import GradientTransformation


class AdamW(NamedTuple):
    """Moments like the parameters, in their dtype, and the number of applied updates."""

    count: Tensor  # float32, as torch's kernel wants it
    mu: Any
    nu: Any


def adamw(lr: rates.Rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: rates.Rate = 0.01) -> GradientTransformation:
    """p <- p (1 - lr wd) - lr m' / (sqrt(v') + eps), with m', v' the bias-corrected moments of the gradient and its square.

    Elementwise: each value depends on its own place alone. The fused form is torch's kernel; `update` is the plain oracle.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree; DeepSpeed: optimizer.params.lr.
      b1, b2: decay of the moments per update, in [0, 1).
      eps: added to the root of the second moment; positive.
      weight_decay: decoupled, per update times lr; number, schedule, rules or tree.
    """
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps > 0):
        raise ValueError(f"adamw: b1={b1}, b2={b2} must lie in [0, 1) and eps={eps} be positive")

    def init(params: Any) -> AdamW:
        leaf = next(iter(tree.tensors(params)), torch.zeros(()))
        return AdamW(torch.zeros((), dtype=torch.float32, device=leaf.device), *(tree.map(torch.zeros_like, params) for _ in range(2)))

    def update(grads: Any, state: AdamW, params: Any) -> tuple[Any, AdamW]:
        n = state.count + 1
        mu = tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        step = rates.update_trees(lr, params, state.count, "lr")
        decay = rates.update_trees(weight_decay, params, state.count, "weight_decay")
        one, two = 1 - b1 ** n.double().item(), 1 - b2 ** n.double().item()
        updates = tree.map(lambda m, v, p, a, d: -a * (m / one / ((v / two).sqrt() + eps) + d * p), mu, nu, params, step, decay)
        return updates, AdamW(n, mu, nu)

    def apply(params: Slots, grads: Slots, factor: Tensor, state: AdamW, ok: Tensor) -> tuple[Slots, AdamW, dict[str, Tensor]]:
        found, inverse = (~ok).float(), (1 / factor).float()
        before, n = state.count, state.count + ok
        if grads.buffers[0].dtype != torch.float32:  # the kernel takes its scale in float32
            torch._foreach_mul_(list(grads.buffers), factor.to(grads.buffers[0].dtype))
            inverse = torch.ones_like(inverse)
        for a, d, (p, g, m, v) in rates.groups(lr, weight_decay, params, grads, state.mu, state.nu):
            torch._fused_adamw_(
                p, g, m, v, [], [n] * len(p), lr=rates.at(a, before), beta1=b1, beta2=b2, weight_decay=_number(rates.at(d, before)), eps=eps,
                amsgrad=False, maximize=False, grad_scale=inverse, found_inf=found,
            )  # fmt: skip
        return params, AdamW(n, state.mu, state.nu), {"lr": rates.shown(lr, before)}

    return GradientTransformation(init, update, apply, "adamw", elementwise=True)


def _number(x: float | Tensor) -> float:
    return float(x)
