"""Initial values that do not depend on the mesh, drawn leaf by leaf: no rank ever holds the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from funczero.core import rng, tree
from funczero.core.types import Tree
from funczero.layout.lazy import Fill


def leaf(
    shape: tuple[int, ...],
    draw: Callable[[int, tuple[int, ...]], Tensor] | float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Fill:
    """A parameter to be drawn by fz.init: `draw(key, shape)`, or a number that fills it."""
    if callable(draw):
        return Fill(tuple(shape), dtype, draw)
    number = float(draw)
    return Fill(tuple(shape), dtype, lambda key, shape: torch.full(shape, number, dtype=dtype))


def init(what: Tree | nn.Module, key: int = 0, init_fn: Callable[[nn.Module], Any] | None = None) -> Tree:
    """Parameters for `step.init`, each drawn from its own key when, and where, its rows are needed.

    Law: the values depend on (key, path) alone, not on the mesh, the stage or the order of drawing. At most one leaf is
    whole in memory at a time; of a module, one submodule's own leaves.

    >>> import funczero as fz
    >>> tree = fz.init({"w": leaf((2, 3), fz.rng.normal), "b": leaf((3,))}, key=1)
    >>> tree["w"].shape, tree["w"].make().shape
    ((2, 3), torch.Size([2, 3]))

    Args:
      what: a tree of fz.leaf, a function that returns one, or an nn.Module, on `meta` if it is large. Of a module the
        result has the parameters by dotted name, as fz.stateless names them.
      key: of all randomness.
      init_fn: for a module: initialises one submodule's own parameters in place; by default its reset_parameters().
        Hugging Face models: init_fn=model._init_weights.

    Raises:
      TypeError: a submodule has parameters and no way to draw them.
    """
    if isinstance(what, nn.Module):
        return _module(what, key, init_fn)
    given = what() if callable(what) and not isinstance(what, Fill) else what
    flat, treedef = tree.flatten(given)
    seen: dict[int, Fill] = {}
    for (path, _), x in zip(tree.paths(given), flat, strict=True):
        if not isinstance(x, Fill):
            raise TypeError(
                f"init: {path!r} is a {type(x).__name__}; write fz.leaf(shape, draw) for every parameter, "
                "or give whole tensors to step.init"
            )
        seen.setdefault(id(x), Fill(x.shape, x.dtype, partial(_make, x, rng.fold(key, path))))
    return tree.unflatten([seen[id(x)] for x in flat], treedef)


def _make(x: Fill, key: int) -> Tensor:
    value = x.make(key, x.shape)
    if tuple(value.shape) != x.shape:
        raise ValueError(
            f"init: a leaf of shape {x.shape} was drawn with shape {tuple(value.shape)}; "
            "draw(key, shape) returns that shape"
        )
    return value.to(x.dtype)


def _module(module: nn.Module, key: int, init_fn: Callable[[nn.Module], Any] | None) -> dict[str, Fill]:
    seen: dict[int, Fill] = {}
    out: dict[str, Fill] = {}
    for path, owner in module.named_modules(remove_duplicate=False):  # a layer at two paths has its names at both
        for name, p in owner._parameters.items():
            if p is not None:
                if init_fn is None and not callable(getattr(owner, "reset_parameters", None)):
                    raise TypeError(
                        f"init: submodule {path!r} ({type(owner).__name__}) has parameters but no reset_parameters(); "
                        "pass init_fn=, which sets one submodule's own parameters"
                    )
                make = partial(_draw, owner, rng.fold(key, path), init_fn, name)
                out[f"{path}.{name}" if path else name] = seen.setdefault(id(p), Fill(tuple(p.shape), p.dtype, make))
    return out


def _draw(owner: nn.Module, key: int, init_fn: Callable[[nn.Module], Any] | None, name: str) -> Tensor:
    """One submodule's own parameter, drawn with its neighbours on a shallow copy of it.

    The module and the global generator stay as they were.
    """
    own = copy.copy(owner)
    empty = {
        n: None if p is None else nn.Parameter(torch.zeros(p.shape, dtype=p.dtype), p.requires_grad)
        for n, p in owner._parameters.items()
    }
    own.__dict__.update(_parameters=empty, _modules=dict(owner._modules))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(key)
        if init_fn is None:
            own.reset_parameters()  # type: ignore[operator]
        else:
            init_fn(own)
    return own._parameters[name].detach()  # type: ignore[union-attr]
