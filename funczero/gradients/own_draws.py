"""A generator of its own for each thread that stands for a rank: torch has one for all threads.

An op that draws finds the rank's state in torch's generator. Only such ops are met: they have a kernel of ours under a
dispatch key that the threads of ranks alone look at, and at which every other op passes on in C++. (A dispatch mode
would meet every op, in python, which makes a small step four times as long.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# Of torch.export, which includes it in its own thread's keys while it traces. It comes before all others, and torch
# has a fallback for it that passes on.
KEY = "PreDispatch"
NAME = "funczero own generator"  # of what torch hands on to autograd's threads with the thread's other state


def turns() -> threading.Lock:
    """A lock for threads that draw one after the other; the ops that draw are found, all that there are by now."""
    _kernels().complete()
    return threading.Lock()


class Named:
    """Inside, `own_generator` is that of an object, in this thread and in autograd's that work for it."""

    def __init__(self, own: Any) -> None:
        """own: has a `generator`."""
        self._own = own

    def __enter__(self) -> None:
        self._before = _current()
        torch._C._stash_obj_in_tls(NAME, self._own)

    def __exit__(self, *error: object) -> None:
        torch._C._stash_obj_in_tls(NAME, self._before)


class OwnGenerator:
    """Every draw inside comes from a generator of one's own, as a simulated rank wants it.

    >>> with OwnGenerator(turns()) as own:
    ...     _ = own.generator.manual_seed(3)
    ...     inside = torch.rand(2)
    >>> bool((inside == torch.rand(2, generator=torch.Generator().manual_seed(3))).all())
    True
    """

    def __init__(self, lock: threading.Lock) -> None:
        """lock: of `turns`, shared by all who draw at the same time; an op that draws waits for nobody."""
        self.lock, self.generator = lock, torch.Generator()
        self._named = Named(self)
        self._guard: Any = torch._C._IncludeDispatchKeyGuard(_key())

    def __enter__(self) -> OwnGenerator:
        self._named.__enter__()
        self._guard.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(None, None, None)
        self._named.__exit__()

    def drawn(self, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What an op returns that finds our state in torch's generator."""
        with self.lock:
            shared, state = torch.default_generator, torch.default_generator.get_state()
            shared.set_state(self.generator.get_state())
            try:
                return op(*args, **kwargs)
            finally:
                self.generator.set_state(shared.get_state())
                shared.set_state(state)


def own_generator() -> Any:
    """That of the simulated rank that this thread is, or of a plan; None where it is neither."""
    own = _current()
    return None if own is None else own.generator


class Routed:
    """Stands for torch's generator in torch.random while ranks are simulated: manual_seed and get_rng_state mean the
    rank's own.
    """

    def __init__(self, shared: torch.Generator) -> None:
        self.shared = shared

    def __getattr__(self, name: str) -> Any:
        return getattr(own_generator() or self.shared, name)


def _current() -> Any:
    return torch._C._get_obj_in_tls(NAME) if torch._C._is_key_in_tls(NAME) else None


class _Kernels:
    """Our kernels of all ops that draw; they stay, and outside an OwnGenerator refuse who meets them."""

    def __init__(self) -> None:
        self._lock, self._seen, self._libraries = threading.Lock(), set[str](), dict[str, Any]()

    def complete(self) -> None:
        """Those of ops that were not there at the last time, too."""
        with self._lock:
            for name in set(torch._C._dispatch_get_all_op_names()) - self._seen:
                self._seen.add(name)
                qualified, _, overload = name.partition(".")
                found = torch._C._get_operation_overload(qualified, overload)
                if found is not None and torch.Tag.nondeterministic_seeded in found[2]:
                    self._add(*qualified.split("::", 1), overload=overload or "default")
            for name in set(torch._ops._higher_order_ops) - self._seen:
                self._seen.add(name)
                _pass_on(torch._ops._higher_order_ops[name])

    def _add(self, space: str, name: str, *, overload: str) -> None:
        op = getattr(getattr(getattr(torch.ops, space), name), overload)
        if space not in self._libraries:
            self._libraries[space] = torch.library.Library(space, "IMPL", KEY)
        self._libraries[space].impl(op, lambda *args, **kwargs: _met(op, args, kwargs))


def _pass_on(op: Any) -> None:
    """An op of ops (an autograd.Function inside torch.func is one) goes on to its next key, since torch has no fallback
    for those. While torch.export traces, its own way comes before this.
    """
    key = _key()
    if key in op.py_kernels:
        return

    def on(*args: Any, **kwargs: Any) -> Any:
        keys = torch._ops._compute_keyset(args, kwargs, op.non_fallthrough_keys.remove(key))
        return op.dispatch(keys.highestPriorityTypeId(), *args, **kwargs)

    op.py_impl(key)(on)


def _key() -> Any:
    return getattr(torch._C.DispatchKey, KEY)


@cache
def _kernels() -> _Kernels:
    return _Kernels()


def _met(op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    own = _current()
    if own is None:
        why = "this process has simulated ranks, and what draws is met there where torch.export would record it"
        raise RuntimeError(f"{op} is traced before dispatch, but {why}; export in a process of its own")
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key())):
        return own.drawn(op, args, kwargs)
