"""Noise on gradients that is the same on any split."""

from __future__ import annotations

import torch
from torch import Tensor

from funczero.comm.differentiable import pack
from funczero.core import rng
from funczero.core.number import number
from funczero.core.transform import around
from funczero.core.types import Grad, Seed, State, Transform, Value
from funczero.layout.slots import Slots
from funczero.layout.where import Slot
from funczero.transforms.mean import rewritten, value, with_factor


def add_noise(std: float) -> Transform:
    """gradient <- mean gradient + std * normal, as Langevin dynamics and DP-SGD add it after their clip.

    Law: a value's noise is a function of (state.key, state.step, its leaf's path, its place in the leaf) alone, so that
    bits are the same at every stage, on any world and for any number of micro-batches. For noise on rows of a batch:
    `fz.rng.row_normal(batch["key"], shape)`.

    Layout: a value, unchanged.

    Args:
      std: of the noise on the mean gradient; DP-SGD: noise_multiplier * max_grad_norm / rows.

    Raises:
      RuntimeError: the state's key is batched or traced (fz.differentiable).

    Source: Neelakantan et al. 2015, arXiv 1511.06807 (optax.add_noise); Abadi et al. 2016, arXiv 1607.00133.

    >>> import torch, funczero as fz
    >>> loss_fn = lambda p, b: ((p["w"] * 0 + b).sum(), torch.tensor(1.0))
    >>> step = fz.train_step(fz.value_and_grad(loss_fn), fz.add_noise(1.0), fz.sgd(1.0))
    >>> state = step.init({"w": torch.zeros(10_000)})
    >>> round(step.params(step(state, torch.ones(1))[0])["w"].std().item(), 1)
    1.0
    """
    std = number("add_noise", "std", std)
    name = f"add_noise({std:g})"

    def transform(g: Grad) -> Grad:
        g = value(g, name)

        def before(views: Slots, seed: Seed, state: State) -> tuple[Seed, int]:
            if seed.key == rng.UNKNOWN:
                why = "its noise comes from the state's key, which is batched or traced here"
                raise RuntimeError(f"{name}: {why}; leave it out, and add noise of your own to the batch")
            return seed, rng.fold(seed.key, "add_noise")

        def fn(out: Value, state: State, key: int) -> tuple[Value, State]:
            leaves, where = with_factor(out, g.env), out.grads.where
            for i, x in leaves.items():
                leaf = where.structure.leaves[i]
                noise = rng.normal_at(rng.fold(key, str(leaf.path)), _places(where.slots[i], leaf.shape, x), x.dtype)
                leaves[i] = x + std * noise
            return rewritten(out, pack(where, leaves, out.grads)), state

        return around(g, name, g.layout, before, fn)

    transform.__name__ = name
    return transform


def _places(slot: Slot, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The number of every value of a part among those of its whole leaf, int64."""
    out, stride = torch.zeros((), dtype=torch.int64, device=like.device), 1
    for d in reversed(range(len(shape))):
        along = torch.arange(slot.start[d], slot.start[d] + slot.shape[d], device=like.device) * stride
        out = out + along.view(-1, *(1,) * (len(shape) - 1 - d))
        stride *= shape[d]
    return out
