"""The smallest step builder that `funczero parity` can run; copy it for your own model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funczero.core import rng
from funczero.gradients.gradient import value_and_grad
from funczero.gradients.layers import layers
from funczero.layout.spec import P
from funczero.optim import adamw
from funczero.step.step import Step
from funczero.step.train_step import train_step
from funczero.step.zero import zero
from funczero.transforms.clip import clip_by_global_norm

WIDTH, CLASSES, ROWS = 16, 5, 48


def block(p: dict[str, Tensor], x: Tensor, key: int) -> Tensor:
    """A residual block with dropout."""
    return x + rng.dropout(torch.tanh(x @ p["w"] + p["b"]), 0.1, key)


def loss_fn(params: dict[str, Any], batch: dict[str, Tensor], key: int) -> tuple[Tensor, Tensor]:
    """(sum of weighted losses, sum of weights)."""
    h = layers(block, params["blocks"], batch["x"] @ params["in"], key=key)
    nll = F.cross_entropy(h @ params["out"], batch["y"], reduction="none")
    return (nll * batch["mask"]).sum(), batch["mask"].sum()


def make_step(stage: int, accumulate: int) -> tuple[Step, dict[str, Any]]:
    """A step over all processes, and its first parameters."""
    grad = value_and_grad(loss_fn, batch=P("data"), units=("blocks",), rng=True)
    step = train_step(
        *zero(grad, clip_by_global_norm(0.5), adamw(1e-2), stage=stage, accumulate=accumulate), mesh={"data": -1}
    )
    blocks = [{"w": rng.normal(i, (WIDTH, WIDTH), 0.2), "b": torch.zeros(WIDTH)} for i in range(3)]
    return step, {"in": rng.normal(10, (8, WIDTH), 0.3), "blocks": blocks, "out": rng.normal(11, (WIDTH, CLASSES), 0.3)}


def make_batch(t: int) -> dict[str, Tensor]:
    """The global batch of update t, a pure function of t."""
    x = rng.normal(rng.fold(t, "x"), (ROWS, 8))
    mask = (torch.arange(ROWS) % 7 > 0).float()
    return {"x": x, "y": x[:, :CLASSES].argmax(1), "mask": mask}
