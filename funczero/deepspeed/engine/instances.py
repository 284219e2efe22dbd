"""What an engine at stage 3 puts onto instances of the user's module: values in parameters' places, and methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

from torch import nn


class Spot(NamedTuple):
    """Where a parameter stands: in a module's _parameters, or in a list of its own, as an RNN keeps its weights."""

    module: nn.Module
    box: str
    key: Any
    name: str
    closed: nn.Parameter

    def now(self) -> Any:
        """What stands there."""
        return self.module.__dict__[self.box][self.key]

    def put(self, x: Any) -> None:
        """Something else."""
        self.module.__dict__[self.box][self.key] = x


class Block(NamedTuple):
    """A block that is opened by itself."""

    path: str
    spots: list[Spot]
    within: list[nn.Module]  # it, what is in it, and what it is in


def spots_of(m: nn.Module, path: str, names: dict[int, str]) -> list[Spot]:
    """The places of a module's parameters, without those of its children.

    Args:
      names: of all parameters by their id.
    """
    own = [Spot(m, "_parameters", k, f"{path}.{k}".lstrip("."), p) for k, p in m._parameters.items() if p is not None]
    for k, box in m.__dict__.items():
        for i, p in enumerate(box if type(box) is list else ()):
            if isinstance(p, nn.Parameter) and id(p) in names:
                own.append(Spot(m, k, i, names[id(p)], p))
    return own


def bind(spots: list[Spot], values: dict[str, Any]) -> None:
    """Values in places, by name."""
    for s in spots:
        s.put(values[s.name])


def asks(m: nn.Module) -> bool:
    """Does a module want its blocks to run again in the backward (Hugging Face's flag)?"""
    return m.__dict__.get("gradient_checkpointing") is True


@contextmanager
def unasked(modules: list[nn.Module]) -> Iterator[None]:
    """Modules that do not checkpoint by themselves meanwhile."""
    asking = [m for m in modules if asks(m)]
    for m in asking:
        m.__dict__["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for m in asking:
            m.__dict__["gradient_checkpointing"] = True


class Method:
    """A method on one module's instance that goes through its owner.

    It looks like the one that it replaces, and copies of the module do not have it.
    """

    def __init__(self, owner: Any, module: nn.Module, name: str, call: Callable[..., Any]) -> None:
        """call: (the method that was there, *args, **kwargs) -> result."""
        self.owner, self.module, self.name, self.call = owner, module, name, call
        self.own = module.__dict__.get(name)  # of somebody else, on the instance
        self.__wrapped__ = self.own or MethodType(getattr(type(module), name), module)
        self.__name__, self.__doc__ = name, self.__wrapped__.__doc__
        self.__self__ = module

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.__wrapped__, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return MethodType(getattr(type(self.module), self.name), memo.get(id(self.module), self.module))

    def __reduce__(self) -> Any:
        return _class_method, (self.module, self.name)

    def install(self) -> None:
        """Onto the instance; a module's own way of setting attributes is passed by."""
        self.module.__dict__[self.name] = self

    def uninstall(self) -> None:
        """What was there before."""
        if self.own is None:
            del self.module.__dict__[self.name]
        else:
            self.module.__dict__[self.name] = self.own


def _class_method(module: nn.Module, name: str) -> Any:
    return MethodType(getattr(type(module), name), module)
