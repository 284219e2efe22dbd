"""A function of one gradient, leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from funczero.comm.differentiable import Varied, pack
from funczero.core import tree
from funczero.core.number import flag
from funczero.core.transform import after, refuse
from funczero.core.types import Grad, State, Transform, Value
from funczero.layout.lazy import Lazy
from funczero.transforms.mean import rewritten, value


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
    matches = tree.matcher(which)
    name = f"map_leaves({which!r})" if isinstance(which, str) else f"map_leaves({getattr(which, '__name__', 'which')})"
    if elementwise is not None:
        flag("map_leaves", "elementwise", elementwise)

    def transform(g: Grad) -> Grad:
        g = value(g, name)
        cut = [a for a in g.layout.sharded if g.env.mesh.axes[a].size > 1]
        if cut and not elementwise:
            why = f"nothing says that it works value by value, but the leaves are cut over {cut} here"
            raise refuse(g, name, f"{why}; write elementwise=True if it does, or a chain without shard")

        def init(params: Lazy) -> State:
            structure = params.structure
            learning = [leaf.path for i, leaf in enumerate(structure.leaves) if not structure.frozen(i)]
            why = tree.unmatched(which, learning) if isinstance(which, str) else ""
            if why:
                raise ValueError(f"{name}: {why}; correct it, or leave it out")
            return {}

        def each(out: Value, state: State) -> tuple[Value, State]:
            where = out.grads.where
            factor = Varied(where, g.env.mesh, out.factor) if g.env.differentiable else None
            leaves = {}
            for i, x in out.grads.present().items():
                path = where.structure.leaves[i].path
                x = x * (out.factor if factor is None else factor.of(i)).to(x.dtype)
                leaves[i] = _like(path, fn(x), x) if matches(path) else x
            return rewritten(out, pack(where, leaves, out.grads)), state

        return after(g, name, g.layout, each, init)

    transform.__name__ = name
    return transform


def _like(path: str, y: Tensor, x: Tensor) -> Tensor:
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        have = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise TypeError(f"map_leaves: of the gradient of {path!r} its function makes {have}; return one like the given")
    return y
