"""Rates by leaf: what a rate keeps in the state, and which part of its rules or of its tree moves which leaf."""

from __future__ import annotations

import re
from typing import Any

from funczero.core import tree
from funczero.core.number import kind
from funczero.layout.slots import Slots
from funczero.optim.rate import Rate, is_plain, is_rules
from funczero.transforms.partition import holds


def form_of(rate: Any) -> Any:
    """How a rate lies in the state: None for one leaf, the regexes of its rules, the form of its tree."""
    if is_rules(rate):
        return tuple(dict(rate))
    return None if is_plain(rate) else tree.flatten(rate)[1]


def reported(rate: Any) -> int | None:
    """Which part of a rate stands for it in the metrics: the number, or the rules' default; none of a tree."""
    if is_rules(rate):
        regexes = list(dict(rate))
        return next((k for k, regex in enumerate(regexes) if re.search(regex, "")), regexes.index(rate[-1][0]))
    return 0 if is_plain(rate) else None


def parts_of(rate: Any) -> list[Any]:
    """The numbers and schedules of one rate; of equal regexes the first counts."""
    if is_rules(rate):
        first: dict[str, Any] = {}
        for regex, r in rate:
            first.setdefault(regex, r)
        return list(first.values())
    return tree.leaves(rate)


def values_of(form: Any, kept: Any) -> list[Any]:
    """What the state keeps of one rate, in the order of its parts."""
    if isinstance(form, tuple):
        return [kept[regex] for regex in form]
    return [kept] if form is None else form.flatten_up_to(kept)


class Leaves:
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
        if is_plain(rate):
            return [0] * len(self.names)
        return self._by_rule(who, rate) if is_rules(rate) else self._by_tree(who, rate)

    def _by_rule(self, who: str, rules: Any) -> list[int]:
        hits = [
            {i for i, names in enumerate(self.names) if any(re.search(regex, n) for n in names)} for regex, _ in rules
        ]
        first = [next((k for k, hit in enumerate(hits) if i in hit), None) for i in range(len(self.names))]
        for (regex, r), hit in zip(rules, hits, strict=True):
            if not hit:
                some = ", ".join(repr(n[0]) for n in [n for n in self.names if n][:6])
                raise ValueError(
                    f"{who}: the rule {regex!r} is found in no parameter's path; correct it or leave it out (paths are"
                    f" {some}, ...)"
                )
            others = [rules[k][1] for i in hit if (k := first[i]) is not None]
            if len(hit) < self.held and all(x is not r and x != r for x in others):
                raise ValueError(
                    f"{who}: the rule {regex!r} never counts, because a rule before it takes"
                    f" {self.names[min(hit)][0]!r} and all else that it matches; put it first"
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
            if not is_plain(r):
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
