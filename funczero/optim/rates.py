"""Learning rate, weight decay and betas as leaves of the state, read from it at every update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import dtype_name, kind, number
from funczero.core.optimizer import Group, Reading
from funczero.layout.slots import Slots
from funczero.optim.by_leaf import Leaves, form_of, parts_of, reported, values_of
from funczero.optim.rate import checked, is_plain, is_rules, value_at

BY_LEAF = ("lr", "weight_decay")  # what may go by rule or tree
BELOW = {"b1": 1.0, "b2": 1.0, "momentum": 1.0}


class Rates:
    """The rates of one optimizer: checked when it is built, fitted to the paths at init, read from the state at every
    update.

    Law: a number lives in the state, where an edit counts from the next update on; a schedule overwrites its leaf at
    every applied update.
    """

    def __init__(self, who: str, **given: Any) -> None:
        """who: the optimizer, as errors name it; given: rates by name, of which lr and weight_decay may go by rule
        or tree.
        """
        self.who = who
        self.given: dict[str, Any] = {
            what: checked(who, what, r) if what in BY_LEAF else r for what, r in given.items()
        }
        # one a leaf of the state, in its order
        self.spots = [(what, r) for what, rate in self.given.items() for r in parts_of(rate)]
        self.moves = any(callable(r) for _, r in self.spots)
        self.forms = {what: form_of(rate) for what, rate in self.given.items()}
        self.simple = all(form is None for form in self.forms.values())  # one leaf a rate
        self.below = [BELOW.get(what, math.inf) for what, _ in self.spots]
        self.shown = reported(self.given["lr"])
        self.twins: list[tuple[int, int, str, list[str]]] = []  # spots of a tree that speak of one tied leaf
        # where rates were fitted last, and leaves by spots
        self.last: tuple[Any, list[tuple[tuple[int, ...], tuple[int, ...]]]] | None = None

    def init(self, params: Any) -> dict[str, Any]:
        """The rates as leaves of the state: 0-d float64 on the CPU; nan where a schedule has not written yet.

        A number or a schedule is one leaf, rules are a dict by regex, a tree is the tree.

        Raises:
          ValueError, TypeError: a leaf without a rate, a rule without a leaf or without effect, a tree of another form.
        """
        self._fit(params)
        return self._like([torch.tensor(math.nan if callable(r) else r, dtype=torch.float64) for _, r in self.spots])

    def reads(self, count: Callable[[Any], Tensor] = lambda state: state.count) -> Callable[..., Reading]:
        """`read` of a formula, whose state keeps these rates in its field `rates`."""
        return lambda state, params, ok, donate: self.read(count(state), state.rates, params, ok, donate)

    def read(self, count: Tensor, kept: Any, params: Any, ok: Tensor, donate: bool) -> Reading:
        """What every leaf is moved by in this update, and the state's rates after it.

        Raises:
          TypeError, ValueError: a leaf of the state or a schedule's value is no such number; nothing is written yet.
        """
        held, seen = self._held(kept), dict[tuple[str, int], Any]()
        now: list[Any] = []
        for (what, rate), below, x in zip(self.spots, self.below, held, strict=True):
            if not callable(rate):
                now.append(self._number(what, x, below))
            elif (what, id(rate)) in seen:
                now.append(seen[what, id(rate)])
            else:
                now.append(seen.setdefault((what, id(rate)), value_at(self.who, what, rate, count, below)))
        if self.simple:
            groups = [Group(dict(zip(self.given, now, strict=True)))]
        else:
            self._alike(now)
            groups = [
                Group({what: now[k] for what, k in zip(self.given, spots, strict=True)}, leaves)
                for spots, leaves in self._grouped(params, now)
            ]
        news, lr = self._after(kept, held, now, ok, donate)
        return Reading(groups, news, lr)

    def smooth(self, state: Any, params: Any, ok: Tensor) -> Reading:
        """As `reads`, for formulas that are differentiated by the rates: every rate is the state's own tensor, or what
        its schedule gives.
        """
        held, count, seen = self._held(state.rates), state.count.detach().double(), dict[int, Tensor]()
        for _, rate in self.spots:
            if callable(rate) and id(rate) not in seen:
                seen[id(rate)] = torch.as_tensor(rate(count), dtype=torch.float64).reshape(())
        now = [seen[id(rate)] if callable(rate) else x for (_, rate), x in zip(self.spots, held, strict=True)]
        groups = [
            Group({what: now[k] for what, k in zip(self.given, spots, strict=True)}, leaves)
            for spots, leaves in self._fit(params)
        ]
        if self.simple:
            groups = [Group(dict(zip(self.given, now, strict=True)))]
        news = [torch.where(ok, y, x) if callable(r) else x for (_, r), x, y in zip(self.spots, held, now, strict=True)]
        lr = torch.full_like(now[0], math.nan) if self.shown is None else now[self.shown]
        return Reading(groups, self._like(news), lr)

    def _held(self, kept: Any) -> list[Any]:
        """The state's leaves in the order of the spots."""
        try:
            if self.simple:
                return [kept[what] for what in self.given]
            return [x for what, form in self.forms.items() for x in values_of(form, kept[what])]
        except (KeyError, TypeError, ValueError) as e:
            raise TypeError(
                f"{self.who}: the rates of its state have another form than it was built with ({e!r}); begin with"
                " step.init, and edit values alone"
            ) from None

    def _number(self, what: str, x: Any, below: float) -> float:
        """A number that the state keeps, whoever wrote it."""
        if isinstance(x, Tensor) and x.dtype is torch.float64 and not x.dim():
            value = x.item()
            return value if 0 <= value < below else number(f"{self.who}: in its state", what, value, high=below)
        have = kind(x)
        if isinstance(x, Tensor):
            have = f"a {dtype_name(x.dtype)} tensor of shape {tuple(x.shape)}"
        raise TypeError(
            f"{self.who}: rates[{what!r}] of its state is {have}; write it in place, as rates[{what!r}].fill_(x),"
            " or as a 0-d float64 tensor"
        )

    def _alike(self, now: list[Any]) -> None:
        """Refuse a tree that was edited at one of a tied leaf's paths."""
        for a, b, who, names in self.twins:
            if now[a] is not now[b] and now[a] != now[b]:
                raise ValueError(
                    f"{who}: in its state the tree says two things of one tied parameter, {' = '.join(names)}; write"
                    " the same at all its paths"
                )

    def _grouped(self, params: Any, now: list[Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(spots, leaves) for all leaves that the same values move."""
        found: dict[Any, tuple[tuple[int, ...], list[int]]] = {}
        for spots, leaves in self._fit(params):
            key = tuple(id(now[k]) if isinstance(now[k], Tensor) else now[k] for k in spots)
            found.setdefault(key, (spots, []))[1].extend(leaves)
        return [(spots, tuple(leaves)) for spots, leaves in found.values()] or [((0,) * len(self.given), ())]

    def _fit(self, params: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(spots, leaves) for all leaves that the same spots move; leaves by number, or by position in an ordinary
        tree.
        """
        where = params.where if isinstance(params, Slots) else None
        if where is not None and self.last is not None and self.last[0] is where:
            return self.last[1]
        leaves, first, columns, twins = Leaves(params), 0, [], []
        for what, rate in self.given.items():
            who = f"{self.who}: {what}"
            columns.append([first + k for k in leaves.spots(who, rate)])
            if not is_plain(rate) and not is_rules(rate):
                twins += [
                    (columns[-1][place], first + k, who, leaves.names[place])
                    for k, place in enumerate(leaves.places)
                    if leaves.names[place] and columns[-1][place] != first + k
                ]
            first += len(parts_of(rate))
        found: dict[tuple[int, ...], list[int]] = {}
        for i, place in leaves.moved():
            found.setdefault(tuple(column[place] for column in columns), []).append(i)
        fitted = [(spots, tuple(members)) for spots, members in found.items()]
        self.last, self.twins = (where, fitted), twins
        return fitted

    def _after(self, kept: Any, held: list[Tensor], now: list[Any], ok: Tensor, donate: bool) -> tuple[Any, Tensor]:
        """The state's rates after this update, and the rate for the metrics: the number, or the rules' default; nan
        for a tree.
        """
        lr = math.nan if self.shown is None else now[self.shown]
        if ok.device.type != "cpu":  # without waiting for the device
            news = [
                torch.where(ok, y, x.to(ok.device)) if callable(r) else x if donate else x.clone()
                for (_, r), x, y in zip(self.spots, held, now, strict=True)
            ]
            return self._like(news), torch.as_tensor(lr, dtype=torch.float64, device=ok.device)
        if donate and not self.moves:
            return kept, torch.tensor(lr, dtype=torch.float64)
        applied = self.moves and bool(ok)
        values = [
            y if applied or not callable(r) else x.item() for (_, r), x, y in zip(self.spots, held, now, strict=True)
        ]
        *news, shown = torch.tensor([*values, lr], dtype=torch.float64).unbind()
        return self._like(news), shown

    def _like(self, flat: Sequence[Any]) -> dict[str, Any]:
        """Values of the spots in the form of the state."""
        if self.simple:
            return dict(zip(self.given, flat, strict=True))
        left, out = iter(flat), {}
        for what, form in self.forms.items():
            if isinstance(form, tuple):
                out[what] = {regex: next(left) for regex in form}
            else:
                values = [next(left) for _ in range(1 if form is None else form.num_leaves)]
                out[what] = values[0] if form is None else tree.unflatten(values, form)
        return out
