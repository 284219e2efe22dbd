"""Values of one function with the derivatives of another, any number of times: `straight`.

One autograd Function carries both. It saves its inputs alone, and its own derivatives are computed by itself: its
backward is this Function again, of the formula's vector-Jacobian product, its jvp is this Function of the formula's
jvp, its vmap of the formula's vmap. So every order of differentiation, in reverse and forward mode and batched, is
there with the first one, and nothing that the formula computes is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes

from funczero.core import tree

Flat = Callable[..., tuple[Tensor, ...]]  # of tensors
HOLE = object()


class _Function(torch.autograd.Function):
    """value(*xs) -> tensors, differentiated as formula(*xs)."""

    @staticmethod
    def forward(value: Flat, formula: Flat, *xs: Tensor) -> tuple[Tensor, ...]:
        return _apart(value(*xs), xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.formula, *xs = inputs
        ctx.moving = [i for i, x in enumerate(xs) if _moves(x)]
        ctx.moved = [i for i, y in enumerate(output) if _moves(y)]
        ctx.outputs = len(output)
        ctx.save_for_backward(*xs)
        ctx.save_for_forward(*xs)
        ctx.mark_non_differentiable(*[y for y in output if not _moves(y)])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        xs = ctx.saved_tensors
        wanted = [i for i in ctx.moving if ctx.needs_input_grad[2 + i]]
        given = [j for j in ctx.moved if gs[j] is not None]
        out: list[Tensor | None] = [None] * (2 + len(xs))
        if not wanted or not given:
            return tuple(out)
        formula, n = ctx.formula, len(xs)

        def pull(*both: Tensor) -> tuple[Tensor, ...]:
            found: Any = torch.func.vjp(_of(formula, both[:n], wanted, given), *[both[i] for i in wanted])
            back: tuple[Tensor, ...] = found[1](both[n:])
            return back

        for i, g in zip(wanted, _straight(pull, pull, *xs, *[gs[j] for j in given]), strict=True):
            out[2 + i] = g
        return tuple(out)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        xs = ctx.saved_tensors
        wanted = [i for i in ctx.moving if tangents[2 + i] is not None]
        formula, moved, n = ctx.formula, ctx.moved, len(xs)

        def push(*both: Tensor) -> tuple[Tensor, ...]:
            fn, at = _of(formula, both[:n], wanted, moved), tuple(both[i] for i in wanted)
            along: tuple[Tensor, ...] = _along(fn, at, both[n:])
            return along

        out: list[Tensor | None] = [None] * ctx.outputs
        found = _straight(push, push, *xs, *[tangents[2 + i] for i in wanted]) if wanted and moved else ()
        for j, t in zip(moved, found, strict=False):
            out[j] = t
        return tuple(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], value: Flat, formula: Flat, *xs: Tensor) -> Any:
        # a value may be computed by what knows no batches; the formula's is its own to rounding
        batched = torch.func.vmap(formula, in_dims[2:], randomness=info.randomness)
        found = _straight(batched, batched, *xs)
        return found, (0,) * len(found)


_straight: Callable[..., tuple[Tensor, ...]] = _Function.apply


def _moves(x: Tensor) -> bool:
    """Has it derivatives?"""
    return x.is_floating_point() or x.is_complex()


def _along(fn: Flat, at: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """The jvp of fn; by two vjps inside a bare forward_ad.dual_level, in which torch begins no second forward mode."""
    if eager_transforms.JVP_NESTING or forward_ad._current_level < 0:
        return torch.func.jvp(fn, at, tangents)[1]
    found: Any = torch.func.vjp(fn, *at)
    outs, pull = found
    return torch.func.vjp(pull, tuple(torch.zeros_like(y) for y in outs))[1](tangents)[0]


def _of(formula: Flat, xs: Sequence[Tensor], wanted: Sequence[int], outputs: Sequence[int]) -> Flat:
    """The formula as a function of some of its inputs, with some of its outputs."""

    def fn(*moving: Tensor) -> tuple[Tensor, ...]:
        full = list(xs)
        for i, x in zip(wanted, moving, strict=True):
            full[i] = x
        out = formula(*full)
        return tuple(out[j] for j in outputs)

    return fn


def straight(value: Callable[..., Any], formula: Callable[..., Any], *args: Any) -> Any:
    """value(*args), with every derivative of formula(*args).

    Law: both are functions of their arguments alone and return trees of one form, whose tensors have the same shapes
    and dtypes. Batched by vmap, and traced by make_fx, the formula gives the values too. Tensors that a closure holds
    have no derivative here.

    Args:
      value, formula: of trees; what is no tensor passes as it is.

    >>> rounded = lambda x: straight(torch.round, lambda x: x * 1.0, x)  # the straight-through estimator
    >>> x = torch.tensor(1.7)
    >>> rounded(x).item(), torch.func.grad(rounded)(x).item(), torch.func.jacfwd(rounded)(x).item()
    (2.0, 1.0, 1.0)
    """
    flat, spec = tree.flatten(args)
    places = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
    if not places or get_proxy_mode() is not None:
        return formula(*args)
    tensors = [flat[i] for i in places]
    others = [None if isinstance(x, Tensor) else x for x in flat]  # no tensor lives on in what is saved
    form: list[Any] = []  # of the result: its tree, and its leaves with HOLE for a tensor

    def flattened(fn: Callable[..., Any]) -> Flat:
        def run(*xs: Tensor) -> tuple[Tensor, ...]:
            full = list(others)
            for i, x in zip(places, xs, strict=True):
                full[i] = x
            outs, kind = tree.flatten(fn(*tree.unflatten(full, spec)))
            form[:] = [kind, [HOLE if isinstance(y, Tensor) else y for y in outs]]
            return tuple(y for y in outs if isinstance(y, Tensor))

        return run

    found = iter(_straight(flattened(value), flattened(formula), *tensors))
    return tree.unflatten([next(found) if y is HOLE else y for y in form[1]], form[0])


def root(x: Tensor) -> Tensor:
    """The square root, whose derivatives at 0 are 0.

    >>> torch.func.grad(lambda x: root(x).sum())(torch.tensor([0.0, 4.0]))
    tensor([0.0000, 0.2500])
    """
    return torch.where(x == 0, 1.0, x).sqrt() * (x != 0)


@contextmanager
def outside() -> Iterator[None]:
    """What is made here is no part of a transform of torch.func or of a graph, and may be kept: torch.tensor would
    belong to the level that it is called in.

    >>> kept = []
    >>> def fn(x):
    ...     with outside():
    ...         kept.append(torch.tensor(2.0))
    ...     return x * kept[0]
    >>> torch.func.grad(fn)(torch.tensor(3.0)), torch._C._functorch.is_functorch_wrapped_tensor(kept[0])
    (tensor(2.), False)
    """
    with torch._C._DisableFuncTorch(), _disable_current_modes():
        yield


def _apart(ys: Sequence[Tensor], xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of which none is an input, another output or a view, as autograd wants them."""
    seen, out = {x._cdata for x in xs}, []  # one tensor may have several objects inside torch.func
    for y in ys:
        out.append(y.clone() if y._cdata in seen or y._is_view() else y)
        seen.add(y._cdata)
    return tuple(out)
