"""`zero.Init`: parameters are cut as soon as the module that holds them is built, so that no rank holds the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from funczero.comm.launch import broadcast, launch_gather, wait
from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.held import ALLOWED, Closed, emptied, filled_in, is_fact
from funczero.layout.lazy import Fill


class Init:
    """Modules built inside hold this rank's rows of rank 0's values. initialize(model=...) takes them, at any stage.

    Law: at most this rank's share of the model and the largest submodule with parameters of its own are in memory. What
    is built has the values that the same code gives on rank 0 without this. A parent may write into its children while
    it is open, as with `nn.init.normal_(child.weight)`: they are whole for that call, on all ranks. Code that
    initialises parameters later opens them with GatheredParameters.

    Args:
      module: cut this one, which is built already.
      dtype: of the values; by default as they are built.
      enabled: False: it does nothing.

    Source: DeepSpeed 0.19.8, zero.Init.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
    ) -> None:
        if mpu is not None or data_parallel_group is not None:
            raise ValueError("zero.Init: it cuts over all processes; leave mpu and data_parallel_group out")
        if remote_device not in (None, "none"):
            raise ValueError(
                f"zero.Init: remote_device={remote_device!r} asks for offload, which does not exist here yet; "
                "leave it out"
            )
        self.enabled, self.dtype, self.is_open = enabled, dtype, False
        self._owners: list[nn.Module] = []
        self._hooks: list[Any] = []
        if enabled and module is not None:
            ranks.init_distributed(verbose=False)
            cut(module, dtype, self)
            ranks.compared("the end of zero.Init")

    def __enter__(self) -> Init:
        if self.enabled:
            ranks.init_distributed(verbose=False)
            self.is_open = True
            self._hooks = [
                register_module_module_registration_hook(self._built),
                register_module_parameter_registration_hook(self._owns),
            ]
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        for h in self._hooks:
            h.remove()
        for m in self._owners if kind is None else ():
            cut(m, self.dtype, self)
        self.is_open = False
        if self.enabled and kind is None:
            ranks.compared("the end of zero.Init")
        self._owners, self._hooks = [], []

    def _built(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            cut(child, self.dtype, self)

    def _owns(self, module: nn.Module, name: str, param: Any) -> None:
        if not self._owners or self._owners[-1] is not module:
            self._owners.append(module)


def cut(module: nn.Module, dtype: torch.dtype | None, within: Init | None = None) -> None:
    """Leaves of every parameter this rank's rows of rank 0's values; what lies on meta has none, and stays as it is."""
    for name, p in module.named_parameters():
        if not hasattr(p, "home") and not p.is_meta:
            whole = p.detach() if dtype is None else p.detach().to(dtype)
            with ranks.called(f"zero.Init, parameter {name!r}") as mesh:
                close(p, name, broadcast(whole, 0, mesh), within)


class Waiting(Closed):
    """A parameter that zero.Init has cut and no engine has taken over: it can be written into while that is open."""

    part: Tensor
    within: Init | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with rows of its own."""
        p: Any = nn.Parameter(torch.zeros((), dtype=self.dtype).expand(self.shape), self.requires_grad)
        p.__class__ = Waiting
        p.home, p.part, p.within = self.home, self.part.clone(), self.within
        return memo.setdefault(id(self), p)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What writes while zero.Init is open, or reads without a gradient, finds whole values; the rest is refused."""
        kwargs = kwargs or {}
        found = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Waiting | Seen)]
        params = list(dict.fromkeys(x.base if isinstance(x, Seen) else x for x in found))
        if not all(p.within is not None and p.within.is_open and _without_gradient(func) for p in params):
            args, kwargs = torch.utils._pytree.tree_map(_base, (args, kwargs))
            return super().__torch_function__(func, types, args, kwargs)
        if _is_plain(func) and not any(isinstance(x, Seen) for x in found):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _opened_for(params, func, args, kwargs)


class Seen(Tensor):
    """A part of a waiting parameter, as weight.data or weight[0]: its shape, and how it is found in the whole one."""

    base: Any
    find: Callable[[], Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_plain(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return Waiting.__torch_function__(func, types, args, kwargs)


def _base(x: Any) -> Any:
    return x.base if isinstance(x, Seen) else x


def _is_plain(func: Any) -> bool:
    """Does it ask for no value?"""
    name = func.__name__
    return name in ALLOWED or name.startswith("new_") or name in ("__get__", "__set__", "__delete__") and is_fact(func)


def _without_gradient(func: Any) -> bool:
    name, owner = func.__name__, getattr(getattr(func, "__self__", None), "__name__", "")
    writes = name.endswith("_") and not name.endswith("__") or name in ("__setitem__", "__getitem__")
    return not torch.is_grad_enabled() or writes or _is_plain(func) or owner == "data" or name == "detach"


def _opened_for(params: list[Any], func: Any, args: Any, kwargs: Any) -> Any:
    """A call over whole values: rank 0's are kept, and what it returns of them is found again in the next one."""
    names = ", ".join(repr(p.home[1]) for p in params)
    within, facts = [p.within for p in params], [p.home[1] for p in params]
    with ranks.called(f"zero.Init, {func.__name__} of parameter {names}") as mesh, torch.no_grad():
        for p in params:
            reopen(p)
        try:
            whole = torch.utils._pytree.tree_map(lambda x: x.find() if isinstance(x, Seen) else x, (args, kwargs))
            out = func(*whole[0], **whole[1])
            stores = {p.untyped_storage().data_ptr(): p for p in params if p.numel()}
            keep = lambda x: _kept(x, stores, params, lambda: func(*_found(args), **_found(kwargs)))
            out = torch.utils._pytree.tree_map(keep, out)
        finally:
            for p, name, init in zip(params, facts, within, strict=True):
                close(p, name, broadcast(p.detach(), 0, mesh), init)
    return out


def _found(given: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.find() if isinstance(x, Seen) else x, given)


def _kept(x: Any, stores: dict[int, Any], params: list[Any], again: Callable[[], Any]) -> Any:
    """What a call returns: a parameter itself, what shares its memory as Seen, anything else as it is."""
    if not isinstance(x, Tensor) or any(x is p for p in params) or not x.numel():
        return x
    base = stores.get(x.untyped_storage().data_ptr())
    if base is None:
        return x
    out: Any = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape).as_subclass(Seen)
    out.base, out.find = base, again
    return out


def close(p: Any, name: str, whole: Tensor, within: Init | None = None) -> None:
    """A parameter that holds its rows of a value, and shows none."""
    part = whole[rows(whole.shape)].clone()
    if not isinstance(p, Closed):
        filled_in(p, whole)  # its dtype and device
        emptied(p)
    p.__class__ = Waiting
    p.home, p.part, p.within = (None, name), part, within


def rows(shape: Sequence[int], size: int = 0, index: int = 0) -> tuple[slice, ...]:
    """Part `index` of `size` equal ones: ceil(rows / size) neighbouring rows, as the chain cuts them; by default this
    rank's.
    """
    if not shape:
        return ()
    size, index = (size, index) if size else (ranks.get_world_size(), ranks.get_rank())
    per = -(-shape[0] // size)
    return (slice(min(index * per, shape[0]), min((index + 1) * per, shape[0])),)


def whole_of(p: Any) -> Tensor:
    """All rows of a parameter that is cut. A collective."""
    if not p.shape or ranks.get_world_size() == 1:
        return p.part.clone()
    with ranks.called(f"the parameter {p.home[1]!r} of zero.Init, opened") as mesh:
        mine = p.part.new_zeros((-(-p.shape[0] // mesh.axes["data"].size), *p.shape[1:]))
        mine[: len(p.part)] = p.part
        return wait(launch_gather(mine.view(-1), "data", mesh)).view(-1, *p.shape[1:])[: p.shape[0]].clone()


class _Rows:
    """A leaf of which only this rank's rows are here."""

    def __init__(self, part: Tensor, start: int) -> None:
        self.part, self.start = part, start

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor:
        first, *rest = place
        return self.part[(slice(first.start - self.start, first.stop - self.start), *rest)]


def start_of(p: Any, whole: bool, size: int, index: int) -> Any:
    """A parameter as step.init reads it; with whole, or of a scalar, its whole value. A collective then, and where a
    rank reads other rows than it holds.

    Args:
      size, index: of how many equal parts of the rows this rank reads which.
    """
    if getattr(p, "part", None) is None:
        return p.detach()
    if whole or not p.shape:
        return whole_of(p)
    place = rows(p.shape, size, index)
    part, begin = p.part if size == ranks.get_world_size() else whole_of(p)[place].clone(), place[0].start
    return Fill(tuple(p.shape), part.dtype, lambda: _Rows(part, begin))  # type: ignore[return-value,arg-type]


def reopen(p: Any) -> None:
    """An ordinary parameter again, for stages that hold it whole."""
    filled_in(p, whole_of(p))
    del p.home, p.part
    p.__dict__.pop("within", None)


@contextmanager
def opened(params: list[Any], rank: int | None) -> Iterator[None]:
    """Whole values of parameters that no engine has taken over yet."""
    kept = [(p, p.home[1], getattr(p, "within", None)) for p in params]
    for p, *_ in kept:
        reopen(p)
    before = [p._version for p in params]
    try:
        yield
    finally:
        touched = [n for (p, n, _), v in zip(kept, before, strict=True) if p._version != v]
        for p, name, within in kept:
            value = p.detach()
            if rank is not None:
                with ranks.called(f"GatheredParameters, parameter {name!r}") as mesh:
                    value = broadcast(value, rank, mesh)
            close(p, name, value, within)
        if rank is None and touched:
            raise RuntimeError(
                f"GatheredParameters: {touched[0]!r} was written to on this rank alone; write modifier_rank=0"
            )
