"""A function of one gradient, leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from funczero.comm.differentiable import pack
from funczero.core.transform import after
from funczero.core.types import Grad, State, Transform, Value
from funczero.transforms.chosen import Chosen
from funczero.transforms.mean import rewritten, value, with_factor


def map_leaves(
    fn: Callable[[Tensor], Tensor], which: str | Callable[[str], bool] = "", elementwise: bool | None = None
) -> Transform:
    """gradient <- fn(mean gradient), leaf by leaf: `fz.map_leaves(lambda g: g - g.mean(), "conv")` centralizes it.

    Layout: a value, unchanged.

    Args:
      fn: pure, of one leaf's mean gradient, unscaled; the same shape and dtype out.
      which: a regex searched in the path, or a predicate on it; "" is every leaf that learns.
      elementwise: True promises that each value depends on its own place alone. Without it leaves must be whole where
        it stands, for a part's mean is not the leaf's.

    Raises:
      ChainError: a leaf is cut and nothing is promised.
      ValueError: the regex is found in no path that learns; at init.
      TypeError: fn returns something else; by path, at the first update.

    Source: Yong et al., gradient centralization, arXiv 2004.01461.

    >>> import torch, funczero as fz
    >>> loss_fn = lambda p, b: ((p["w"] * b).sum(), torch.tensor(1.0))
    >>> sign = fz.map_leaves(torch.sign, elementwise=True)
    >>> step = fz.train_step(fz.value_and_grad(loss_fn), sign, fz.sgd(0.5))
    >>> step.params(step(step.init({"w": torch.zeros(2)}), torch.tensor([3.0, -0.1]))[0])["w"]
    tensor([-0.5000,  0.5000])
    """
    chosen = Chosen("map_leaves", "the gradient of", fn, which, elementwise).checked()
    name, matches = chosen.name, chosen.takes()

    def transform(g: Grad) -> Grad:
        g = value(g, name)
        chosen.whole(g)

        def each(out: Value, state: State) -> tuple[Value, State]:
            leaves, where = with_factor(out, g.env), out.grads.where
            for i, x in leaves.items():
                path = where.structure.leaves[i].path
                leaves[i] = chosen.of(path, x) if matches(path) else x
            return rewritten(out, pack(where, leaves, out.grads)), state

        return after(g, name, g.layout, each, chosen.found)

    transform.__name__ = name
    return transform
