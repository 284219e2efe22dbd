"""`deepspeed.utils`: logger, RepeatingLoader, and whole values of parameters that are sharded."""

from __future__ import annotations

import logging
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from funczero.core.number import dtype_name
from funczero.deepspeed.engine.leaf import number, read_leaf, write_part
from funczero.deepspeed.engine.loader import RepeatingLoader as RepeatingLoader
from funczero.deepspeed.engine.log import logger as logger
from funczero.deepspeed.engine.ranks import get_rank
from funczero.deepspeed.engine.window import mean_gradient
from funczero.layout.slots import Slots

NAMES = {
    "exp_avg": ("mu", "exp_avg"),
    "exp_avg_sq": ("nu", "exp_avg_sq"),
    "momentum_buffer": ("trace", "momentum_buffer"),
    "sum": ("sum",),
}


def log_dist(message: str, ranks: list[int] | None = None, level: int = logging.INFO) -> None:
    """A line of some ranks; all of them with None or [-1]."""
    if ranks is None or -1 in ranks or get_rank() in ranks:
        logger.log(level, "[rank %d] %s", get_rank(), message)


def home(param: Any) -> tuple[Any, str]:
    """A parameter's engine and its name there."""
    found: Any = getattr(param, "home", (None, ""))
    engine = None if found[0] is None else found[0]()
    if engine is None:
        raise ValueError("safe_get: this parameter belongs to no engine; give one of engine.parameters()")
    return engine, found[1]


def noted(engine: Any, call: str, name: str, value: Tensor) -> None:
    """Enters a write into the ledger with a checksum of its value: the next sum compares it. Nothing is sent."""
    ledger = engine.live_mesh.ledger
    if ledger.ranks > 1:
        number = zlib.crc32(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        dtype, size = dtype_name(value.dtype), value.numel() * value.element_size()
        engine.together(call, lambda: ledger.note(f"write {number:08x}", name, dtype, size))


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The master, whole, on every rank. A collective."""
    engine, name = home(param)
    read = lambda: read_leaf(engine.state.params, name, engine.live_mesh)
    return engine.together(f"safe_get_full_fp32_param({name!r})", read)


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Writes the master and what is kept of it elsewhere; every rank gives the same value, or all are told so later."""
    engine, name = home(param)
    noted(engine, f"safe_set_full_fp32_param({name!r})", name, value)
    engine.write_parameters({name: value})


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The open window's gradients so far over its micro-batches, whole, unscaled and before the clip. A collective.

    None between windows.
    """
    engine, name = home(param)
    read = lambda: mean_gradient(engine.train_step, engine.state, engine.gradient_accumulation_steps())
    grads = engine.together(f"safe_get_full_grad({name!r})", read)
    return None if grads is None else grads.leaves()[number(grads.where.structure, name)]


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """A moment, whole, by torch's name of it: exp_avg, exp_avg_sq, momentum_buffer. A collective.

    None for a frozen parameter.
    """
    engine, name = home(param)
    read = lambda: read_leaf(_moment(engine, optim_state_key), name, engine.live_mesh)
    return engine.together(f"safe_get_full_optimizer_state({name!r}, {optim_state_key!r})", read)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Writes a moment; every rank gives the same value, or all are told so later."""
    engine, name = home(param)
    noted(engine, f"safe_set_full_optimizer_state({name!r}, {optim_state_key!r})", name, value)
    write_part(_moment(engine, optim_state_key), name, value)


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """This rank's rows of the master."""
    return _part(home(param)[0].state.params, param)


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """This rank's rows of a moment."""
    return _part(_moment(home(param)[0], optim_state_key), param)


def _part(slots: Slots, param: nn.Parameter) -> Tensor | None:
    return slots.leaves()[number(slots.where.structure, home(param)[1])]


def _moment(engine: Any, key: str) -> Slots:
    """The Slots of a moment."""
    found: dict[str, Slots] = {}
    for own in engine.state.chain.values():
        found |= dict(_slots(own))
    hit = next((found[n] for n in NAMES.get(key, (key,)) if n in found), None)
    if hit is None:
        raise KeyError(f"safe_get_full_optimizer_state: this optimizer keeps no {key!r}; it keeps {sorted(found)}")
    return hit


def _slots(own: Any) -> list[tuple[str, Slots]]:
    fields = own._asdict().items() if hasattr(own, "_asdict") else own.items() if isinstance(own, dict) else ()
    out: list[tuple[str, Slots]] = []
    for n, x in fields:
        out += [(n, x)] if isinstance(x, Slots) else _slots(x) if isinstance(x, dict) else []
    return out
