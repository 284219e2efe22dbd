"""Param groups as leaves of the state, which a hand may edit and the schedule writes after every applied update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero import optim
from funczero.core.number import number
from funczero.core.optimizer import GradientTransformation, Group, Reading
from funczero.core.transform import refuse, slot_name
from funczero.core.types import Grad, Transform, Updated
from funczero.deepspeed.config.key import ConfigError
from funczero.deepspeed.config.optimizers import GroupRates, make_optimizer, rates_of
from funczero.deepspeed.config.resolved import Config, Setting
from funczero.layout.slots import Slots
from funczero.transforms.mean import value
from funczero.transforms.update import apply_update

KEY = "param_groups"
STILL = {"lr": 0.0, "weight_decay": 0.0, "momentum": 0.0}
LR = "optimizer.params.lr"
Numbers = dict[str, Any]  # a group: name -> number or tuple of numbers


class ByGroup(NamedTuple):
    """An optimizer whose rates are the numbers of groups."""

    tx: GradientTransformation
    read: Callable[
        [list[Numbers], Slots], Reading
    ]  # the rows as they are now, the parameters -> the rates of this update


def grouped(name: str, optimizer: ByGroup, groups: Sequence[Numbers], rates: Sequence[GroupRates] = ()) -> Transform:
    """The last optimizer of a chain, with the numbers of its groups as leaves of the state, under "param_groups".

    Law: with groups that nobody edits it gives the bits of the same optimizer with the same rates. An edit holds until
    the schedule's next write, which follows an applied update.

    Args:
      name: the optimizer's.
      optimizer: moves every leaf by its group's numbers.
      groups: at the start; each has "lr".
      rates: by group, where a schedule writes lr (and beta 1).
    """

    def transform(g: Grad) -> Grad:
        g = value(g, name)
        key = slot_name(g, KEY)
        base = apply_update(g, optimizer.tx, lambda state, params: optimizer.read(numbers(state[key]), params))
        if not groups:
            raise refuse(g, name, "it has no group of parameters; give at least one parameter that requires a gradient")

        def init(params: Any) -> dict[str, Any]:
            zero = torch.zeros((), dtype=torch.int64)
            return {**base.init(params), key: scheduled({"updates": zero, **leaves(groups)}, rates, zero)}

        def apply(views: Any, state: dict[str, Any], batch: Any, seed: Any) -> tuple[Any, dict[str, Any]]:
            out, state = base.apply(views, state, batch, seed)
            if not isinstance(out, Updated) or not bool(out.ok):
                return out, state
            own = state[key]
            return out, {**state, key: scheduled({**own, "updates": own["updates"] + 1}, rates, own["updates"] + 1)}

        return base._replace(init=init, apply=apply)

    transform.__name__ = name
    return transform


def leaves(groups: Sequence[Numbers]) -> dict[str, Tensor]:
    """Groups as tensors: name -> float64 [groups] or [groups, n]."""
    return {name: torch.tensor([g[name] for g in groups], dtype=torch.float64) for name in groups[0]}


def numbers(own: Mapping[str, Tensor]) -> list[Numbers]:
    """Groups as plain numbers."""
    columns = {
        name: [tuple(x) if isinstance(x, list) else x for x in t.tolist()]
        for name, t in own.items()
        if name != "updates"
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def scheduled(own: dict[str, Tensor], rates: Sequence[GroupRates], updates: Tensor) -> dict[str, Tensor]:
    """What a schedule writes after so many applied updates."""
    if not rates:
        return own
    out = {**own, "lr": torch.stack([_at(r.lr, updates) for r in rates])}
    if rates[0].momentum is not None and "betas" in own:
        out["betas"] = own["betas"].clone()
        for row, r in zip(out["betas"], rates, strict=True):
            row[0], row[1] = _at(r.momentum, updates), 0.99  # OneCycle forces the second beta
    return out


def _at(rate: Any, updates: Tensor) -> Tensor:
    return torch.as_tensor(rate(updates) if callable(rate) else rate, dtype=torch.float64)


def group_rates(config: Config, groups: Sequence[Numbers]) -> list[GroupRates]:
    """The config's schedule for every group, from the group's own rate; none without a scheduler."""
    if config.value("scheduler.type") is None:
        return []
    with_lr = lambda g: config._replace(values={**config.values, LR: Setting(g["lr"], "group")})
    return [rates_of(with_lr(g), group=i, groups=len(groups)) for i, g in enumerate(groups)]


def config_groups(config: Config, given: Sequence[Mapping[str, Any]]) -> list[Numbers]:
    """The config's numbers for every group of the call, which may say lr, weight_decay and betas itself."""
    p, kind = config.block("optimizer.params"), config.value("optimizer.type")
    if kind.lower() == "muon":
        why = "it is Muon for matrices and AdamW for the rest, and an engine keeps the rates of one optimizer"
        raise ConfigError(
            f"{config.where('optimizer.type')}{why}; write a chain of it with fz.from_deepspeed(config, loss_fn), or"
            " AdamW"
        )
    shown = {n: p[n] for n in ("lr", "betas", "weight_decay") if n in p}
    if "lr" not in shown:
        raise ConfigError(f"{config.name}: optimizer.params.lr is missing; add it")
    shown = {n: tuple(map(float, x)) if n == "betas" else float(x) for n, x in shown.items()}
    if rates_of(config, groups=len(given)).momentum is not None and "betas" in shown:
        shown["betas"] = (shown["betas"][0], 0.99)  # OneCycle forces the second beta
    out: list[Numbers] = []
    for i, g in enumerate(given):
        odd = next((n for n in g if n not in ("params", "name", "param_names", *shown)), None)
        if odd is not None:
            raise ConfigError(
                f"model_parameters: group {i} has {odd!r}, which {kind} does not take by group; "
                f"write some of {', '.join(shown)}"
            )
        out.append(
            {n: tuple(map(float, g.get(n, x))) if n == "betas" else float(g.get(n, x)) for n, x in shown.items()}
        )
    if len({g.get("betas") for g in out}) > 1:
        raise ConfigError(
            "model_parameters: the groups have different betas, which the config's optimizer keeps for all; "
            "give optimizer=torch.optim.AdamW(groups)"
        )
    return out


def config_optimizer(config: Config, home: Mapping[str, int]) -> ByGroup:
    """The config's optimizer by groups.

    Args:
      home: parameter name -> number of its group.
    """
    kind, fixed = config.value("optimizer.type"), config.block("optimizer.params")
    tx = make_optimizer(kind, fixed, 0.0, None)
    assert isinstance(tx, GradientTransformation)
    ours = kind.lower() in ("adam", "adamw", "lion", "adagrad", "lamb", "sgd")
    constant = {"momentum": fixed["momentum"]} if kind == "SGD" else {}

    def read(rows: list[Numbers], params: Slots) -> Reading:
        if len({row.get("betas") for row in rows}) > 1:
            raise ValueError(
                "param_groups: the groups have different betas, but this optimizer keeps one pair for all; "
                "write the same in each"
            )
        alike = len({row["lr"] for row in rows}) == 1
        if not alike and not ours:
            raise TypeError(
                "from_torch: lr differs by group, but these classes keep one number for all leaves; "
                "write the same in each"
            )
        members, found = by_group(params, home), dict[tuple[Any, ...], Group]()
        for i, row in enumerate(rows):
            rates = {**constant, **_checked(tx.name if alike else f"{tx.name}: param_groups[{i}]", row)}
            same = found.setdefault(tuple(rates.values()), Group(rates, ()))
            found[tuple(rates.values())] = Group(rates, (*(same.leaves or ()), *members.get(i, ())))
        groups = list(found.values()) if len(found) > 1 else [Group(g.rates) for g in found.values()]
        return Reading(groups, None, torch.tensor(rows[0]["lr"] if alike else math.nan, dtype=torch.float64))

    return ByGroup(tx, read)


def still() -> ByGroup:
    """The optimizer of an engine that only evaluates: nothing moves."""

    def read(rows: list[Numbers], params: Slots) -> Reading:
        return Reading([Group(STILL)], None, torch.zeros((), dtype=torch.float64))

    return ByGroup(optim.sgd(0.0), read)


def _checked(who: str, row: Numbers) -> dict[str, float]:
    """A group's numbers under the names of the formula."""
    rates = {n: number(who, n, row[n]) for n in ("lr", "weight_decay") if n in row}
    return rates | {f"b{i + 1}": number(who, f"b{i + 1}", b, high=1.0) for i, b in enumerate(row.get("betas", ()))}


def by_group(params: Slots, home: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """Numbers of the trained leaves by group."""
    where = params.where
    if KEY not in where.memo:
        found: dict[int, list[int]] = {}
        for i, leaf in enumerate(where.structure.leaves):
            if not where.structure.frozen(i):
                found.setdefault(home[leaf.path], []).append(i)
        where.memo[KEY] = {group: tuple(members) for group, members in found.items()}
    return where.memo[KEY]
