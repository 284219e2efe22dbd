"""`deepspeed.zero`: parameters opened for reading and writing, and modules that are cut while they are built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from funczero.comm.launch import broadcast
from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.held import Closed, ZeroParamStatus, emptied, filled_in
from funczero.deepspeed.engine.leaf import read_leaf
from funczero.deepspeed.engine.zero_init import Init as Init
from funczero.deepspeed.engine.zero_init import opened


class GatheredParameters:
    """Whole parameters inside, on every rank: an engine's masters, or the values of a module that zero.Init cut.

    Law: with modifier_rank what that rank wrote reaches every master. Without it a write is refused. All ranks enter
    and leave together.

    Args:
      params: a parameter, some of them, or a module.
      modifier_rank: whose values count when it is left; None: reading only.
      enabled: False: it does nothing.
    """

    def __init__(
        self, params: Any, modifier_rank: int | None = None, fwd_module: Any = None, enabled: bool = True
    ) -> None:
        params = params.parameters() if isinstance(params, nn.Module) else params
        items = [params] if isinstance(params, Tensor) else list(params)
        self.params = [p for p in dict.fromkeys(items) if hasattr(p, "home")] if enabled else []
        if modifier_rank is not None and not 0 <= modifier_rank < ranks.get_world_size():
            raise ValueError(
                f"GatheredParameters: there is no rank {modifier_rank} in a world of {ranks.get_world_size()}; "
                "write modifier_rank=0"
            )
        self.rank = modifier_rank
        self._open: Any = None

    def __enter__(self) -> None:
        self._open = _opened(self.params, self.rank)
        self._open.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._open.__exit__(*error)


@contextmanager
def _opened(params: list[Any], rank: int | None) -> Iterator[None]:
    engines = {id(e): e for p in params if p.home[0] is not None and (e := p.home[0]()) is not None}
    waiting = [p for p in params if p.home[0] is None]
    inside = [p for p in params if p.home[0] is not None]
    for e in engines.values():
        if e.window_is_open(writes=rank is not None):
            raise RuntimeError(
                "GatheredParameters: a window of micro-batches is open, and parameters stand still within it; "
                "write right after an update"
            )
    with opened(waiting, rank):
        values = [_read(p.home[0](), p.home[1]) for p in inside]
        before = [(None if isinstance(p, Closed) else p.data, p.__class__, p.dtype) for p in inside]
        for p, x in zip(inside, values, strict=True):
            assert x is not None
            _show(p, x)
        versions = [p._version for p in inside]
        failed = True
        try:
            yield
            failed = False
        finally:
            now = [p.data for p in inside]
            touched = [p.home[1] for p, v in zip(inside, versions, strict=True) if p._version != v]
            for p, was in zip(inside, before, strict=True):
                _hide(p, *was)
            for e in engines.values():
                e.refresh_parameters()
            if not failed:
                _back(inside, now, touched, rank)


def _read(engine: Any, name: str) -> Tensor | None:
    read = lambda: read_leaf(engine.state.params, name, engine.live_mesh)
    return engine.together(f"GatheredParameters({name!r})", read)


def _written(engine: Any, name: str, value: Tensor, rank: int) -> Tensor:
    what = f"the end of GatheredParameters({name!r})"
    return engine.together(what, lambda: broadcast(value, rank, engine.live_mesh))


def _show(p: Any, value: Tensor) -> None:
    if isinstance(p, Closed):
        facts = {n: getattr(p, n) for n in ("ds_id", "ds_shape", "ds_numel")}
        filled_in(p, value)
        p.__dict__.update(facts, ds_status=ZeroParamStatus.AVAILABLE)
    else:
        p.data = value


def _hide(p: Any, data: Any, cls: Any, dtype: torch.dtype) -> None:
    if cls is Closed:
        for n in ("ds_id", "ds_shape", "ds_numel", "ds_status"):
            del p.__dict__[n]
        p.data = p.data.to(dtype)
        emptied(p)
    else:
        p.data = data


def _back(params: list[Any], now: Iterable[Tensor], touched: list[str], rank: int | None) -> None:
    if rank is None:
        if touched:
            raise RuntimeError(
                f"GatheredParameters: {touched[0]!r} was written to, and would be lost; write modifier_rank=0"
            )
        return
    values: dict[Any, dict[str, Tensor]] = {}
    for p, x in zip(params, now, strict=True):
        engine, name = p.home[0](), p.home[1]
        values.setdefault(engine, {})[name] = _written(engine, name, x, rank)
    for engine, whole in values.items():
        engine.write_parameters(whole)
