"""AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101; Adam: Kingma and Ba, arXiv 1412.6980."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import number
from funczero.core.types import GradientTransformation
from funczero.layout.slots import Slots
from funczero.optim import rates


class AdamW(NamedTuple):
    """Moments like the parameters, in their dtype, and the number of applied updates."""

    count: Tensor  # float32, as torch's kernel wants it
    mu: Any
    nu: Any


def adamw(lr: rates.Rate, b1: rates.Beta = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: rates.Rate = 0.01) -> GradientTransformation:
    """p <- p (1 - lr wd) - lr m' / (sqrt(v') + eps), with m', v' the bias-corrected moments of the gradient and its square.

    Elementwise: each value depends on its own place alone. The fused form is torch's kernel; `update` is the plain oracle.

    Args:
      lr: number, schedule of applied updates, rules [(regex, rate), ...] or tree; DeepSpeed: optimizer.params.lr.
      b1, b2: decay of the moments per update, in [0, 1); b1 may be a schedule (DeepSpeed: OneCycle's momentum).
      eps: added to the root of the second moment; positive.
      weight_decay: decoupled, per update times lr; number, schedule, rules or tree.
    """
    return _adam("adamw", lr, b1, b2, eps, weight_decay)


def adam(lr: rates.Rate, b1: rates.Beta = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: rates.Rate = 0.0) -> GradientTransformation:
    """p <- p - lr m' / (sqrt(v') + eps): as adamw, with wd p added to the gradient before its moments.

    Args: as adamw's; DeepSpeed: optimizer.type Adam with adam_w_mode false.
    """
    return _adam("adam", lr, b1, b2, eps, weight_decay)


def _adam(name: str, lr: rates.Rate, b1: rates.Beta, b2: float, eps: float, weight_decay: rates.Rate) -> GradientTransformation:
    rate, eps = rates.Rates(name, lr, weight_decay), number(name, "eps", eps, above=True)
    b1, b2 = rates.one_for_all(name, "b1", b1), rates.one_for_all(name, "b2", b2, moves=False)
    decoupled = name == "adamw"
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_

    def init(params: Any) -> AdamW:
        rate.fit(params)
        rates.lasting(name, eps, params)
        leaf = next(iter(tree.tensors(params)), torch.zeros(()))
        return AdamW(torch.zeros((), dtype=torch.float32, device=leaf.device), *(tree.map(torch.zeros_like, params) for _ in range(2)))

    def update(grads: Any, state: AdamW, params: Any) -> tuple[Any, AdamW]:
        n, beta = state.count + 1, float(rates.at(name, "b1", b1, state.count, 1.0))
        step, decay = rate.trees(state.count, params)
        if not decoupled:
            grads, decay = tree.map(lambda g, p, d: g + d * p, grads, params, decay), tree.map(lambda d: 0.0, decay)
        mu = tree.map(lambda m, g: beta * m + (1 - beta) * g, state.mu, grads)
        nu = tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        one, two = 1 - beta ** n.double().item(), 1 - b2 ** n.double().item()
        updates = tree.map(lambda m, v, p, a, d: -a * (m / one / ((v / two).sqrt() + eps) + d * p), mu, nu, params, step, decay)
        return updates, AdamW(n, mu, nu)

    def apply(params: Slots, grads: Slots, factor: Tensor, state: AdamW, ok: Tensor) -> tuple[Slots, AdamW, dict[str, Tensor]]:
        found, inverse = (~ok).float(), (1 / factor).float()
        before, n = state.count, state.count + ok
        beta = float(rates.at(name, "b1", b1, before, 1.0))
        groups, shown = rate.groups(before, params, grads, state.mu, state.nu)
        if grads.buffers[0].dtype != torch.float32:  # the kernel takes its scale in float32
            torch._foreach_mul_(list(grads.buffers), factor.to(grads.buffers[0].dtype))
            inverse = torch.ones_like(inverse)
        for a, d, (p, g, m, v) in groups:
            kernel(
                p, g, m, v, [], [n] * len(p), lr=a, beta1=beta, beta2=b2, weight_decay=float(d), eps=eps,
                amsgrad=False, maximize=False, grad_scale=inverse, found_inf=found,
            )  # fmt: skip
        return params, AdamW(n, state.mu, state.nu), {"lr": shown}

    return GradientTransformation(init, update, apply, name, elementwise=True)
