"""Any optax-shaped pair as an optimizer of a chain."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from funczero import tree
from funczero.types import ChainError, GradientTransformation


def lift(pair: Any, name: str | None = None, elementwise: bool | None = None) -> GradientTransformation:
    """An `(init, update)` pair on pytrees of tensors, with parameters <- parameters + updates.

    Inside a bracket it is handed this rank's part of every leaf, so its values must not depend on where leaves are cut.

    Args:
      pair: has `init(params) -> state` and `update(grads, state, params) -> (updates, state)`; any optax-shaped tuple.
      name: where its state is kept; by default the pair's own name, or "lift".
      elementwise: True is trusted; None is tried once on small random leaves, whole and cut, and refused where they differ.

    Raises:
      ChainError: the pair gives other values on cut leaves.
    """
    init, update = (pair[0], pair[1]) if isinstance(pair, tuple) else (pair.init, pair.update)
    label = name or getattr(pair, "name", None) or "lift"
    if elementwise is None and not _same_when_cut(init, update):
        raise ChainError(
            f"lift: {label!r} gives other values when its leaves are cut into rows, so it cannot be trusted inside a bracket; "
            "use fz.lift(pair, elementwise=False) in a chain without shard, or an optimizer that works value by value"
        )
    return GradientTransformation(init, update, None, label, elementwise is not False)


def _same_when_cut(init: Callable[..., Any], update: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)

    def draw() -> dict[str, torch.Tensor]:
        return {"matrix": torch.randn(8, 6, generator=generator, dtype=torch.float64), "vector": torch.randn(8, generator=generator, dtype=torch.float64)}

    params, grads = draw(), [draw() for _ in range(3)]

    def run(rows: slice) -> list[torch.Tensor]:
        cut = lambda t: tree.map(lambda x: x[rows].clone(), t)  # noqa: E731
        state, here, seen = init(cut(params)), cut(params), []
        for g in grads:
            updates, state = update(cut(g), state, here)
            here = tree.map(torch.add, here, updates)
            seen += tree.leaves(here)
        return seen

    whole, first, second = run(slice(0, 8)), run(slice(0, 3)), run(slice(3, 8))
    return all(torch.allclose(w, torch.cat([a, b]), rtol=1e-9, atol=1e-12) for w, a, b in zip(whole, first, second, strict=True))
