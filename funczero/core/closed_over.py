"""What a function read beside its arguments when it was recorded, and whether it would read the same now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import getitem
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

MOST = 512  # values that are looked at before each call
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class ClosedOver:
    """What a function can see around itself: closures, defaults, global names, attributes that its code names; and the
    same of the functions among them.

    >>> rates = [0.5]
    >>> scaled = (lambda rate: lambda x: x * rate[0])(rates)
    >>> around = ClosedOver([scaled])
    >>> around.changed()
    ''
    >>> rates[0] = 0.25
    >>> around.changed()
    'rate[0]'
    """

    def __init__(self, fns: list[Callable[..., Any]]) -> None:
        """fns: functions, methods, partials or objects that are called; what torch and this package define is not
        looked into.
        """
        self.seen: list[tuple[str, Callable[[], Any], Any]] = []  # (name, what reads it now, what was read)
        self.tensors: list[Tensor] = []
        self.known: set[int] = set()
        self.whole = True  # was all of it looked at?
        for fn in fns:
            self._look("", partial(_itself, fn))

    def changed(self) -> str:
        """The name of the first value that is another one now; "" where all are the same."""
        for name, read, was in self.seen:
            try:
                now = read()
            except (LookupError, AttributeError, ValueError):
                return name
            if now is not was and not (type(now) is type(was) and isinstance(was, PLAIN) and now == was):
                return name
        return ""

    def _look(self, name: str, read: Callable[[], Any]) -> None:
        """One value, and what can be reached from it."""
        value = read()
        if len(self.seen) >= MOST:
            self.whole = False
            return
        self.seen.append((name, read, value))
        if isinstance(value, PLAIN) or id(value) in self.known:
            return
        self.known.add(id(value))
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return
        for more, inner in self._inside(name, value):
            self._look(more, inner)

    def _inside(self, name: str, value: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
        if isinstance(value, (list, tuple)):
            yield f"len({name})", lambda: len(value)
            for i in range(len(value)):
                yield f"{name}[{i}]", partial(getitem, value, i)
        elif isinstance(value, dict):
            yield f"len({name})", lambda: len(value)
            for k in value:
                yield f"{name}[{k!r}]", partial(getitem, value, k)
        elif isinstance(value, MethodType):
            yield from self._inside(name, value.__func__)
            yield name, lambda: value.__self__
        elif isinstance(value, FunctionType):
            yield from self._of_function(name, value)
        elif not isinstance(value, (type, ModuleType)) and not _stranger(type(value).__module__):
            for k in getattr(value, "__dict__", {}):
                yield f"{name}.{k}", partial(getitem, value.__dict__, k)
            inner = getattr(type(value), "__call__", None)  # noqa: B004
            if isinstance(inner, FunctionType):
                yield from self._inside(name, inner)
        elif hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
            yield f"{name}.func", lambda: value.func
            yield f"{name}.args", lambda: value.args
            yield f"{name}.keywords", lambda: value.keywords

    def _of_function(self, name: str, fn: FunctionType) -> Iterator[tuple[str, Callable[[], Any]]]:
        if _stranger(fn.__module__) and not (fn.__closure__ or ()):
            return
        for free, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            yield free, partial(getattr, cell, "cell_contents")
        if _stranger(fn.__module__):
            return
        yield f"{fn.__name__}'s defaults", lambda: fn.__defaults__
        yield f"{fn.__name__}'s keyword defaults", lambda: fn.__kwdefaults__
        names = _names(fn.__code__)
        for k in names & fn.__globals__.keys():
            found = fn.__globals__[k]
            yield k, partial(getitem, fn.__globals__, k)
            if isinstance(found, ModuleType) and not _stranger(found.__name__):
                for a in names & vars(found).keys():
                    yield f"{k}.{a}", partial(getitem, vars(found), a)


def _itself(x: Any) -> Any:
    return x


def _names(code: CodeType) -> set[str]:
    """Every name that a function's code, or that of a function inside it, loads."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def _stranger(module: str | None) -> bool:
    """Is this module's code fixed, as far as a run is concerned?"""
    return (module or "").split(".")[0] in (
        "torch",
        "funczero",
        "builtins",
        "functools",
        "math",
        "numpy",
        "transformers",
    )
