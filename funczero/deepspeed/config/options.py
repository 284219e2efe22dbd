"""What `optimizer.params` and `scheduler.params` may hold: it depends on their types."""

from __future__ import annotations

import inspect
import math
from difflib import get_close_matches
from typing import Any

import torch

from funczero.deepspeed.config.key import COUNT, RATE, ConfigError, Key, count, honour, ignore, kind_of, rate, refuse
from funczero.optim.from_torch import ELEMENTWISE
from funczero.optim.schedules import TORCH

_RATES: dict[str, Key] = {
    "weight_decay": rate(0.0, "number"),
    "eps": honour(1e-8, low=1e-300, high=RATE),
    "betas": honour((0.9, 0.999), low=0, below=1),
    "lr": rate(1e-3, "number"),
}
_PLAIN = {
    "amsgrad": refuse(False, "delete the key"),
    "bias_correction": refuse(True, "moments are always corrected here; delete the key"),
}
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
    "adagrad": {
        "lr": rate(1e-2, "number"),
        "eps": honour(1e-10, low=1e-300, high=RATE),
        "weight_decay": _RATES["weight_decay"],
    },
    "lamb": {
        **_RATES,
        "bias_correction": honour(True),
        "max_coeff": honour(10.0, low=0, high=RATE),
        "min_coeff": honour(0.01, low=0, high=RATE),
        "eps_inside_sqrt": refuse(False, "eps is added to the root here; delete the key"),
        "amsgrad": _PLAIN["amsgrad"],
    },
    "muon": {
        "lr": rate(None, "number"),
        "muon_lr": rate(None, "number"),
        "adam_lr": rate(None, "number"),
        "momentum": honour(0.95, low=0, below=1),
        "weight_decay": _RATES["weight_decay"],
        "betas": honour((0.9, 0.95), low=0, below=1),
        "eps": honour(1e-10, low=1e-300, high=RATE),
        "ns_method": ignore(
            "gram", "five Newton-Schulz steps are taken as torch.optim.Muon takes them, whatever it says"
        ),
        "per_head_muon": refuse(False, "matrices are taken as they are; delete the key"),
    },
}
_FOREIGN = {
    **dict.fromkeys(
        ("muadam", "muadamw", "musgd"),
        "its rates by width are rules of your own: fz.adamw([(regex, lr), ...]); write AdamW or SGD",
    ),
    **dict.fromkeys(("onebitadam", "zerooneadam", "onebitlamb"), "DeepSpeed has removed it; write AdamW"),
    **dict.fromkeys(
        ("fusedadam", "cpuadam", "deepspeedcpuadam"),
        'it is the name of an implementation; write "Adam", which is AdamW, or "AdamW"',
    ),
    **dict.fromkeys(("lbfgs", "sparseadam"), "it is not a function of one gradient; write AdamW"),
}
_SAME = {"foreach", "fused", "capturable"}  # of torch.optim: ways to compute the same

_WARMUP = {
    "warmup_min_lr": rate(0.0),
    "warmup_num_steps": count(1000),
    "warmup_type": honour("log", choices=("log", "linear")),
}
_TOTAL = {"total_num_steps": Key("int", ..., low=1, high=COUNT)}
SCHEDULERS: dict[str, dict[str, Key]] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": rate(1e-3),
        "lr_range_test_step_size": count(2000),
        "lr_range_test_step_rate": rate(1.0, "number"),
        "lr_range_test_staircase": honour(False),
    },
    "OneCycle": {
        "cycle_min_lr": rate(...),
        "cycle_max_lr": rate(...),
        "decay_lr_rate": rate(0.0, "number"),
        "cycle_first_step_size": honour(2000.0, low=1, high=COUNT),
        "cycle_second_step_size": honour(None, "number", 0, high=COUNT),
        "cycle_first_stair_count": count(0, 0),
        "cycle_second_stair_count": count(None, 0),
        "decay_step_size": honour(0.0, low=0, high=COUNT),
        "cycle_momentum": honour(True),
        "cycle_min_mom": honour(0.8, "rate", 0, below=1),
        "cycle_max_mom": honour(0.9, "rate", 0, below=1),
        "decay_mom_rate": rate(0.0, "number"),
    },
    "WarmupLR": {**_WARMUP, "warmup_max_lr": rate(None)},
    "WarmupDecayLR": {**_WARMUP, "warmup_max_lr": rate(1e-3), **_TOTAL},
    "WarmupCosineLR": {
        **_TOTAL,
        "warmup_min_ratio": rate(0.0, "number", 1),
        "warmup_num_steps": count(1000),
        "cos_min_ratio": rate(1e-4, "number", 1),
        "warmup_type": honour("log", choices=("log", "linear")),
    },
}
_TORCHS: dict[str, tuple[str, float, float]] = {  # arguments of torch's classes: kind, smallest, largest
    **dict.fromkeys(
        ("lr", "weight_decay", "lambd", "eps", "momentum_decay", "base_lr", "max_lr", "eta_min", "power"),
        ("rate", 0, RATE),
    ),
    "gamma": ("rate", 0, 10),
    **dict.fromkeys(
        ("alpha", "rho", "momentum", "end_factor", "pct_start", "base_momentum", "max_momentum"), ("number", 0, 1)
    ),
    **dict.fromkeys(("factor", "start_factor"), ("number", 1e-12, 1)),
    "betas": ("pair", 0, 1),
    **dict.fromkeys(("etas", "step_sizes"), ("pair", 0, RATE)),
    **dict.fromkeys(("div_factor", "final_div_factor"), ("number", 1e-6, COUNT)),
    **dict.fromkeys(
        (
            "step_size",
            "T_max",
            "T_0",
            "T_mult",
            "step_size_up",
            "step_size_down",
            "total_steps",
            "epochs",
            "steps_per_epoch",
        ),
        ("int", 1, COUNT),
    ),
    "total_iters": ("int", 0, COUNT),
    "t0": ("number", 0, COUNT),
    "milestones": ("counts", 0, COUNT),
}
_OPEN = ("betas", "rho", "momentum", "base_momentum", "max_momentum")  # of these, less than 1


def optimizer_keys(name: str, where: str, torch_adam: bool) -> dict[str, Key]:
    """The parameters of an optimizer type, or one sentence."""
    if name.lower() in OPTIMIZERS:
        own = OPTIMIZERS[name.lower()]
        decays = torch_adam and name.lower() in ("adam", "adamw")
        return {**own, "weight_decay": rate(0.01, "number")} if decays else own
    if name == "SGD":
        keys = {
            **_signature(torch.optim.SGD),
            "maximize": refuse(False, "delete the key"),
            "dampening": refuse(0.0, "delete the key"),
        }
        return {**keys, "lr": rate(1e-3, "number"), "momentum": honour(0.0, low=0, below=1)}
    if name == "Adafactor":
        keys = {**_signature(torch.optim.Adafactor), "maximize": refuse(False, "delete the key")}
        bounds = {"beta2_decay": honour(-0.8, "number", low=-10, high=0), "d": honour(1.0, low=1, high=COUNT)}
        return {**keys, **bounds, "eps": refuse((None, 1e-3), "delete the key", "any")}
    if name in ELEMENTWISE:
        return _signature(getattr(torch.optim, name))
    if name.lower() in _FOREIGN:
        raise ConfigError(f"{where}{name!r} is not here: {_FOREIGN[name.lower()]}")
    known = ["Adam", "AdamW", "Lion", "Adagrad", "Lamb", "Muon", "SGD", "Adafactor", *ELEMENTWISE]
    raise ConfigError(f"{where}there is no optimizer {name!r}; write {_nearest(name, known)}")


def scheduler_keys(name: str, where: str) -> dict[str, Key]:
    """The parameters of a scheduler type, or one sentence."""
    if name in SCHEDULERS:
        return SCHEDULERS[name]
    if name in TORCH:
        keys = _signature(getattr(torch.optim.lr_scheduler, name), "optimizer", "last_epoch", "verbose")
        if "cycle_momentum" in keys:
            keys["cycle_momentum"] = Key("flag", True)
        if "scale_fn" in keys:
            keys["scale_fn"] = refuse(None, "a file describes no function; delete the key", "any")
        return keys
    raise ConfigError(
        f"{where}there is no schedule {name!r} that a file can describe; write {_nearest(name, [*SCHEDULERS, *TORCH])}"
    )


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
        elif name in _TORCHS:
            kind, low, high = _TORCHS[name]
            default = ... if p.default is inspect.Parameter.empty else p.default
            out[name] = Key(kind, default, low=low, high=high, below=1 if name in _OPEN else math.inf)
        else:
            out[name] = Key(
                "any" if p.default is inspect.Parameter.empty else kind_of(p.default),
                ... if p.default is inspect.Parameter.empty else p.default,
            )
    return out


def _nearest(name: str, known: list[str]) -> str:
    low = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), list(low), 1, 0.5)
    return repr(low[close[0]]) if close else f"one of {', '.join(known)}"
