"""The elementwise classes of torch.optim as optimizers of a chain: their own arithmetic, with the state as a value."""
from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import flag, kind, number
from funczero.core.number import shown as described
from funczero.core.types import ChainError, GradientTransformation
from funczero.optim import rates

ELEMENTWISE = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop")
Groups = list[tuple[Any, list[list[Tensor]]]]  # (weight decay, [params, grads, *moments])


class FromTorch(NamedTuple):
    """The class's own state: what is one number for all values, and what is like the parameters."""

    scalars: dict[str, Tensor]  # step, and eta, mu, mu_product where the class has them
    moments: dict[str, Any]


def from_torch(name: str, lr: rates.Beta | None = None, weight_decay: rates.Rate | None = None, **options: Any) -> GradientTransformation:
    """torch.optim's class of this name, value by value; a skipped update leaves its state alone.

    Law: the values of the class's own single-tensor step, on any mesh. What is left out is the class's own default.

    Args:
      name: one of ELEMENTWISE; sgd, adamw, adam and adagrad of this package are the same formulas, faster.
      lr: number, or schedule of applied updates.
      weight_decay: as the class means it; number, schedule, rules or tree.
      options: the class's other arguments.

    Raises:
      ChainError: the class reads more of a leaf than one place (Adafactor, Muon, LBFGS, SparseAdam), or does not exist.
      TypeError, ValueError: the class does not take such an argument.

    >>> from_torch("RMSprop", 1e-3, momentum=0.9).name
    'rmsprop'
    """
    if name not in ELEMENTWISE:
        shown_name = name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)
        asked = f"; write its name, {shown_name!r}" if shown_name in ELEMENTWISE else f"; write one of {', '.join(ELEMENTWISE)}, or sgd"
        why = "is no name" if not isinstance(name, str) else "is not known to work value by value"
        raise ChainError(f"from_torch: torch.optim.{shown_name} {why}{asked}")
    cls, who = getattr(torch.optim, name), f"from_torch({name!r})"
    defaults = {k: p.default for k, p in inspect.signature(cls).parameters.items() if k not in ("params", "foreach", "differentiable")}
    known = set(defaults) - {"lr"}
    if not set(options) <= known:
        raise TypeError(f"from_torch: torch.optim.{name} takes no {sorted(set(options) - known)[0]!r} here; write some of {sorted(known)}")
    decays = "weight_decay" in known
    if not decays and weight_decay not in (None, 0):
        raise TypeError(f"from_torch: torch.optim.{name} takes no weight_decay; leave weight_decay={described(weight_decay)} out")
    lr = defaults["lr"] if lr is None else lr
    if isinstance(lr, (list, tuple, dict)):
        raise TypeError(f"from_torch: lr is {kind(lr)}, but these classes keep one number for all leaves; write a number or a schedule")
    rate = rates.Rates(who, lr, weight_decay if weight_decay is not None else defaults.get("weight_decay", 0.0))
    options = {k: _option(who, k, defaults[k], x) for k, x in options.items()}

    def optimizer(groups: list[tuple[float, list[Tensor]]], now: float) -> torch.optim.Optimizer:
        return cls([{"params": p} | ({"weight_decay": d} if decays else {}) for d, p in groups], lr=now, foreach=False, **options)

    try:
        optimizer([(0.0, [torch.zeros(1)])], 0.0 if callable(lr) else lr)
    except (ValueError, TypeError, RuntimeError) as e:
        raise ValueError(f"{who}: torch.optim.{name} refuses its arguments ({e}); correct {', '.join(options) or 'lr'}") from None

    def fresh(leaf: Tensor) -> dict[str, Tensor]:
        """The state that the class gives a parameter before its first step."""
        p = leaf.detach().clone()
        p.grad = torch.zeros_like(p)
        own = optimizer([(0.0, [p])], float(rates.at(who, "lr", lr, torch.zeros((), dtype=torch.int64))))
        lists: list[list[Tensor]] = [[] for _ in list(inspect.signature(own._init_group).parameters)[1:]]  # type: ignore[attr-defined]
        own._init_group(own.param_groups[0], *lists)  # type: ignore[attr-defined]
        return {k: x for k, x in own.state[p].items() if isinstance(x, Tensor)}

    def init(params: Any) -> FromTorch:
        rate.fit(params)
        rates.lasting(who, float(options.get("eps", defaults.get("eps", 0.0)) or 0.0), params)
        probe = fresh(torch.zeros(1, device=next(iter(tree.tensors(params)), torch.zeros(())).device))
        moments = {k: tree.map(lambda p, k=k: fresh(p)[k], params) for k, x in probe.items() if x.dim()}
        return FromTorch({k: x for k, x in probe.items() if not x.dim()}, moments)

    def step(groups: Groups, now: float, state: FromTorch) -> dict[str, Tensor]:
        """The class's step in place on groups; the new scalars, which one value of its own counts: this rank may hold no other."""
        own = optimizer([(float(d), trees[0]) for d, trees in groups] or [(0.0, [])], now)
        counter, *rest = (torch.zeros(1, device=state.scalars["step"].device) for _ in range(2 + len(state.moments)))
        own.param_groups[0]["params"].append(counter)
        for p, g, *moments in [(counter, *rest), *(x for _, trees in groups for x in zip(*trees, strict=True))]:
            p.grad = g
            own.state[p] = {k: x.clone() for k, x in state.scalars.items()} | dict(zip(state.moments, moments, strict=True))
        own.step()
        return {k: own.state[counter][k] for k in state.scalars}

    def update(grads: Any, state: FromTorch, params: Any) -> tuple[Any, FromTorch]:
        mine = tree.clone((params, grads, *state.moments.values()))
        step_, decay = rate.trees(state.scalars["step"], params)
        groups = [(d, [[x] for x in leaf]) for d, *leaf in zip(tree.leaves(decay), *map(tree.leaves, mine), strict=True)]
        scalars = step(groups, float(tree.leaves(step_)[0]), state)
        return tree.map(torch.sub, mine[0], params), FromTorch(scalars, dict(zip(state.moments, mine[2:], strict=True)))

    def apply(params: Any, grads: Any, factor: Tensor, state: FromTorch, ok: Tensor) -> tuple[Any, FromTorch, dict[str, Tensor]]:
        """The class steps on clones, which count where ok."""
        rated, shown = rate.groups(state.scalars["step"], params, grads, *state.moments.values())
        old = [(d, trees) for _, d, trees in rated]
        new = [(d, [[x.detach().clone() for x in xs] for xs in trees]) for d, trees in old]
        for _, (_, gs, *_) in new:
            for g in gs:
                g.mul_(factor.to(g.dtype))
        scalars = step(new, float(shown), state)
        for (_, before), (_, after) in zip(old, new, strict=True):
            for xs, ys in zip((before[0], *before[2:]), (after[0], *after[2:]), strict=True):
                for x, y in zip(xs, ys, strict=True):
                    x.copy_(torch.where(ok, y, x))
        scalars = {k: torch.where(ok.to(x.device), x, state.scalars[k]) for k, x in scalars.items()}
        return params, FromTorch(scalars, state.moments), {"lr": shown.to(ok.device)}

    return GradientTransformation(init, update, apply, name.lower(), elementwise=True)


def _option(who: str, what: str, default: Any, x: Any) -> Any:
    """An option of the kind that its default is of."""
    if isinstance(default, bool):
        return flag(who, what, x)
    if isinstance(default, (int, float)):
        return number(who, what, x, low=-math.inf)
    if isinstance(default, tuple):
        if not isinstance(x, (tuple, list)) or len(x) != len(default):
            raise TypeError(f"{who}: {what}={described(x)} is {kind(x)}; write {len(default)} numbers, as {default}")
        return tuple(number(who, what, y, low=-math.inf) for y in x)
    return x
