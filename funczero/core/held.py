"""What a function holds beside its arguments: where it runs again, a derivative by such a tensor is lost."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import CellType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from funczero.core import tree


def held_by(fn: Callable[..., Any], owned: bool = False) -> Iterator[Any]:
    """The leaves of what is in the closures of a function, and of the functions that it holds.

    Args:
      owned: also of the attributes of the object whose method it is, and of the global variables that it reads.

    >>> rate = torch.tensor(0.5)
    >>> step = lambda by: lambda x: x * by
    >>> list(held_by(step(rate)))
    [tensor(0.5000)]
    """
    seen: list[Any] = [fn]
    for inner in seen:
        plain = getattr(inner, "func", inner)  # functools.partial
        closure = getattr(plain, "__closure__", None) or ()
        around: list[Any] = [x for x in _bound(closure) if x is not inner]
        if closure or plain is not inner:
            around += [getattr(inner, "args", ()), getattr(inner, "keywords", {})]
        for x in tree.leaves([*around, *(_owned(plain) if owned else ())]):
            yield x
            more = getattr(x, "__closure__", None) or owned and isinstance(x, MethodType)
            if callable(x) and more and x not in seen and len(seen) < 16:
                seen.append(x)


def _bound(closure: Iterable[CellType]) -> Iterator[Any]:
    """What the cells of a closure hold; one whose name is bound later holds nothing yet."""
    for cell in closure:
        with suppress(ValueError):
            yield cell.cell_contents


def _owned(fn: Any) -> list[Any]:
    """What the object of a method holds, and which tensors, or containers of them, its code loads by a global name."""
    owner = getattr(fn, "__self__", None if hasattr(fn, "__code__") else fn)
    out = [] if owner is None or isinstance(owner, (type, ModuleType, Tensor)) else [getattr(owner, "__dict__", {})]
    code: Any = fn if hasattr(fn, "__code__") else getattr(type(fn), "__call__", None)  # noqa: B004
    if hasattr(code, "__code__"):
        names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        found = (code.__globals__.get(name) for name in names)
        out += [x for x in found if isinstance(x, (Tensor, dict, list, tuple))]
    return out


def differentiated(x: Tensor) -> bool:
    """Does it need a gradient, or is torch.func transforming it?"""
    return x.requires_grad or transformed(x)


def transformed(x: Tensor) -> bool:
    """Is it batched by vmap, or differentiated by torch.func?"""
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def transforming(forward: bool = True) -> bool:
    """Does a transform of torch.func run, or with `forward` a forward_ad.dual_level?"""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward and forward_ad._current_level >= 0
