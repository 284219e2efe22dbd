"""DeepSpeed's five schedules as schedulers of any torch optimizer, with the values of funczero.schedules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funczero.deepspeed.config.optimizers import GroupRates, of_group, schedule_of
from funczero.deepspeed.config.options import SCHEDULERS


class Schedule:
    """One of DeepSpeed's schedules over an optimizer's groups; `step()` after every update.

    Law: the values of DeepSpeed's class at every step. A rate that is a tensor is written in place.

    Args:
      optimizer: one of torch.optim, or what has one as `.optimizer`.
      last_batch_iteration: the steps that were taken before, less one; only a fresh schedule writes at once.
      options: the type's parameters; learning rates and momenta may be lists, one number a group.

    Raises:
      TypeError: a parameter that the type does not have, or one that is missing.
      ValueError: a list of another length than the groups, or a number that cannot stand.

    Source: DeepSpeed 0.19.8, runtime/lr_schedules.py.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> schedule = WarmupLR(optimizer, warmup_num_steps=4, warmup_type="linear")
    >>> for _ in range(3): schedule.step()
    >>> schedule.get_lr()
    [0.05]
    """

    def __init__(self, optimizer: Any, last_batch_iteration: int = -1, **options: Any) -> None:
        kind = next(c.__name__ for c in type(self).__mro__ if c.__name__ in SCHEDULERS)
        known = SCHEDULERS[kind]
        odd = next((n for n in options if n not in known), None)
        if odd is not None:
            raise TypeError(f"{kind}: it takes no {odd!r}; write some of {', '.join(known)}")
        missing = next((n for n, k in known.items() if k.default is ... and n not in options), None)
        if missing is not None:
            raise TypeError(f"{kind}: {missing!r} is missing; add it")
        self.optimizer, self.last_batch_iteration = _torchs(kind, optimizer), last_batch_iteration
        groups = self.optimizer.param_groups
        options = {n: options.get(n, k.default) for n, k in known.items()}
        self.options = [of_group(kind, options, i, len(groups)) for i in range(len(groups))]
        self.base_lrs = [float(g.get("initial_lr", g["lr"])) for g in groups]
        self._rates = [schedule_of(kind, p, lr) for p, lr in zip(self.options, self.base_lrs, strict=True)]
        self._last_lr = [float(g["lr"]) for g in groups]
        if last_batch_iteration == -1:
            self._write()

    def _write(self) -> None:
        self._last_lr = self.get_lr()
        updates = torch.tensor(self.last_batch_iteration + 1)
        for g, lr, r in zip(self.optimizer.param_groups, self._last_lr, self._rates, strict=True):
            if isinstance(g["lr"], Tensor):
                g["lr"].fill_(lr)
            else:
                g["lr"] = lr
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
        updates = torch.tensor(self.last_batch_iteration + 1)
        return [_at(r, updates) for r in self._rates]

    def get_last_lr(self) -> list[float]:
        """By group, what was written last."""
        return self._last_lr

    def state_dict(self) -> dict[str, Any]:
        """Its position."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position; the next step writes."""
        self.last_batch_iteration = state_dict["last_batch_iteration"]


def _at(rates: GroupRates, updates: Tensor) -> float:
    return float(rates.lr(updates))  # type: ignore[operator,misc]


def _torchs(kind: str, optimizer: Any) -> Any:
    for o in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(o, torch.optim.Optimizer):
            return o
    raise TypeError(f"{kind}: a {type(optimizer).__name__} is no torch optimizer; give one of torch.optim")


class WarmupLR(Schedule):
    """fz.schedules.warmup_lr."""

    @property
    def min_lrs(self) -> list[float]:
        """By group, before the warmup."""
        return [p["warmup_min_lr"] for p in self.options]

    @property
    def max_lrs(self) -> list[float]:
        """By group, after it; the group's own where none is named."""
        given = [p["warmup_max_lr"] for p in self.options]
        return [lr if x is None else x for x, lr in zip(given, self.base_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """fz.schedules.warmup_decay_lr."""


class WarmupCosineLR(Schedule):
    """fz.schedules.warmup_cosine_lr."""

    def get_lr_ratio(self) -> float:
        """What multiplies every group's own rate in the next update."""
        return _at(schedule_of("WarmupCosineLR", self.options[0], 1.0), torch.tensor(self.last_batch_iteration + 1))


class OneCycle(Schedule):
    """fz.schedules.one_cycle."""

    @property
    def min_lrs(self) -> list[float]:
        """By group, at the cycle's ends."""
        return [p["cycle_min_lr"] for p in self.options]

    @property
    def max_lrs(self) -> list[float]:
        """By group, at its top."""
        return [p["cycle_max_lr"] for p in self.options]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """By group, the betas; None where they stand still.

        Before the first step it is cycle_max_mom, although the first update runs at cycle_min_mom.
        """
        cycles = "betas" in self.optimizer.param_groups[0] and self.options[0]["cycle_momentum"]
        return _betas(self._rates, self.options, self.last_batch_iteration) if cycles else None


def _betas(rates: list[GroupRates], options: list[dict[str, Any]], i: int) -> list[tuple[float, float]]:
    if i == -1:
        return [(p["cycle_max_mom"], 0.99) for p in options]
    return [(float(r.momentum(torch.tensor(i + 1))), 0.99) for r in rates if r.momentum is not None]


class LRRangeTest(Schedule):
    """fz.schedules.lr_range_test."""


class FromConfig(Schedule):
    """The config's scheduler: it writes inside the chain after every applied update, so there is nothing to step."""

    def __init__(self, optimizer: Any, rates: list[GroupRates], options: list[dict[str, Any]]) -> None:
        """Use from_config.

        Args:
          optimizer: the engine's.
          rates, options: by group.
        """
        self.optimizer, self._rates, self.options = optimizer, rates, options
        self.base_lrs = [float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups]

    @property
    def last_batch_iteration(self) -> int:  # type: ignore[override]
        """Applied updates, less one."""
        return int(self.optimizer.engine.state.updates) - 1

    def step(self, *args: Any) -> None:
        """Nothing: engine.step() moves it."""

    def get_lr(self) -> list[float]:
        """By group, of the next update."""
        return [float(g["lr"]) for g in self.optimizer.param_groups]

    get_last_lr = get_lr

    def load_state_dict(self, state_dict: Any) -> None:
        """Nothing: engine.load_checkpoint brings it."""


def from_config(optimizer: Any, kind: str, rates: list[GroupRates], options: list[dict[str, Any]]) -> FromConfig:
    """The config's scheduler, which is an instance of DeepSpeed's class of its type, where it is one of those five."""
    own = {c.__name__: c for c in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)}.get(kind)
    cls = FromConfig if own is None else type(kind, (FromConfig, own), {})
    return cls(optimizer, rates, options)
