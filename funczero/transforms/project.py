"""New parameters made to obey a constraint, as clamps and norms of rows that modules would write in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funczero.comm.differentiable import pack
from funczero.core.transform import after, beside_update
from funczero.core.types import Grad, State, Transform, Updated
from funczero.layout.slots import Slots
from funczero.transforms.chosen import Chosen


def project(
    fn: Callable[[Tensor], Tensor], which: str | Callable[[str], bool] = "", elementwise: bool | None = None
) -> Transform:
    """parameters <- fn(parameters), after every applied update: `fz.project(lambda w: w.clamp(-1, 1), "weight")`.

    It stands right of the last optimizer, in the innermost bracket around it; a skipped update is not projected.

    Layout: new parameters, unchanged.

    Args:
      fn: pure, of one leaf; the same shape and dtype out.
      which: a regex searched in the path, or a predicate on it; "" is every leaf that learns.
      elementwise: True promises that each value depends on its own place alone. Without it leaves must be whole where
        it stands, for a part's norm is not the leaf's.

    Raises:
      ChainError: it stands left of the update; a leaf is cut and nothing is promised.
      ValueError: the regex is found in no path that learns; at init.
      TypeError: fn returns something else; by path, at the first update.
    """
    chosen = Chosen("project", "parameter", fn, which, elementwise).checked()
    name, matches = chosen.name, chosen.takes()

    def transform(g: Grad) -> Grad:
        beside_update(g, name)
        chosen.whole(g)

        def after_update(out: Updated, state: State) -> tuple[Updated, State]:
            old, found = out.params, {}
            learning = old.trainable()
            for i, (leaf, x) in enumerate(zip(old.where.structure.leaves, learning.leaves(), strict=True)):
                if x is not None:
                    found[i] = torch.where(out.ok, chosen.of(leaf.path, x), x) if matches(leaf.path) else x
            new = pack(old.where, found, learning).with_frozen(old)
            if g.env.donate:
                new = Slots(tuple(b.copy_(n) for b, n in zip(old.buffers, new.buffers, strict=True)), old.where)
            return out._replace(params=new), {**state, "params": new}

        return after(g, name, g.layout, after_update, chosen.found)

    transform.__name__ = name
    return transform
