"""Learning rate, weight decay and betas: a number, a schedule of applied updates, rules by path, or a tree; read
from leaves of the state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import kind, number, shown
from funczero.core.types import Grad, Group, Reading
from funczero.layout.slots import Slots
from funczero.transforms.partition import holds

Rate = float | Callable[[Tensor], Tensor] | Sequence[tuple[str, Any]] | Any
Beta = float | Callable[[Tensor], Tensor]  # one for all leaves
COUNTED = 2**24  # applied updates that a float32 count tells apart
BY_LEAF = ("lr", "weight_decay")  # what may go by rule or tree
BELOW = {"b1": 1.0, "b2": 1.0, "momentum": 1.0}
FORMS = (
    "write a number, a schedule of applied updates, rules [(regex, rate), ...] or a tree of rates like the parameters"
)


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
                args, kwargs = tree.map(
                    lambda x: x.as_subclass(Tensor).double() if isinstance(x, Count) else x, (args, kwargs or {})
                )
                out = func(*args, **kwargs)
            return out.as_subclass(Tensor)


class Scalars(NamedTuple):
    """What most formulas take beside the leaves."""

    ok: Tensor
    factor: Tensor  # to be multiplied into the gradient
    rates: dict[str, Any]

    def of(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The factor and zero, in the gradients' dtype."""
        factor = self.factor.to(grads[0].dtype) if grads else self.factor
        return factor, factor.new_zeros(())


def counted(state: Any, now: list[dict[str, Any]], factor: Tensor, ok: Tensor) -> tuple[Any, list[Scalars]]:
    """`scalars` of a formula that needs no more of its state than the number of applied updates."""
    return state._replace(count=state.count + ok), [Scalars(ok, factor, each) for each in now]


def zero(params: Any) -> Tensor:
    """The number of applied updates at the start, where the parameters lie."""
    leaf = next(iter(tree.tensors(params)), torch.zeros(()))
    return torch.zeros((), dtype=torch.float32, device=leaf.device)


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
        self.spots = [(what, r) for what, rate in self.given.items() for r in _parts(rate)]
        self.moves = any(callable(r) for _, r in self.spots)
        self.forms = {what: _form(rate) for what, rate in self.given.items()}
        self.simple = all(form is None for form in self.forms.values())  # one leaf a rate
        self.below = [BELOW.get(what, math.inf) for what, _ in self.spots]
        self.shown = _default(self.given["lr"])
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

    def read(self, count: Tensor, own: Any, params: Any, ok: Tensor, donate: bool) -> Reading:
        """What every leaf is moved by in this update, and the state's rates after it.

        Raises:
          TypeError, ValueError: a leaf of the state or a schedule's value is no such number; nothing is written yet.
        """
        held, seen = self._held(own), dict[tuple[str, int], Any]()
        now: list[Any] = []
        for (what, rate), below, x in zip(self.spots, self.below, held, strict=True):
            if not callable(rate):
                now.append(self._number(what, x, below))
            elif (what, id(rate)) in seen:
                now.append(seen[what, id(rate)])
            else:
                now.append(seen.setdefault((what, id(rate)), at(self.who, what, rate, count, below)))
        if self.simple:
            groups = [Group(dict(zip(self.given, now, strict=True)))]
        else:
            self._alike(now)
            groups = [
                Group({what: now[k] for what, k in zip(self.given, spots, strict=True)}, leaves)
                for spots, leaves in self._grouped(params, now)
            ]
        kept, lr = self._after(own, held, now, ok, donate)
        return Reading(groups, kept, lr)

    def _held(self, own: Any) -> list[Any]:
        """The state's leaves in the order of the spots."""
        try:
            if self.simple:
                return [own[what] for what in self.given]
            return [x for what, form in self.forms.items() for x in _values(form, own[what])]
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
            have = f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)}"
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
        leaves, first, columns, twins = _Leaves(params), 0, [], []
        for what, rate in self.given.items():
            who = f"{self.who}: {what}"
            columns.append([first + k for k in leaves.spots(who, rate)])
            if not _plain(rate) and not _is_rules(rate):
                twins += [
                    (columns[-1][place], first + k, who, leaves.names[place])
                    for k, place in enumerate(leaves.places)
                    if leaves.names[place] and columns[-1][place] != first + k
                ]
            first += len(_parts(rate))
        found: dict[tuple[int, ...], list[int]] = {}
        for i, place in leaves.moved():
            found.setdefault(tuple(column[place] for column in columns), []).append(i)
        fitted = [(spots, tuple(members)) for spots, members in found.items()]
        self.last, self.twins = (where, fitted), twins
        return fitted

    def _after(self, own: Any, held: list[Tensor], now: list[Any], ok: Tensor, donate: bool) -> tuple[Any, Tensor]:
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
            return own, torch.tensor(lr, dtype=torch.float64)
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


def _form(rate: Any) -> Any:
    """How a rate lies in the state: None for one leaf, the regexes of its rules, the form of its tree."""
    if _is_rules(rate):
        return tuple(dict(rate))
    return None if _plain(rate) else tree.flatten(rate)[1]


def _default(rate: Any) -> int | None:
    """Which part of a rate stands for it in the metrics: the number, or the rules' default; none of a tree."""
    if _is_rules(rate):
        regexes = list(dict(rate))
        return next((k for k, regex in enumerate(regexes) if re.search(regex, "")), regexes.index(rate[-1][0]))
    return 0 if _plain(rate) else None


def _parts(rate: Any) -> list[Any]:
    """The numbers and schedules of one rate; of equal regexes the first counts."""
    if _is_rules(rate):
        first: dict[str, Any] = {}
        for regex, r in rate:
            first.setdefault(regex, r)
        return list(first.values())
    return tree.leaves(rate)


def _values(form: Any, own: Any) -> list[Any]:
    """The state's leaves of one rate, in the order of its parts."""
    if isinstance(form, tuple):
        return [own[regex] for regex in form]
    return [own] if form is None else form.flatten_up_to(own)


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
                raise ValueError(
                    f"{who}: the rule {regex!r} of {what} is no regex ({e}); write one that is found in the paths"
                ) from None
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
        return (
            f"a scheduler of torch moves an optimizer of its own: write fz.schedules.from_torch({type(x).__name__!r},"
            " lr, ...)"
        )
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
        raise TypeError(
            f"{who}: {what}={shown(beta)} is {kind(beta)}, but it is the same for all leaves here: write {form}; only"
            " lr and weight_decay go by rules or trees"
        )
    return number(who, what, beta, high=1.0)


def at(who: str, what: str, rate: Any, updates: Tensor, high: float = math.inf) -> Any:
    """A rate's value after `updates` applied updates: a number on the CPU, where reading it costs nothing, else a
    float32 tensor.

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
        torch._assert_async(
            (now >= 0) & (now < high), f"{who}: the schedule of {what} gives no finite number of at least 0"
        )
        return now
    n = int(updates)
    if n >= COUNTED and updates.dtype == torch.float32:
        raise OverflowError(
            f"{who}: {n} applied updates are the end of a float32 count, and the schedule of {what} would stand still;"
            " begin a new state there"
        )
    return number(
        f"{who}: after {n} applied updates the schedule's value",
        what,
        value.item() if isinstance(value, Tensor) else value,
        high=high,
    )


def lasting(who: str, eps: float, params: Any) -> None:
    """Refuses an eps that is nothing in the dtype of the parameters, where 0 / 0 would follow."""
    leaf = next(iter(tree.tensors(params)), torch.zeros(()))
    if eps and not float(torch.tensor(eps, dtype=leaf.dtype)):
        name = str(leaf.dtype).removeprefix("torch.")
        raise ValueError(
            f"{who}: eps={eps:g} is 0 in {name}, the dtype of the masters; write a larger eps, or"
            f" policy='params=float32,compute={name}'"
        )


def _plain(rate: Any) -> bool:
    return (
        isinstance(rate, (int, float)) and not isinstance(rate, bool) or callable(rate) and not isinstance(rate, type)
    )


def _one(who: str, what: str, rate: Any) -> Any:
    return rate if callable(rate) and not isinstance(rate, type) else number(who, what, rate)


def _is_rules(rate: Any) -> bool:
    return (
        isinstance(rate, (list, tuple))
        and bool(rate)
        and all(isinstance(r, tuple) and len(r) == 2 and isinstance(r[0], str) for r in rate)
    )


class _Leaves:
    """The leaves of Slots or of an ordinary tree with all their names; a tied leaf is one, and one of another
    optimizer has no name.
    """

    def __init__(self, params: Any) -> None:
        self.structure = params.where.structure if isinstance(params, Slots) else None
        self.lengths = [slot.length for slot in params.where.slots] if isinstance(params, Slots) else []
        if self.structure is not None:
            self.places, self.treedef = self.structure.places, self.structure.treedef
        else:
            flat, self.treedef = tree.flatten(params)
            found: dict[int, int] = {}
            self.places = tuple(found.setdefault(id(x), len(found)) for x in flat)
        self.names: list[list[str]] = [[] for _ in range(max(self.places, default=-1) + 1)]
        for place, (path, _) in zip(self.places, tree.paths(tree.unflatten(self.places, self.treedef)), strict=True):
            if self.structure is None or holds(self.structure, place):
                self.names[place].append(path)
        self.held = sum(map(bool, self.names))

    def moved(self) -> list[tuple[int, int]]:
        """(number of a leaf, its place among the names), of what is trained here; of an ordinary tree (position,
        place).
        """
        if self.structure is None:
            return list(enumerate(self.places))
        return [(i, i) for i, n in enumerate(self.lengths) if n and not self.structure.frozen(i)]

    def spots(self, who: str, rate: Rate) -> list[int]:
        """By leaf: which of the rate's parts counts; of rules the first that is found in any of its names."""
        if _plain(rate):
            return [0] * len(self.names)
        return self._by_rule(who, rate) if _is_rules(rate) else self._by_tree(who, rate)

    def _by_rule(self, who: str, rules: Any) -> list[int]:
        hits = [
            {i for i, names in enumerate(self.names) if any(re.search(regex, n) for n in names)} for regex, _ in rules
        ]
        first = [next((k for k, mine in enumerate(hits) if i in mine), None) for i in range(len(self.names))]
        for (regex, r), mine in zip(rules, hits, strict=True):
            if not mine:
                some = ", ".join(repr(n[0]) for n in [n for n in self.names if n][:6])
                raise ValueError(
                    f"{who}: the rule {regex!r} is found in no parameter's path; correct it or leave it out (paths are"
                    f" {some}, ...)"
                )
            others = [rules[k][1] for i in mine if (k := first[i]) is not None]
            if len(mine) < self.held and all(x is not r and x != r for x in others):
                raise ValueError(
                    f"{who}: the rule {regex!r} never counts, because a rule before it takes"
                    f" {self.names[min(mine)][0]!r} and all else that it matches; put it first"
                )
        missing = next((n[0] for n, k in zip(self.names, first, strict=True) if n and k is None), None)
        if missing is not None:
            raise ValueError(f"{who}: no rule matches parameter {missing!r}; end the rules with ('', default)")
        regexes = list(dict(rules))
        return [0 if k is None else regexes.index(rules[k][0]) for k in first]

    def _by_tree(self, who: str, rate: Any) -> list[int]:
        try:
            flat = self.treedef.flatten_up_to(rate)
        except ValueError as e:
            raise TypeError(
                f"{who}: {type(rate).__name__} is neither a number, a schedule, rules [(regex, value), ...] nor a tree"
                f" like the parameters: {e}"
            ) from None
        out: list[Any] = [None] * len(self.names)
        for spot, (place, r) in enumerate(zip(self.places, flat, strict=True)):
            if not self.names[place]:
                continue
            if not _plain(r):
                raise TypeError(
                    f"{who}: the value for parameter {self.names[place][0]!r} is {kind(r)}, neither a number nor a"
                    " schedule"
                )
            if out[place] is None:
                out[place] = spot
            elif (other := flat[out[place]]) is not r and other != r:
                raise ValueError(
                    f"{who}: the tree says two things of one tied parameter, {' = '.join(self.names[place])}; write the"
                    " same at all its paths"
                )
        return [0 if spot is None else spot for spot in out]
