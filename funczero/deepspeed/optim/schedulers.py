"""DeepSpeed's five schedules as schedulers of any torch optimizer, with the values of funczero.schedules."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from funczero.deepspeed.config.optimizers import schedule_of
from funczero.deepspeed.config.options import SCHEDULERS


class FromConfig:
    """The config's scheduler: it writes inside the chain after every applied update, so there is nothing to step."""

    def __init__(self, optimizer: Any) -> None:
        """optimizer: the engine's."""
        self.optimizer = optimizer

    def step(self, *args: Any) -> None:
        """Nothing: engine.step() moves it."""

    def get_lr(self) -> list[float]:
        """By group, of the next update."""
        return [g["lr"] for g in self.optimizer.param_groups]

    get_last_lr = get_lr

    def state_dict(self) -> dict[str, Any]:
        """The number of applied updates, which is all there is; it comes with the engine's checkpoint."""
        return {"last_batch_iteration": int(self.optimizer.engine.state.updates) - 1}

    def load_state_dict(self, state_dict: Any) -> None:
        """Nothing: engine.load_checkpoint brings it."""


class _Schedule:
    """One of DeepSpeed's schedules over an optimizer's groups; `step()` after every update."""

    def __init__(self, optimizer: Any, last_batch_iteration: int = -1, **options: Any) -> None:
        kind = type(self).__name__
        known = SCHEDULERS[kind]
        odd = next((n for n in options if n not in known), None)
        if odd is not None:
            raise TypeError(f"{kind}: it takes no {odd!r}; write some of {', '.join(known)}")
        missing = next((n for n, k in known.items() if k.default is ... and n not in options), None)
        if missing is not None:
            raise TypeError(f"{kind}: {missing!r} is missing; add it")
        self.optimizer, self.last_batch_iteration = optimizer, last_batch_iteration
        options = {n: options.get(n, k.default) for n, k in known.items()}
        self._rates = [schedule_of(kind, options, g.get("initial_lr", g["lr"])) for g in optimizer.param_groups]
        self._write()

    def _write(self) -> None:
        updates = torch.tensor(self.last_batch_iteration + 1)
        for g, r in zip(self.optimizer.param_groups, self._rates, strict=True):
            g["lr"] = float(r.lr(updates))  # type: ignore[operator,misc]
            if r.momentum is not None and "betas" in g:
                g["betas"] = (float(r.momentum(updates)), 0.99)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """One update more, or so many."""
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        )
        self._write()

    def get_lr(self) -> list[float]:
        """By group, of the next update."""
        return [g["lr"] for g in self.optimizer.param_groups]

    get_last_lr = get_lr

    def state_dict(self) -> dict[str, Any]:
        """Its position."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position."""
        self.last_batch_iteration = state_dict["last_batch_iteration"]


class WarmupLR(_Schedule):
    """fz.schedules.warmup_lr."""


class WarmupDecayLR(_Schedule):
    """fz.schedules.warmup_decay_lr."""


class WarmupCosineLR(_Schedule):
    """fz.schedules.warmup_cosine_lr."""


class OneCycle(_Schedule):
    """fz.schedules.one_cycle."""


class LRRangeTest(_Schedule):
    """fz.schedules.lr_range_test."""


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with --lr_schedule and an option for every parameter of every schedule.

    What is not given is the class's own; a flag that is not given is off.

    Source: DeepSpeed 0.19.8, add_tuning_arguments, whose flags have defaults of their own that its classes refuse.
    """
    group = parser.add_argument_group("Convergence Tuning", "Convergence tuning configurations")
    group.add_argument("--lr_schedule", choices=list(SCHEDULERS), default=None, help="LR schedule for training.")
    for name, key in {n: k for known in SCHEDULERS.values() for n, k in known.items()}.items():
        if isinstance(key.default, bool):
            group.add_argument(f"--{name}", action="store_true")
        else:
            group.add_argument(f"--{name}", type=str if isinstance(key.default, str) else float, default=None)
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
