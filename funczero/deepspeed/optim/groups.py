"""Param groups as leaves of the state: what the optimizer's face shows, a hand may edit, and the schedule writes after every applied update."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funczero.core.transform import refuse, slot_name
from funczero.core.types import Grad, GradientTransformation, Transform, Updated
from funczero.deepspeed.config.build import Rates, make_optimizer, rates_of
from funczero.deepspeed.config.key import ConfigError
from funczero.deepspeed.config.resolved import Config, Value
from funczero.transforms.mean import value
from funczero.transforms.update import apply_update

KEY = "param_groups"
Group = dict[str, Any]  # name -> number or tuple of numbers
Make = Callable[[list[Group]], GradientTransformation]
LR = "optimizer.params.lr"


def grouped(name: str, make: Make, groups: Sequence[Group], rates: Sequence[Rates] = ()) -> Transform:
    """The last optimizer of a chain, with the numbers of its groups as leaves of the state, under "param_groups".

    Law: with groups that nobody edits it gives the bits of `make`'s optimizer with the same rates. An edit holds until the schedule's
    next write, which follows an applied update.

    Args:
      name: the optimizer's.
      make: the optimizer of one update, from the numbers of every group.
      groups: at the start; each has "lr".
      rates: by group, where a schedule writes lr (and beta 1).
    """

    def transform(g: Grad) -> Grad:
        g = value(g, name)
        base, key = apply_update(g, make(list(groups))), slot_name(g, KEY)
        if not groups:
            raise refuse(g, name, "it has no group of parameters; give at least one parameter that requires a gradient")

        def init(params: Any) -> dict[str, Any]:
            zero = torch.zeros((), dtype=torch.int64)
            return {**base.init(params), key: scheduled({"updates": zero, **leaves(groups)}, rates, zero)}

        def apply(views: Any, state: dict[str, Any], batch: Any, seed: Any) -> tuple[Any, dict[str, Any]]:
            out, state = g.apply(views, state, batch, seed)
            if out is None:
                return None, state
            own = state[key]
            now = apply_update(g._replace(apply=lambda *_: (out, state)), make(numbers(own)))
            out, state = now.apply(views, state, batch, seed)
            assert isinstance(out, Updated)
            if bool(out.ok):
                own = scheduled({**own, "updates": own["updates"] + 1}, rates, own["updates"] + 1)
            return out, {**state, key: own}

        return base._replace(init=init, apply=apply)

    transform.__name__ = name
    return transform


def leaves(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Groups as tensors: name -> float64 [groups] or [groups, n]."""
    return {name: torch.tensor([g[name] for g in groups], dtype=torch.float64) for name in groups[0]}


def numbers(own: Mapping[str, Tensor]) -> list[Group]:
    """Groups as plain numbers."""
    columns = {name: [tuple(x) if isinstance(x, list) else x for x in t.tolist()] for name, t in own.items() if name != "updates"}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def scheduled(own: dict[str, Tensor], rates: Sequence[Rates], updates: Tensor) -> dict[str, Tensor]:
    """What a schedule writes after so many applied updates."""
    if not rates:
        return own
    out = {**own, "lr": torch.stack([_at(r.lr, updates) for r in rates])}
    if rates[0].momentum is not None and "betas" in own:
        out["betas"] = own["betas"].clone()
        for row, r in zip(out["betas"], rates, strict=True):
            row[0] = _at(r.momentum, updates)
    return out


def _at(rate: Any, updates: Tensor) -> Tensor:
    return torch.as_tensor(rate(updates) if callable(rate) else rate, dtype=torch.float64)


def group_rates(config: Config, groups: Sequence[Group]) -> list[Rates]:
    """The config's schedule for every group, from the group's own rate; none without a scheduler."""
    if config.value("scheduler.type") is None:
        return []
    return [rates_of(config._replace(values={**config.values, LR: Value(g["lr"], "group")})) for g in groups]


def config_groups(config: Config, given: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The config's numbers for every group of the call, which may say lr, weight_decay and betas itself."""
    p, kind = config.block("optimizer.params"), config.value("optimizer.type")
    shown = {n: p[n] for n in ("lr", "betas", "weight_decay") if n in p}
    if "lr" not in shown:
        raise ConfigError(f"{config.name}: optimizer.params.lr is missing; add it")
    shown = {n: tuple(map(float, x)) if n == "betas" else float(x) for n, x in shown.items()}
    if rates_of(config).momentum is not None and "betas" in shown:
        shown["betas"] = (shown["betas"][0], 0.99)  # OneCycle forces the second beta
    out: list[Group] = []
    for i, g in enumerate(given):
        odd = next((n for n in g if n not in ("params", "name", "param_names", *shown)), None)
        if odd is not None:
            raise ConfigError(f"model_parameters: group {i} has {odd!r}, which {kind} does not take by group; write some of {', '.join(shown)}")
        out.append({n: tuple(map(float, g.get(n, x))) if n == "betas" else float(g.get(n, x)) for n, x in shown.items()})
    if len({g.get("betas") for g in out}) > 1:
        raise ConfigError("model_parameters: the groups have different betas, which the config's optimizer keeps for all; give optimizer=torch.optim.AdamW(groups)")
    return out


def config_optimizer(config: Config, home: Mapping[str, int]) -> Make:
    """`make` for the config's optimizer.

    Args:
      home: parameter name -> number of its group.
    """
    kind, fixed = config.value("optimizer.type"), config.block("optimizer.params")

    def make(groups: list[Group]) -> GradientTransformation:
        first = groups[0]
        if len({g.get("betas") for g in groups}) > 1:
            raise ValueError("param_groups: the groups have different betas, but this optimizer keeps one pair for all; write the same in each")
        by: dict[str, Any] = {n: first[n] if len({g[n] for g in groups}) == 1 else {path: groups[i][n] for path, i in home.items()} for n in ("lr", "weight_decay") if n in first}
        return make_optimizer(kind, {**fixed, **by, **({"betas": first["betas"]} if "betas" in first else {})}, by["lr"], None)

    return make
