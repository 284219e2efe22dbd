"""Schedules on a script's command line: the flags, and the block of a config that they make."""

from __future__ import annotations

import argparse
from typing import Any

from funczero.deepspeed.config.options import SCHEDULERS

FLAGS: dict[str, Any] = {  # what a flag is where it is not given; the others are the class's own
    "lr_range_test_step_size": 1000,
    "cycle_first_step_size": 1000,
    "cycle_min_lr": 0.01,
    "cycle_max_lr": 0.1,
    "decay_step_size": 1000,
    "cycle_first_stair_count": None,
    "warmup_max_lr": 0.001,
    "warmup_min_ratio": 0.01,
    "cos_min_ratio": 0.01,
}
COUNTS = ("step_size", "stair_count", "num_steps")


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with --lr_schedule and an option for every parameter of every schedule.

    Source: DeepSpeed 0.19.8, add_tuning_arguments, with its defaults. Where those are numbers that its classes refuse
    (-1), the option is the class's own. There is --total_num_steps, too, which two of the schedules need.
    """
    group = parser.add_argument_group("Convergence Tuning", "Convergence tuning configurations")
    group.add_argument("--lr_schedule", default=None, help=f"LR schedule for training: {', '.join(SCHEDULERS)}.")
    for name, key in {n: k for known in SCHEDULERS.values() for n, k in known.items()}.items():
        default = FLAGS.get(name, None if key.default is ... else key.default)
        if isinstance(key.default, bool):
            group.add_argument(f"--{name}", action="store_true")
        else:
            kind = str if isinstance(key.default, str) else int if name.endswith(COUNTS) else float
            group.add_argument(f"--{name}", type=kind, default=default)
    return parser


def get_config_from_args(args: Any) -> tuple[dict[str, Any] | None, str | None]:
    """(the block "scheduler" of a config, None), or (None, why there is none).

    Args:
      args: parsed by a parser of add_tuning_arguments, or anything with `lr_schedule` and the parameters' names.

    Source: DeepSpeed 0.19.8, get_config_from_args.
    """
    kind = getattr(args, "lr_schedule", None)
    if kind is None:
        return None, "--lr_schedule not specified on command line"
    if kind not in SCHEDULERS:
        return None, f"{kind} is not supported LR schedule"
    given = {n: getattr(args, n, None) for n in SCHEDULERS[kind]}
    return {"type": kind, "params": {n: x for n, x in given.items() if x is not None}}, None


def get_lr_from_config(block: Any) -> tuple[Any, str]:
    """(the largest rate that a block "scheduler" names, ""), or (None, why there is none).

    Source: DeepSpeed 0.19.8, get_lr_from_config.
    """
    for name in ("type", "params"):
        if name not in block:
            return None, f"LR schedule {name} not defined in config"
    kind, params = block["type"], block["params"]
    if kind not in SCHEDULERS:
        return None, f"{kind} is not a valid LR schedule"
    named = {"LRRangeTest": "lr_range_test_min_lr", "OneCycle": "cycle_max_lr"}.get(kind, "warmup_max_lr")
    if kind == "WarmupCosineLR":
        return None, "WarmupCosineLR scales the optimizer learning rate by a ratio, so its params define no lr"
    return params[named], ""
