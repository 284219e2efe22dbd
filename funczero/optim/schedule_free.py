"""Schedule-free AdamW and SGD: Defazio et al., "The Road Less Scheduled", arXiv 2405.15682."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import number, shown
from funczero.core.optimizer import Formula, GradientTransformation, Smooth
from funczero.core.straight import root
from funczero.core.types import TrainState
from funczero.optim.count import zero
from funczero.optim.rate import Rate, lasting, one_for_all
from funczero.optim.rates import Rates
from funczero.transforms.formula import optimizer
from funczero.transforms.partition import put, taken


class ScheduleFree(NamedTuple):
    """The sequence z that gradients move, and the second moment, like the parameters and in their dtype; the number of
    applied updates, the weight of all of them in the average, the largest rate so far; and the rates.
    """

    count: Tensor
    z: Any
    nu: Any  # () without second moment
    weight: Tensor  # float64
    largest: Tensor  # float64
    rates: Any = ()


class Scalars(NamedTuple):
    """What one update takes beside the leaves; 0-d."""

    ok: Tensor
    factor: Tensor
    count: Tensor  # after the update, float64
    lr: Tensor  # float64
    part: Tensor  # float64: how much of z goes into the average
    rates: dict[str, Any]


def schedule_free_adamw(
    lr: Rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: Rate = 0.0
) -> GradientTransformation:
    """z <- z - lr (g / (sqrt(v') + eps) + wd y), where gradients are taken at the parameters y = (1 - b1) z + b1 x, and
    x is the average of all z, weighted by the square of the largest rate so far.

    Elementwise. There is no schedule but a warmup. x is what is evaluated: `fz.eval_params(state)`.

    Args:
      lr: number, or one schedule of applied updates, as a warmup.
      b1: weight of the average in y, in (0, 1).
      b2: decay of the second moment per update, in [0, 1), with bias correction.
      eps: added to the root of the second moment; positive.
      weight_decay: at y, per update times lr; number, schedule, rules or tree.

    Source: AdamWScheduleFree of the authors' package schedulefree, with r = 0 and weight_lr_power = 2.

    >>> import funczero as fz
    >>> loss_fn = lambda p, b: (((p["w"] - b) ** 2).sum() / 2, torch.tensor(float(len(b))))
    >>> step = fz.train_step(fz.value_and_grad(loss_fn), fz.schedule_free_adamw(0.5))
    >>> state = step.init({"w": torch.tensor(1.0)})
    >>> for _ in range(40):
    ...     state, _ = step(state, torch.zeros(4))
    >>> abs(step.params(fz.eval_params(state))["w"].item()) < 0.1
    True
    """
    return _schedule_free(
        "schedule_free_adamw", lr, b1, b2, number("schedule_free_adamw", "eps", eps, above=True), weight_decay
    )


def schedule_free_sgd(lr: Rate, momentum: float = 0.9, weight_decay: Rate = 0.0) -> GradientTransformation:
    """The same without a second moment: z <- z - lr (g + wd y), at y = (1 - momentum) z + momentum x.

    Args: as schedule_free_adamw's; momentum is its b1.

    Source: SGDScheduleFree of the package schedulefree.
    """
    return _schedule_free("schedule_free_sgd", lr, momentum, None, 0.0, weight_decay)


def _schedule_free(
    name: str, lr: Rate, b1: float, b2: float | None, eps: float, weight_decay: Rate
) -> GradientTransformation:
    if isinstance(lr, (list, tuple, dict)):
        why = "is another for some leaves, but the average weighs all alike; write one number or schedule"
        raise TypeError(f"{name}: lr={shown(lr)} {why}")
    number(name, "momentum" if b2 is None else "b1", b1, high=1.0, above=True)
    betas = {"b1": b1} if b2 is None else {"b1": b1, "b2": one_for_all(name, "b2", b2, moves=False)}
    rate = Rates(name, lr=lr, weight_decay=weight_decay, **betas)

    def init(params: Any) -> ScheduleFree:
        kept, start = rate.init(params), zero(params).double()
        if b2 is not None:
            lasting(name, eps, params)
        nu = () if b2 is None else tree.map(torch.zeros_like, params)
        return ScheduleFree(zero(params), tree.clone(params), nu, start, start.clone(), kept)

    def scalars(
        state: ScheduleFree, now: list[dict[str, Any]], factor: Tensor, ok: Tensor
    ) -> tuple[ScheduleFree, list[Scalars]]:
        rate_now = torch.as_tensor(now[0]["lr"], dtype=torch.float64, device=ok.device)
        largest = torch.where(ok, torch.maximum(state.largest, rate_now), state.largest)
        weight = torch.where(ok, state.weight + largest**2, state.weight)
        part = largest**2 / weight.clamp(min=torch.finfo(torch.float64).tiny)
        new = state._replace(count=state.count + ok, weight=weight, largest=largest)
        return new, [Scalars(ok, factor, new.count.double(), rate_now, part, each) for each in now]

    def moved(p: Tensor, g: Tensor, z: Tensor, nu: Tensor | None, s: Scalars) -> tuple[Tensor, Tensor, Tensor | None]:
        beta, lr, part = s.rates["b1"], s.lr.to(p.dtype), s.part.to(p.dtype)
        if nu is not None:
            nu = s.rates["b2"] * nu + (1 - s.rates["b2"]) * g * g
            n = s.count.clamp(min=1)  # of a first update that is skipped: no 0 / 0 in what nobody takes
            g = g / (root(nu / (1 - s.rates["b2"] ** n).to(p.dtype)) + eps)
        g = g + s.rates["weight_decay"] * p
        return p + part * (z - p) + g * lr * (beta * (1 - part) - 1), z - lr * g, nu

    def leaf(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], s: Scalars) -> None:
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            own = [m[i] for m in moments]
            new = moved(p, g.mul_(s.factor.to(g.dtype)), own[0], own[1] if b2 is not None else None, s)
            for old, x in zip((p, *own), new, strict=False):
                if x is not None:
                    old.copy_(torch.where(s.ok, x, old))

    def smooth(p: Tensor, g: Tensor, moments: list[Tensor], s: Scalars) -> tuple[Tensor, list[Tensor]]:
        new = moved(p, g, moments[0], moments[1] if b2 is not None else None, s)
        return new[0], [x for x in new[1:] if x is not None]

    held = lambda s: [s.z, s.nu] if b2 is not None else [s.z]
    return optimizer(name, init, Formula(rate.reads(), held, scalars, leaf, smooth=Smooth(rate.smooth, smooth)))


def eval_params(state: TrainState) -> TrainState:
    """The state with the average x of a schedule-free optimizer as its parameters, in their dtype; to look at, as
    fz.averaged is, and not to train on.

    Raises:
      KeyError: its chain has no schedule-free optimizer.
    """
    found = [x for x in state.chain.values() if isinstance(x, ScheduleFree)]
    if not found:
        raise KeyError(f"eval_params: no optimizer of this chain is schedule-free; it has {list(state.chain)}")
    y = state.params.trainable()
    x = tree.clone(y)
    for own in found:
        part = 1 - 1 / float(own.rates["b1"])
        put(x, taken(y, own.z.where).map(lambda a, z, part=part: a + part * (z - a), own.z))
    return state._replace(params=x.with_frozen(state.params))
