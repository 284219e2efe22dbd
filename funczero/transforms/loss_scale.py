"""Loss scaling as a seed: the cotangent goes in multiplied, the gradient comes out divided, and the loss is never
touched.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from funczero.core import rng
from funczero.core.number import flag, number, whole
from funczero.core.spans import span
from funczero.core.transform import after, refuse, slot_name
from funczero.core.types import Apply, Grad, Seed, State, Transform, Tree, Value
from funczero.layout.slots import Slots
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


class Settings(NamedTuple):
    """The arguments of scale_loss."""

    init: float
    weight: float | None
    dynamic: bool
    window: int
    hysteresis: int
    floor: float
    consecutive: bool

    def check(self) -> None:
        """Refuse what is no positive number, or no bool, by its name."""
        for what, x in (("init", self.init), ("floor", self.floor), ("weight", self.weight)):
            if what != "weight" or x is not None:
                number("scale_loss", what, x, low=-math.inf)
        for what, n in (("window", self.window), ("hysteresis", self.hysteresis)):
            whole("scale_loss", what, n, low=0)
        for what, yes in (("dynamic", self.dynamic), ("consecutive", self.consecutive)):
            flag("scale_loss", what, yes)
        numbers = {what: getattr(self, what) for what in ("init", "weight", "window", "hysteresis", "floor")}
        if not all(x is None or x > 0 for x in numbers.values()):
            given = ", ".join(f"{what}={x}" for what, x in numbers.items())
            raise ValueError(f"scale_loss: {given} must all be positive")

    def start(self, device: torch.device) -> ScaleLoss:
        """The state before the first update."""

        def leaf(x: float, dtype: torch.dtype) -> Tensor:
            return torch.tensor(x, dtype=dtype, device=device)

        scale, weight = leaf(self.init, torch.float64), leaf(self.weight or 0.0, torch.float64)
        left, iteration, overflow = (leaf(n, torch.int64) for n in (self.hysteresis, 0, -1))
        stuck = torch.full((2,), -1, dtype=torch.int64, device=device)
        return ScaleLoss(scale, left, iteration, overflow, weight, stuck)

    def at_floor(self, scaler: ScaleLoss) -> bool:
        """Has an overflow nothing left to give?"""
        return self.dynamic and float(scaler.scale) <= self.floor and int(scaler.hysteresis) <= 1

    def after(self, scaler: ScaleLoss, out: Value) -> tuple[ScaleLoss, dict[str, Tensor]]:
        """The state after an update, and what the metrics show of it."""
        logs = {"scale": scaler.scale}
        if not self.dynamic:
            return scaler, logs
        counts = out.weight > 0  # an update of weight 0 is skipped without touching the scale
        if "unfit" in out.logs:  # and so is one whose exact sums have no units yet: it did not overflow
            counts = counts & (out.logs["unfit"] < 0)
        overflow = ~out.ok & counts
        moved = update_scale(scaler, overflow, self.window, self.hysteresis, self.floor, self.consecutive)
        dead = overflow & (scaler.scale <= self.floor) & (scaler.hysteresis <= 1)
        logs["searching"] = overflow & ~dead  # on its way down: such skips are the search, not a failure
        if out.bad is not None:
            moved = moved._replace(stuck=torch.where(dead, out.bad, scaler.stuck))
        return ScaleLoss(*(torch.where(counts, a, b) for a, b in zip(moved, scaler, strict=True))), logs


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
    settings = Settings(init, weight, dynamic, window, hysteresis, floor, consecutive)
    settings.check()

    def transform(g: Grad) -> Grad:
        if g.layout.mean:
            why = "a nonlinear transform left of it would see scaled gradients"
            raise refuse(g, "scale_loss", f"{why}; put scale_loss first")
        if g.streams and weight is None:
            why = "a streamed window cannot measure its weight beforehand"
            remedy = "write scale_loss(weight=n), n near the weight of an update (1 for a mean loss)"
            raise refuse(g, "scale_loss", f"{why}; {remedy}")
        g, key = value(g, "scale_loss"), slot_name(g, "scale_loss")
        start = lambda params: {key: settings.start(params.device)}
        named = after(g, "scale_loss", g.layout, lambda out, state: (out, state), start)
        return named._replace(apply=_scaled(g, key, settings))

    transform.__name__ = "scale_loss"
    return transform


def _scaled(g: Grad, key: str, settings: Settings) -> Apply:
    """g, with the seed multiplied by scale / n and the gradient's factor divided by it."""

    def apply(views: Slots, state: State, batch: Tree, seed: Seed) -> tuple[Value | None, State]:
        scaler: ScaleLoss = state[key]
        if g.env.differentiable and rng.known(scaler.iteration) is None:
            why = "its scale is read as a number, but the state is batched or traced here"
            raise RuntimeError(f"scale_loss: {why}; leave it out of a chain for vmap over states or make_fx")
        if settings.dynamic and int(scaler.stuck[0] + 1) > 0:  # 0 in the ordinary course, which a plan takes
            raise FloatingPointError(_stuck(scaler, state))
        if settings.weight is None and float(scaler.weight) == 0:
            scaler = scaler._replace(weight=_measure(g, views, state, batch, seed))
        factor = scaler.scale / scaler.weight
        look = seed.look or batch is not None and settings.at_floor(scaler)
        seeded = seed._replace(cotangent=seed.cotangent * factor, look=look)
        out, state = g.apply(views, {**state, key: scaler}, batch, seeded)
        if out is None:
            return None, state
        assert isinstance(out, Value) and out.norm is not None  # the mean's
        with span("scale_loss"):
            new, logs = settings.after(scaler, out)
            unscaled = out._replace(factor=out.factor / factor, norm=out.norm / factor, logs={**out.logs, **logs})
        return unscaled, {**state, key: new}

    return apply


def _measure(g: Grad, views: Slots, state: State, batch: Tree, seed: Seed) -> Tensor:
    """A power of two near the weight of this update, the same on every rank."""
    out, _ = g.apply(views, state, batch, seed._replace(cotangent=seed.cotangent * 0))
    assert isinstance(out, Value)
    weight = out.weight.detach()  # its power of two has no derivative
    return torch.where(weight > 0, torch.exp2(torch.round(torch.log2(weight.clamp(min=1e-300)))), 0.0).clamp(min=0.0)


def _stuck(scaler: ScaleLoss, state: State) -> str:
    leaf, rank = (int(x) for x in scaler.stuck)
    path = state["params"].where.structure.leaves[leaf].path
    return (
        f"scale_loss: the gradient overflowed at the smallest loss scale ({float(scaler.scale):g}); the first"
        f" non-finite leaf was {path!r} on rank {rank}: look at the data and the learning rate there, or write"
        " scale_loss(floor=...) smaller"
    )
