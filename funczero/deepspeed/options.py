"""What `optimizer.params` and `scheduler.params` may hold: it depends on their types."""
from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any

import torch

from funczero.deepspeed.keys import ConfigError, Key, honour, ignore, kind_of, refuse
from funczero.optim.from_torch import ELEMENTWISE
from funczero.schedules import TORCH

_RATES: dict[str, Key] = {
    "weight_decay": honour(0.0, low=0),
    "eps": honour(1e-8, low=1e-300),
    "betas": honour((0.9, 0.999), low=0, below=1),
    "lr": honour(1e-3, low=0),
}
_PLAIN = {"amsgrad": refuse(False, "delete the key"), "bias_correction": refuse(True, "moments are always corrected here; delete the key")}
_ADAM = {
    **_RATES,
    **_PLAIN,
    "adam_w_mode": honour(True),
    "torch_adam": honour(False),
    "set_grad_none": ignore(True, "gradients are values, there is nothing to set"),
    "fp32_optimizer_states": refuse(True, "moments are float32; delete the key"),
}
OPTIMIZERS: dict[str, dict[str, Key]] = {  # in lower case; any case is understood
    "adam": _ADAM,
    "adamw": _ADAM,
    "lion": {k: _RATES[k] for k in ("lr", "betas", "weight_decay")},
    "adagrad": {"lr": honour(1e-2, low=0), "eps": honour(1e-10, low=1e-300), "weight_decay": honour(0.0, low=0)},
}
_WHOLE = "it needs whole leaves, which no bracket deals out yet; write AdamW, or Lion"
_FOREIGN = {
    **dict.fromkeys(("lamb", "muon", "adafactor"), _WHOLE),
    **dict.fromkeys(("muadam", "muadamw", "musgd"), "its rates by width are rules of your own: fz.adamw([(regex, lr), ...]); write AdamW or SGD"),
    **dict.fromkeys(("onebitadam", "zerooneadam", "onebitlamb"), "DeepSpeed has removed it; write AdamW"),
    **dict.fromkeys(("fusedadam", "cpuadam", "deepspeedcpuadam"), 'it is the name of an implementation; write "Adam", which is AdamW, or "AdamW"'),
    **dict.fromkeys(("lbfgs", "sparseadam"), "it is not a function of one gradient; write AdamW"),
}
_SAME = {"foreach", "fused", "capturable"}  # of torch.optim: ways to compute the same

_WARMUP = {"warmup_min_lr": honour(0.0, "rate"), "warmup_num_steps": honour(1000, low=1), "warmup_type": honour("log", choices=("log", "linear"))}
_TOTAL = {"total_num_steps": Key("int", ..., low=1)}
SCHEDULERS: dict[str, dict[str, Key]] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": honour(1e-3, "rate"),
        "lr_range_test_step_size": honour(2000, low=1),
        "lr_range_test_step_rate": honour(1.0),
        "lr_range_test_staircase": honour(False),
    },
    "OneCycle": {
        "cycle_min_lr": Key("rate", ...),
        "cycle_max_lr": Key("rate", ...),
        "decay_lr_rate": honour(0.0),
        "cycle_first_step_size": honour(2000.0),
        "cycle_second_step_size": honour(None, "number"),
        "cycle_first_stair_count": honour(0, low=0),
        "cycle_second_stair_count": honour(None, "int", 0),
        "decay_step_size": honour(0.0, low=0),
        "cycle_momentum": honour(True),
        "cycle_min_mom": honour(0.8, "rate", 0, below=1),
        "cycle_max_mom": honour(0.9, "rate", 0, below=1),
        "decay_mom_rate": honour(0.0),
    },
    "WarmupLR": {**_WARMUP, "warmup_max_lr": honour(None, "rate")},
    "WarmupDecayLR": {**_WARMUP, "warmup_max_lr": honour(1e-3, "rate"), **_TOTAL},
    "WarmupCosineLR": {
        **_TOTAL,
        "warmup_min_ratio": honour(0.0),
        "warmup_num_steps": honour(1000, low=1),
        "cos_min_ratio": honour(1e-4),
        "warmup_type": honour("log", choices=("log", "linear")),
    },
}


def optimizer_keys(name: str, where: str, torch_adam: bool) -> dict[str, Key]:
    """The parameters of an optimizer type, or one sentence."""
    if name.lower() in OPTIMIZERS:
        own = OPTIMIZERS[name.lower()]
        decays = torch_adam and name.lower() in ("adam", "adamw")
        return {**own, "weight_decay": honour(0.01, low=0)} if decays else own
    if name == "SGD":
        keys = {**_signature(torch.optim.SGD), "maximize": refuse(False, "delete the key"), "dampening": refuse(0.0, "delete the key")}
        return {**keys, "lr": honour(1e-3, low=0), "momentum": honour(0.0, low=0, below=1)}
    if name in ELEMENTWISE:
        return _signature(getattr(torch.optim, name))
    if name.lower() in _FOREIGN:
        raise ConfigError(f"{where}{name!r} is not here: {_FOREIGN[name.lower()]}")
    raise ConfigError(f"{where}there is no optimizer {name!r}; write {_nearest(name, ['Adam', 'AdamW', 'Lion', 'Adagrad', 'SGD', *ELEMENTWISE])}")


def scheduler_keys(name: str, where: str) -> dict[str, Key]:
    """The parameters of a scheduler type, or one sentence."""
    if name in SCHEDULERS:
        return SCHEDULERS[name]
    if name in TORCH:
        keys = _signature(getattr(torch.optim.lr_scheduler, name), "optimizer", "last_epoch", "verbose")
        if "cycle_momentum" in keys:
            keys["cycle_momentum"] = Key("flag", True)
        return keys
    raise ConfigError(f"{where}there is no schedule {name!r} that a file can describe; write {_nearest(name, [*SCHEDULERS, *TORCH])}")


def _signature(cls: Any, *without: str) -> dict[str, Key]:
    """The arguments of a class of torch as keys, each of the type of its default."""
    out: dict[str, Key] = {}
    for name, p in list(inspect.signature(cls).parameters.items()):
        if name in ("params", *without):
            continue
        if name in _SAME:
            out[name] = ignore(None, "it is a way to compute the same values", "any")
        elif name in ("differentiable",):
            out[name] = refuse(False, "delete the key")
        elif p.default is inspect.Parameter.empty:
            out[name] = Key("any", ...)
        else:
            kind = "number" if isinstance(p.default, (int, float)) and not isinstance(p.default, bool) else kind_of(p.default)
            whole = cls.__module__.endswith("lr_scheduler") and isinstance(p.default, int) and kind == "number"
            out[name] = Key("int" if whole else kind, p.default)
    return out


def _nearest(name: str, known: list[str]) -> str:
    low = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), list(low), 1, 0.5)
    return repr(low[close[0]]) if close else f"one of {', '.join(known)}"
