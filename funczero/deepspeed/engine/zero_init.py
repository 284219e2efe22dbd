"""`zero.Init`: parameters are cut as soon as the module that holds them is built, so that no rank holds the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from funczero.deepspeed.engine.held import Closed, emptied, filled_in
from funczero.layout.lazy import Fill


class Init:
    """Modules built inside hold this rank's rows of rank 0's values. initialize(model=...) takes them, at any stage.

    Law: at most this rank's share of the model and the largest submodule with parameters of its own are in memory. Code
    that initialises parameters later (module.apply) opens them with GatheredParameters.

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
        self.enabled, self.dtype = enabled, dtype
        self._owners: list[nn.Module] = []
        self._hooks: list[Any] = []
        if enabled and module is not None:
            ranks.init_distributed(verbose=False)
            cut(module, dtype)
            ranks.compared("the end of zero.Init")

    def __enter__(self) -> Init:
        if self.enabled:
            ranks.init_distributed(verbose=False)
            self._hooks = [
                register_module_module_registration_hook(self._built),
                register_module_parameter_registration_hook(self._owns),
            ]
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        for h in self._hooks:
            h.remove()
        for m in self._owners if kind is None else ():
            cut(m, self.dtype)
        if self.enabled and kind is None:
            ranks.compared("the end of zero.Init")
        self._owners, self._hooks = [], []

    def _built(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            cut(child, self.dtype)

    def _owns(self, module: nn.Module, name: str, param: Any) -> None:
        if not self._owners or self._owners[-1] is not module:
            self._owners.append(module)


def cut(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Leaves of every parameter this rank's rows of rank 0's values."""
    for name, p in module.named_parameters():
        if not hasattr(p, "home"):
            whole = p.detach() if dtype is None else p.detach().to(dtype)
            close(p, name, broadcast(whole, 0, ranks.world_mesh(f"zero.Init, parameter {name!r}")))


def close(p: Any, name: str, whole: Tensor) -> None:
    """A parameter that holds its rows of a value, and shows none."""
    place = rows(whole.shape)
    part = whole[place].clone()
    if type(p) is not Closed:
        filled_in(p, whole)  # its dtype and device
        emptied(p)
    p.home, p.part = (None, name), part


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
    mesh = ranks.world_mesh(f"the parameter {p.home[1]!r} of zero.Init, opened")
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


@contextmanager
def opened(params: list[Any], rank: int | None) -> Iterator[None]:
    """Whole values of parameters that no engine has taken over yet."""
    kept = [(p, p.home[1]) for p in params]
    for p, _ in kept:
        reopen(p)
    before = [p._version for p in params]
    try:
        yield
    finally:
        touched = [n for (p, n), v in zip(kept, before, strict=True) if p._version != v]
        for p, name in kept:
            value = p.detach()
            if rank is not None:
                value = broadcast(value, rank, ranks.world_mesh(f"GatheredParameters, parameter {name!r}"))
            close(p, name, value)
        if rank is None and touched:
            raise RuntimeError(
                f"GatheredParameters: {touched[0]!r} was written to on this rank alone; write modifier_rank=0"
            )
