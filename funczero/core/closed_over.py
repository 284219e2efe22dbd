"""What a function read beside its arguments when it was recorded, and whether it would read the same now."""

from __future__ import annotations

import logging
import os
import re
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property, partial
from operator import getitem
from typing import Any

import numpy
import torch
from torch import Tensor

from funczero.core.code import fixed, in_python, installed, names_in, texts_in

MOST = 4096  # values that are looked at before each call
SMALL = 16  # elements up to which a tensor's values are looked at, and not its version alone
PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), range, slice, frozenset),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, numpy.generic, numpy.dtype),
)
FIXED = (
    *(types.ModuleType, types.GenericAlias, types.UnionType, typing.TypeVar, re.Pattern, logging.Logger),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType),
    *(types.MethodDescriptorType, types.ClassMethodDescriptorType, logging.LoggerAdapter),
)
CACHED = type(cache(lambda: None))  # what functools.cache makes
MISSING = object()

Inside = Iterator[tuple[str, Callable[[], Any]]]  # (name, what reads it now)


class ClosedOver:
    """What a function can see around itself: closures, defaults, global names, attributes of objects one by one; and
    the same of the functions and classes among them. Code that is installed (torch, this package, the standard library,
    site-packages) is taken as fixed, and its objects are not.

    Law: `changed` is "" only where every value that could be looked at is the one that was read; what cannot be looked
    at (an iterator, a lock, a generator of numbers) is named by `odd`.

    >>> rates = [0.5]
    >>> scaled = (lambda rate: lambda x: x * rate[0])(rates)
    >>> around = ClosedOver([scaled])
    >>> around.odd, around.changed()
    ('', '')
    >>> rates[0] = 0.25
    >>> around.changed()
    'rate[0]'
    >>> ClosedOver([(lambda it: lambda x: x * next(it))(iter([1, 2]))]).odd
    "'it', a list_iterator"
    """

    def __init__(self, roots: list[Any]) -> None:
        """roots: functions, methods, partials, classes or objects."""
        self.seen: list[tuple[str, Callable[[], Any], Any]] = []  # (name, what reads it now, what was read)
        self.tensors: list[Tensor] = []
        self.known: dict[int, Any] = {}  # what was looked into, which stays alive, by id
        self.odd = ""  # the first value that cannot be compared
        self._words = set[str]()  # names and texts in the code of all functions
        self._modules: dict[int, tuple[str, Any]] = {}  # whose code is not fixed: (the name that it has here, itself)
        for root in roots:
            named = isinstance(root, (type, types.FunctionType, types.MethodType))
            self._look(root.__name__ if named else type(root).__name__, partial(_itself, root))
        self._look_at_modules()

    def changed(self) -> str:
        """The name of the first value that is another one now; "" where all are the same."""
        for name, read, was in self.seen:
            now = _now(read)
            if now is not was and not (type(now) is type(was) and isinstance(was, PLAIN) and now == was):
                return name
        return ""

    def _look(self, name: str, read: Callable[[], Any]) -> None:
        """One value, and what can be reached from it."""
        if len(self.seen) >= MOST:
            self.odd = self.odd or f"more than {MOST} values"
        if self.odd:
            return
        value = _now(read)
        self.seen.append((name, read, value))
        if value is MISSING or isinstance(value, PLAIN) and type(value) is not frozenset or id(value) in self.known:
            return
        self.known[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, types.ModuleType) and not installed(value.__name__):
            self._modules[id(value)] = name, value
        elif isinstance(value, types.FunctionType) and not fixed(value):
            self._words |= names_in(value.__code__) | texts_in(value.__code__)
        inside = _inside(name, value)
        if inside is None:
            self.odd = f"{name!r}, a {type(value).__name__}"
            return
        for more, inner in inside:
            self._look(more, inner)

    def _look_at_modules(self) -> None:
        """What the functions may read of the modules: attributes that the code of one of them names, however it came by
        the module. What they lead to may name more.
        """
        done = set[tuple[int, str]]()
        while todo := [
            (i, k)
            for i, (_, module) in self._modules.items()
            for k in sorted(self._words & vars(module).keys())
            if (i, k) not in done
        ]:
            for i, k in todo:
                name, module = self._modules[i]
                self._look(f"{name}.{k}", partial(getitem, vars(module), k))
            done.update(todo)
        for name, module in self._modules.values():  # an attribute that is not there yet
            self._look(f"{name}'s names", partial(self._present, vars(module)))

    def _present(self, there: dict[str, Any]) -> frozenset[str]:
        """Which of the names that code says are there."""
        return frozenset(self._words & there.keys())


def _inside(name: str, value: Any) -> Inside | None:
    """What a value is made of; None where nobody can say."""
    if isinstance(value, FIXED):
        return iter(())
    if isinstance(value, (Tensor, numpy.ndarray)):
        return _of_numbers(name, value)
    if isinstance(value, weakref.ref) and isinstance(value(), (Tensor, type(None))):
        return iter([(name, lambda: id(value()))])
    if isinstance(value, (list, tuple, dict, set, frozenset, Mapping)):
        return _of_container(name, value)
    if isinstance(value, type):
        return iter(()) if installed(value.__module__) else _of_class(name, value)
    if isinstance(value, types.FunctionType):
        return _of_function(name, value)
    parts = _parts(value)
    if parts is not None:
        return ((name, partial(_itself, part)) for part in parts)
    return _of_object(name, value) if in_python(type(value)) else None


def _parts(value: Any) -> tuple[Any, ...] | None:
    """What is called in a value's place, and with what; None where it is nothing of the kind."""
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):  # of a module, or of an object
        return (value.__self__,)
    if isinstance(value, (staticmethod, classmethod)):
        return (value.__func__,)
    if isinstance(value, cached_property):
        return (value.func,)
    if isinstance(value, property):
        return value.fget, value.fset
    return (value.__wrapped__,) if isinstance(value, CACHED) else None


def _of_numbers(name: str, x: Any) -> Inside | None:
    small = (x.numel() if isinstance(x, Tensor) else x.size) <= SMALL
    if isinstance(x, Tensor):
        if type(x) in (Tensor, torch.nn.Parameter) and small and x.layout == torch.strided and not x.is_meta:
            return iter([(f"{name}'s values", lambda: repr(x.tolist()))])
        return None if x.is_inference() else iter([(f"{name}'s values", lambda: x._version)])
    return iter([(f"{name}'s values", lambda: repr(x.tolist()))]) if small else None


def _of_container(name: str, value: Any) -> Inside:
    if value is sys.modules:  # torch imports more as it records; those that code names are looked at by name
        return
    if isinstance(value, (set, frozenset)):
        yield name, lambda: frozenset(value)
        yield from ((name, partial(_itself, x)) for x in value)
    else:
        yield f"len({name})", lambda: len(value)
        if isinstance(value, dict):
            yield f"order of {name}", lambda: hash(tuple(map(id, value)))
        keyed = not isinstance(value, (list, tuple))
        for k in list(value) if keyed else range(len(value)):
            yield f"{name}[{k!r}]", partial(_item if keyed else getitem, value, k)
    if _attributes(value) is not None:  # of a class of somebody's
        yield from _of_object(name, value)


def _of_object(name: str, value: Any) -> Inside:
    """Attributes, slots, and the class: its functions read the rest."""
    own = _attributes(value) or {}
    yield f"len({name})", lambda: len(own)
    for k in list(own):
        yield f"{name}.{k}", partial(getitem, own, k)
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for k in (slots,) if isinstance(slots, str) else slots:
            if k not in ("__dict__", "__weakref__"):
                yield f"{name}.{k}", partial(getattr, value, k)
    yield type(value).__name__, lambda: type(value)


def _attributes(value: Any) -> dict[str, Any] | None:
    """An object's own ones, without what its class answers in their place; None where it has none."""
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found


def _of_class(name: str, cls: type) -> Inside:
    if not installed(type(cls).__module__):
        yield type(cls).__name__, lambda: type(cls)
    for base in cls.__mro__:
        if not installed(base.__module__):
            for k, x in list(vars(base).items()):
                if k != "_abc_impl" and (not k.startswith("__") or isinstance(x, types.FunctionType)):
                    yield f"{name}.{k}", partial(getitem, vars(base), k)


def _of_function(name: str, fn: types.FunctionType) -> Inside:
    for free, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        yield free, partial(getattr, cell, "cell_contents")
        yield from _of_module(free, _now(partial(getattr, cell, "cell_contents")), fn)
    if fn is os.getenv:
        yield "os.environ", lambda: os.environ
    if fixed(fn) and installed(fn.__module__):  # what wraps somebody's function may be called as it is
        return
    yield f"{fn.__name__}'s code", lambda: fn.__code__.co_code
    yield f"{fn.__name__}'s defaults", lambda: fn.__defaults__
    yield f"{fn.__name__}'s keyword defaults", lambda: fn.__kwdefaults__
    yield f"len(vars({fn.__name__}))", lambda: len(fn.__dict__)
    for k in list(fn.__dict__):
        yield f"{fn.__name__}.{k}", partial(getitem, fn.__dict__, k)
    if not fixed(fn):
        yield from _of_globals(fn)


def _of_globals(fn: types.FunctionType) -> Inside:
    """Global names, and modules that a function imports."""
    names, texts = names_in(fn.__code__, "LOAD_GLOBAL", "LOAD_NAME"), texts_in(fn.__code__)
    if "globals" in names:
        names |= texts & fn.__globals__.keys()
    for k in sorted(names):  # of those that are missing some are builtins
        yield k, partial(getitem, fn.__globals__, k)
        yield from _of_module(k, fn.__globals__.get(k), fn)
    for k in sorted(names_in(fn.__code__, "IMPORT_NAME")):  # inside of the function
        inner = f"{fn.__globals__.get('__package__') or ''}.{k}".strip(".")
        for module in dict.fromkeys((k, inner)):
            if not installed(module):
                yield f"import {module}", partial(sys.modules.get, module)  # another one once it is imported
            yield from _of_module(module, sys.modules.get(module), fn)
    for k in sorted(texts & sys.modules.keys()):  # as importlib.import_module is told
        if not installed(k):
            yield f"import {k}", partial(sys.modules.get, k)


def _of_module(name: str, module: Any, fn: types.FunctionType) -> Inside:
    """What a function may read of a module whose code is fixed: attributes that its own code names, and which are no
    code themselves.
    """
    if not isinstance(module, types.ModuleType) or not installed(module.__name__):
        return
    for k in sorted(names_in(fn.__code__) & vars(module).keys()):
        x = vars(module)[k]
        if not callable(x) and not isinstance(x, types.ModuleType) or x is os.getenv:
            yield f"{name}.{k}", partial(getitem, vars(module), k)


def _itself(x: Any) -> Any:
    return x


def _item(box: Mapping[Any, Any], k: Any) -> Any:
    """Without what a defaultdict would make of a key that is gone."""
    return box.get(k, MISSING)


def _now(read: Callable[[], Any]) -> Any:
    """What is read; MISSING where a slot, a closure's cell, a name or a key is empty."""
    try:
        return read()
    except (LookupError, AttributeError, ValueError):
        return MISSING
