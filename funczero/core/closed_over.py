"""What a function read beside its arguments when it was recorded, and whether it would read the same now."""

from __future__ import annotations

import dis
import logging
import re
import sys
import sysconfig
import types
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property, partial
from operator import getitem
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

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
HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE
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
        for root in roots:
            self._look(getattr(root, "__name__", type(root).__name__), partial(_itself, root))

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
        inside = _inside(name, value)
        if inside is None:
            self.odd = f"{name!r}, a {type(value).__name__}"
            return
        for more, inner in inside:
            self._look(more, inner)


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
    return _of_object(name, value) if _in_python(type(value)) else None


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
    return (value.__wrapped__,) if hasattr(value, "cache_info") else None  # functools.cache


def _of_numbers(name: str, x: Any) -> Inside | None:
    small = (x.numel() if isinstance(x, Tensor) else x.size) <= SMALL
    if isinstance(x, Tensor):
        if type(x) is Tensor and small and x.layout == torch.strided and not x.is_meta:
            return iter([(f"{name}'s values", lambda: repr(x.tolist()))])
        return None if x.is_inference() else iter([(f"{name}'s values", lambda: x._version)])
    return iter([(f"{name}'s values", lambda: repr(x.tolist()))]) if small else None


def _of_container(name: str, value: Any) -> Inside:
    if isinstance(value, (set, frozenset)):
        yield name, lambda: frozenset(value)
        yield from ((name, partial(_itself, x)) for x in value)
    else:
        yield f"len({name})", lambda: len(value)
        keyed = not isinstance(value, (list, tuple))
        for k in list(value) if keyed else range(len(value)):
            yield f"{name}[{k!r}]", partial(_item if keyed else getitem, value, k)
    if hasattr(value, "__dict__"):  # of a class of somebody's
        yield from _of_object(name, value)


def _of_object(name: str, value: Any) -> Inside:
    """Attributes, slots, and the class: its functions read the rest."""
    own = getattr(value, "__dict__", {})
    yield f"len({name})", lambda: len(own)
    for k in list(own):
        yield f"{name}.{k}", partial(getitem, own, k)
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for k in (slots,) if isinstance(slots, str) else slots:
            if k not in ("__dict__", "__weakref__"):
                yield f"{name}.{k}", partial(getattr, value, k)
    yield type(value).__name__, lambda: type(value)


def _of_class(name: str, cls: type) -> Inside:
    for base in cls.__mro__:
        if not installed(base.__module__):
            for k, x in list(vars(base).items()):
                if k != "_abc_impl" and (not k.startswith("__") or isinstance(x, types.FunctionType)):
                    yield f"{name}.{k}", partial(getitem, vars(base), k)


def _of_function(name: str, fn: types.FunctionType) -> Inside:
    for free, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        yield free, partial(getattr, cell, "cell_contents")
    if installed(fn.__module__):
        return
    yield f"{fn.__name__}'s code", lambda: fn.__code__.co_code
    yield f"{fn.__name__}'s defaults", lambda: fn.__defaults__
    yield f"{fn.__name__}'s keyword defaults", lambda: fn.__kwdefaults__
    yield f"len(vars({fn.__name__}))", lambda: len(fn.__dict__)
    for k in list(fn.__dict__):
        yield f"{fn.__name__}.{k}", partial(getitem, fn.__dict__, k)
    for k in sorted(_names(fn.__code__, "LOAD_GLOBAL", "LOAD_NAME")):  # of those that are missing some are builtins
        yield k, partial(getitem, fn.__globals__, k)
        if isinstance(fn.__globals__.get(k), types.ModuleType):
            yield from _of_module(k, fn.__globals__[k], fn)
    for k in sorted(_names(fn.__code__, "IMPORT_NAME")):  # inside of the function
        inner = f"{fn.__globals__.get('__package__') or ''}.{k}".strip(".")
        for module in dict.fromkeys((k, inner)):
            if not installed(module):
                yield f"import {module}", partial(sys.modules.get, module)  # another one once it is imported
            if module in sys.modules:
                yield from _of_module(module, sys.modules[module], fn)


def _of_module(name: str, module: types.ModuleType, fn: types.FunctionType) -> Inside:
    """What a function may read of a module: attributes that its code names."""
    fixed = installed(module.__name__)
    for k in sorted(_names(fn.__code__) & vars(module).keys()):
        x = vars(module)[k]
        if not (fixed and (callable(x) or isinstance(x, types.ModuleType))):
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


def _names(code: types.CodeType, *how: str) -> set[str]:
    """Names that a function's code, or that of a function inside it, loads by these instructions; by any without."""
    own = {str(i.argval) for i in dis.get_instructions(code) if i.opname in how} if how else set(code.co_names)
    return own.union(*(_names(c, *how) for c in code.co_consts if isinstance(c, types.CodeType)))


def _in_python(cls: type) -> bool:
    """Has an object of this class no state but attributes and slots? As the standard library's copyreg asks it."""
    for base in cls.__mro__:
        new: Any = base.__new__
        if not base.__flags__ & HEAP or isinstance(new, types.BuiltinFunctionType) and new.__self__ is base:
            return base in (object, types.SimpleNamespace)
    return True


@cache
def installed(module: str | None) -> bool:
    """Is a module's code fixed for a run: torch's, this package's, the standard library's, or in site-packages?"""
    top = (module or "").split(".")[0]
    if top in ("torch", "funczero") or top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    homes = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return file is not None and any(Path(file).is_relative_to(home) for home in homes)
