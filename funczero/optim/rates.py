"""Learning rate and weight decay: a number, a schedule of applied updates, rules by path, or a tree."""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import kind, number, shown
from funczero.core.types import Grad
from funczero.layout.slots import Slots

Rate = float | Callable[[Tensor], Tensor] | Sequence[tuple[str, Any]] | Any
Beta = float | Callable[[Tensor], Tensor]  # one for all leaves
COUNTED = 2**24  # applied updates that a float32 count tells apart
FORMS = "write a number, a schedule of applied updates, rules [(regex, rate), ...] or a tree of rates like the parameters"


class Count(Tensor):
    """A 0-d int64 count whose arithmetic goes on in float64, where plain torch would round to float32.

    >>> (torch.tensor(1).as_subclass(Count) * 0.1).item(), (torch.tensor(1) * 0.1).item()
    (0.1, 0.10000000149011612)
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Whole numbers stay counts; what would become the default dtype is computed from float64."""
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            if not isinstance(out, Tensor):
                return out
            if out.dtype == torch.int64 and not out.dim():
                return out.as_subclass(cls)
            if out.dtype == torch.get_default_dtype():
                args, kwargs = tree.map(lambda x: x.as_subclass(Tensor).double() if isinstance(x, Count) else x, (args, kwargs or {}))
                out = func(*args, **kwargs)
            return out.as_subclass(Tensor)


class Rates:
    """The rates of one optimizer: checked when it is built, fitted to the paths at init, read once an update."""

    def __init__(self, who: str, lr: Rate, weight_decay: Rate) -> None:
        """who: the optimizer, as errors name it."""
        self.who = who
        self.last: tuple[Any, list[tuple[Any, Any, list[int]]]] | None = None  # where rates were fitted last, and the leaves by pair
        self.given: dict[str, Any] = {"lr": checked(who, "lr", lr), "weight_decay": checked(who, "weight_decay", weight_decay)}

    def fit(self, params: Any) -> list[tuple[Any, Any]]:
        """(lr, weight decay) of every leaf, each a number or a schedule.

        Raises:
          ValueError, TypeError: a leaf without a rate, a rule without a leaf or without effect, a tree of another form.
        """
        leaves = _Leaves(params)
        return list(zip(*(leaves.rates(f"{self.who}: {what}", rate) for what, rate in self.given.items()), strict=True))

    def groups(self, updates: Tensor, params: Slots, grads: Slots, *moments: Slots) -> tuple[list[tuple[Any, Any, list[list[Tensor]]]], Tensor]:
        """[(lr, decay, [params, grads, *moments])] for every pair of rates, and the rate for the metrics.

        Whole buffers where all leaves share one pair, else padded slots. Every rate is read before anything is written.
        """
        trees, now = (params, grads, *moments), self._reader(updates)
        lr, decay = self.given.values()
        if _plain(lr) and _plain(decay):
            kept = [u for u, g in enumerate(grads.buffers) if g.numel()]
            return [(now("lr", lr), now("weight_decay", decay), [[t.buffers[u] for u in kept] for t in trees])], self._metric(now, updates)
        where = params.where

        def slot(t: Slots, i: int) -> Tensor:
            return t.buffers[where.structure.leaves[i].unit][where.slots[i].offset :][: where.slots[i].length]

        rated = [(now("lr", a), now("weight_decay", d), members) for a, d, members in self._pairs(params)]
        return [(a, d, [[slot(t, i) for i in members] for t in trees]) for a, d, members in rated], self._metric(now, updates)

    def _pairs(self, params: Slots) -> list[tuple[Any, Any, list[int]]]:
        """(lr, decay, leaves) for every pair of rates."""
        last, where = self.last, params.where
        if last is not None and last[0] is where:
            return last[1]
        found: dict[Any, tuple[Any, Any, list[int]]] = {}
        for i, (a, d) in enumerate(self.fit(params)):
            if not where.structure.frozen(i) and where.slots[i].length:
                found.setdefault((id(a) if callable(a) else a, id(d) if callable(d) else d), (a, d, []))[2].append(i)
        self.last = (where, list(found.values()))
        return self.last[1]

    def trees(self, updates: Tensor, params: Any) -> tuple[Any, Any]:
        """Trees of lr and of weight decay for the plain form, whose parameters are an ordinary tree."""
        now, leaves = self._reader(updates), _Leaves(params)
        lr, decay = ([now(what, r) for r in leaves.rates(f"{self.who}: {what}", rate)] for what, rate in self.given.items())
        return tree.unflatten([lr[i] for i in leaves.places], leaves.treedef), tree.unflatten([decay[i] for i in leaves.places], leaves.treedef)

    def _reader(self, updates: Tensor) -> Callable[[str, Any], Any]:
        seen: dict[tuple[str, int], Any] = {}

        def now(what: str, rate: Any) -> Any:
            if not callable(rate):
                return rate
            if (what, id(rate)) not in seen:
                seen[what, id(rate)] = at(self.who, what, rate, updates)
            return seen[what, id(rate)]

        return now

    def _metric(self, now: Callable[[str, Any], Any], updates: Tensor) -> Tensor:
        """The number, or the first rule's default; nan for a tree."""
        lr = self.given["lr"]
        if _is_rules(lr):
            lr = tree.rule(lr, "", lr[-1][1])
        return torch.as_tensor(now("lr", lr) if _plain(lr) else math.nan, dtype=torch.float64, device=updates.device)


def checked(who: str, what: str, rate: Any) -> Rate:
    """A rate as it is kept: numbers as floats, a schedule, rules as tuples, or the tree.

    Raises:
      TypeError, ValueError: a value in it is no number of at least 0 and no schedule; a regex is none.
    """
    if isinstance(rate, Grad):
        raise TypeError(f"{who}: it stands in a chain without its arguments; write fz.{who}(lr) there")
    if _is_rules(rate):
        for regex, _ in rate:
            try:
                re.compile(regex)
            except re.error as e:
                raise ValueError(f"{who}: the rule {regex!r} of {what} is no regex ({e}); write one that is found in the paths") from None
        return tuple((regex, _one(f"{who}: the rule {regex!r} of {what}", what, r)) for regex, r in rate)
    named = tree.paths(rate)
    if len(named) == 1 and named[0][1] is rate:
        if _plain(rate) or isinstance(rate, (str, Tensor, Real, type(None))):
            return _one(who, what, rate)
        hint = f"; {scheduler(rate)}" if scheduler(rate) else ""
        raise TypeError(f"{who}: {what}={shown(rate)} is {kind(rate)} and no rate; {FORMS}{hint}")
    if not named:
        raise TypeError(f"{who}: {what}={shown(rate)} holds no rate; {FORMS}")
    return tree.unflatten([_one(f"{who}: {what} at {path!r}", what, r) for path, r in named], tree.flatten(rate)[1])


def scheduler(x: Any) -> str | None:
    """What to write instead of a scheduler of torch."""
    if isinstance(x, torch.optim.lr_scheduler.LRScheduler):
        return f"a scheduler of torch moves an optimizer of its own: write fz.schedules.from_torch({type(x).__name__!r}, lr, ...)"
    return None


def one_for_all(who: str, what: str, beta: Any, moves: bool = True) -> Any:
    """A beta as it is kept: one number in [0, 1) for all leaves or, where it moves, one schedule.

    Raises:
      TypeError, ValueError: it is by rule or by tree, or no such number.
    """
    if callable(beta) and moves and not isinstance(beta, type):
        return beta
    if callable(beta) or isinstance(beta, (list, tuple, dict)):
        form = "one number in [0, 1) or one schedule" if moves else "one number in [0, 1)"
        raise TypeError(f"{who}: {what}={shown(beta)} is {kind(beta)}, but it is the same for all leaves here: write {form}; only lr and weight_decay go by rules or trees")
    return number(who, what, beta, high=1.0)


def at(who: str, what: str, rate: Any, updates: Tensor, high: float = math.inf) -> Any:
    """A rate's value after `updates` applied updates: a number on the CPU, where reading it costs nothing, else a float32 tensor.

    Raises:
      TypeError, ValueError: a schedule gives no number, or one that is negative, not finite or not below `high`.
      OverflowError: the count is at its end.
    """
    if not callable(rate):
        return rate
    value = rate(updates.long().as_subclass(Count))
    if isinstance(value, Tensor) and (value.numel() != 1 or value.dtype == torch.bool or value.is_complex()):
        raise TypeError(f"{who}: the schedule of {what} gives {shown(value)}; return one number of at least 0")
    if isinstance(value, Tensor) and value.device.type != "cpu":  # told by the device, without waiting for it
        now = value.detach().reshape(()).float()
        torch._assert_async((now >= 0) & (now < high), f"{who}: the schedule of {what} gives no finite number of at least 0")
        return now
    n = int(updates)
    if n >= COUNTED and updates.dtype == torch.float32:
        raise OverflowError(f"{who}: {n} applied updates are the end of a float32 count, and the schedule of {what} would stand still; begin a new state there")
    return number(f"{who}: after {n} applied updates the schedule's value", what, value.item() if isinstance(value, Tensor) else value, high=high)


def lasting(who: str, eps: float, params: Any) -> None:
    """Refuses an eps that is nothing in the dtype of the parameters, where 0 / 0 would follow."""
    leaf = next(iter(tree.tensors(params)), torch.zeros(()))
    if eps and not float(torch.tensor(eps, dtype=leaf.dtype)):
        name = str(leaf.dtype).removeprefix("torch.")
        raise ValueError(f"{who}: eps={eps:g} is 0 in {name}, the dtype of the masters; write a larger eps, or policy='params=float32,compute={name}'")


def _plain(rate: Any) -> bool:
    return isinstance(rate, (int, float)) and not isinstance(rate, bool) or callable(rate) and not isinstance(rate, type)


def _one(who: str, what: str, rate: Any) -> Any:
    return rate if callable(rate) and not isinstance(rate, type) else number(who, what, rate)


def _is_rules(rate: Any) -> bool:
    return isinstance(rate, (list, tuple)) and bool(rate) and all(isinstance(r, tuple) and len(r) == 2 and isinstance(r[0], str) for r in rate)


class _Leaves:
    """The leaves of Slots or of an ordinary tree with all their names; a tied leaf is one."""

    def __init__(self, params: Any) -> None:
        if isinstance(params, Slots):
            structure = params.where.structure
            self.places, self.treedef = structure.places, structure.treedef
        else:
            flat, self.treedef = tree.flatten(params)
            found: dict[int, int] = {}
            self.places = tuple(found.setdefault(id(x), len(found)) for x in flat)
        self.names: list[list[str]] = [[] for _ in range(max(self.places, default=-1) + 1)]
        for place, (path, _) in zip(self.places, tree.paths(tree.unflatten(self.places, self.treedef)), strict=True):
            self.names[place].append(path)

    def rates(self, who: str, rate: Rate) -> list[Any]:
        """One number or schedule a leaf; the first rule that is found in any of its names counts."""
        if _plain(rate):
            return [rate] * len(self.names)
        return self._by_rule(who, rate) if _is_rules(rate) else self._by_tree(who, rate)

    def _by_rule(self, who: str, rules: Any) -> list[Any]:
        hits = [{i for i, names in enumerate(self.names) if any(re.search(regex, n) for n in names)} for regex, _ in rules]
        out: list[Any] = [next((r for (_, r), mine in zip(rules, hits, strict=True) if i in mine), None) for i in range(len(self.names))]
        for (regex, r), mine in zip(rules, hits, strict=True):
            if not mine:
                some = ", ".join(repr(n[0]) for n in self.names[:6])
                raise ValueError(f"{who}: the rule {regex!r} is found in no parameter's path; correct it or leave it out (paths are {some}, ...)")
            if len(mine) < len(self.names) and all(out[i] is not r and out[i] != r for i in mine):
                raise ValueError(f"{who}: the rule {regex!r} never counts, because a rule before it takes {self.names[min(mine)][0]!r} and all else that it matches; put it first")
        missing = next((n[0] for n, r in zip(self.names, out, strict=True) if r is None), None)
        if missing is not None:
            raise ValueError(f"{who}: no rule matches parameter {missing!r}; end the rules with ('', default)")
        return out

    def _by_tree(self, who: str, rate: Any) -> list[Any]:
        try:
            flat = self.treedef.flatten_up_to(rate)
        except ValueError as e:
            raise TypeError(f"{who}: {type(rate).__name__} is neither a number, a schedule, rules [(regex, value), ...] nor a tree like the parameters: {e}") from None
        out: list[Any] = [None] * len(self.names)
        for place, r in zip(self.places, flat, strict=True):
            if not _plain(r):
                raise TypeError(f"{who}: the value for parameter {self.names[place][0]!r} is {kind(r)}, neither a number nor a schedule")
            if out[place] is not None and out[place] is not r and out[place] != r:
                raise ValueError(f"{who}: the tree says two things of one tied parameter, {' = '.join(self.names[place])}; write the same at all its paths")
            out[place] = r
        return out
