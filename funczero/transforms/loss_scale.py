"""Loss scaling as a seed: the cotangent goes in multiplied, the gradient comes out divided, and the loss is never
touched.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core.number import flag, number, whole
from funczero.core.transform import after, refuse, slot_name
from funczero.core.types import Grad, Out, Seed, Transform, Value
from funczero.transforms.mean import value


class ScaleLoss(NamedTuple):
    """DeepSpeed's DynamicLossScaler as leaves."""

    scale: Tensor  # float64, S
    hysteresis: Tensor  # overflows left before S falls
    iteration: Tensor  # attempted updates of weight > 0
    last_overflow: Tensor  # iteration of the last overflow, -1 for none
    weight: Tensor  # n: the seed is S / n; 0 until it is taken at the first update
    # [leaf, rank] of the first non-finite gradient of an overflow at the floor, [-1, -1] while there was none
    stuck: Tensor


def update_scale(
    s: ScaleLoss, overflow: Tensor, window: int, hysteresis: int, floor: float, consecutive: bool = False
) -> ScaleLoss:
    """One attempted update of the scaler; an overflow with nothing left to give leaves it as it is.

    Source: DeepSpeed 0.19.8 DynamicLossScaler (fp16.loss_scale_window, hysteresis, min_loss_scale,
    consecutive_hysteresis).
    """
    falls = overflow & (s.hysteresis <= 1)
    clean = s.iteration - s.last_overflow - 1
    doubles = ~overflow & (clean > 0) & (clean % window == 0)
    refill = ~overflow if consecutive else doubles
    scale = torch.where(falls, (s.scale / 2).clamp(min=floor), torch.where(doubles, s.scale * 2, s.scale))
    left = torch.where(refill, hysteresis, torch.where(overflow & ~falls, s.hysteresis - 1, s.hysteresis))
    return s._replace(
        scale=scale,
        hysteresis=left,
        iteration=s.iteration + 1,
        last_overflow=torch.where(overflow, s.iteration, s.last_overflow),
    )


def scale_loss(
    init: float = 2.0**16,
    weight: float | None = None,
    dynamic: bool = True,
    window: int = 1000,
    hysteresis: int = 2,
    floor: float = 1.0,
    consecutive: bool = False,
) -> Transform:
    """Seeds the backward pass with scale / n and divides it out of the gradient; an overflow anywhere skips the update
    everywhere.

    Law: by powers of two the unscaled gradient is bit for bit that of the unscaled loss. It is the first nonlinear
    transform.

    Args:
      init: the first scale (DeepSpeed: 2 ** fp16.initial_scale_power), or the static one (fp16.loss_scale).
      weight: n, near the weight of one update, so that scale / n seeds a *sum* as scale seeds its mean. None: a power
        of two near the weight of the first update, measured by one extra forward and backward; in a streamed chain it
        must be given, and for the pullback of a mean loss it is 1.
      dynamic: DeepSpeed's state machine; otherwise the scale stands still and overflows only skip.
      window, hysteresis, floor, consecutive: fp16.loss_scale_window, hysteresis, min_loss_scale,
        consecutive_hysteresis.

    Raises:
      FloatingPointError: at the call after an overflow at the floor; it names the first non-finite leaf and its rank.
    """
    for what, x in {"init": init, "floor": floor, **({} if weight is None else {"weight": weight})}.items():
        number("scale_loss", what, x, low=-math.inf)
    for what, n in (("window", window), ("hysteresis", hysteresis)):
        whole("scale_loss", what, n, low=0)
    for what, yes in (("dynamic", dynamic), ("consecutive", consecutive)):
        flag("scale_loss", what, yes)
    if not init > 0 or window < 1 or hysteresis < 1 or not floor > 0 or (weight is not None and not weight > 0):
        raise ValueError(
            f"scale_loss: init={init}, weight={weight}, window={window}, hysteresis={hysteresis}, floor={floor} must"
            " all be positive"
        )

    def transform(g: Grad) -> Grad:
        if g.layout.mean:
            raise refuse(
                g, "scale_loss", "a nonlinear transform left of it would see scaled gradients; put scale_loss first"
            )
        if g.streams and weight is None:
            raise refuse(
                g,
                "scale_loss",
                "a streamed window cannot measure its weight beforehand; write scale_loss(weight=n), n near the weight"
                " of an update (1 for a mean loss)",
            )
        g, key = value(g, "scale_loss"), slot_name(g, "scale_loss")
        summed = g

        def start(params: Any) -> dict[str, Any]:
            def leaf(x: float, dtype: torch.dtype) -> Tensor:
                return torch.tensor(x, dtype=dtype, device=params.device)

            i = torch.int64
            none = torch.full((2,), -1, dtype=i, device=params.device)
            return {
                key: ScaleLoss(
                    leaf(init, torch.float64),
                    leaf(hysteresis, i),
                    leaf(0, i),
                    leaf(-1, i),
                    leaf(weight or 0.0, torch.float64),
                    none,
                )
            }

        def apply(views: Any, state: dict[str, Any], batch: Any, seed: Seed) -> tuple[Out | None, dict[str, Any]]:
            own: ScaleLoss = state[key]
            if dynamic and int(own.stuck[0]) >= 0:
                raise FloatingPointError(_stuck(own, state))
            if weight is None and float(own.weight) == 0:
                own = own._replace(weight=_measure(summed, views, state, batch, seed))
            factor = own.scale / own.weight
            at_floor = dynamic and batch is not None and float(own.scale) <= floor and int(own.hysteresis) <= 1
            seeded = seed._replace(cotangent=seed.cotangent * factor, look=seed.look or at_floor)
            out, state = g.apply(views, {**state, key: own}, batch, seeded)
            if out is None:
                return None, state
            assert isinstance(out, Value)
            return close(out, state, own, factor)

        def close(out: Value, state: dict[str, Any], own: ScaleLoss, factor: Tensor) -> tuple[Value, dict[str, Any]]:
            counts = out.weight > 0  # an update of weight 0 is skipped without touching the scale
            overflow = ~out.ok & counts
            new, logs = own, {**out.logs, "scale": own.scale}
            if dynamic:
                moved = update_scale(own, overflow, window, hysteresis, floor, consecutive)
                dead = overflow & (own.scale <= floor) & (own.hysteresis <= 1)
                logs["searching"] = overflow & ~dead  # on its way down: such skips are the search, not a failure
                if out.bad is not None:
                    moved = moved._replace(stuck=torch.where(dead, out.bad, own.stuck))
                new = ScaleLoss(*(torch.where(counts, a, b) for a, b in zip(moved, own, strict=True)))
            return out._replace(factor=out.factor / factor, norm=out.norm / factor, logs=logs), {**state, key: new}

        return after(g, "scale_loss", g.layout, lambda out, state: (out, state), start)._replace(apply=apply)

    transform.__name__ = "scale_loss"
    return transform


def _measure(g: Grad, views: Any, state: dict[str, Any], batch: Any, seed: Seed) -> Tensor:
    """A power of two near the weight of this update, the same on every rank."""
    out, _ = g.apply(views, state, batch, seed._replace(cotangent=seed.cotangent * 0))
    assert out is not None
    return torch.where(out.weight > 0, torch.exp2(torch.round(torch.log2(out.weight.clamp(min=1e-300)))), 0.0).clamp(
        min=0.0
    )


def _stuck(own: ScaleLoss, state: dict[str, Any]) -> str:
    leaf, rank = (int(x) for x in own.stuck)
    path = state["params"].where.structure.leaves[leaf].path
    return (
        f"scale_loss: the gradient overflowed at the smallest loss scale ({float(own.scale):g}); the first non-finite"
        f" leaf was {path!r} on rank {rank}: look at the data and the learning rate there, or write"
        " scale_loss(floor=...) smaller"
    )
