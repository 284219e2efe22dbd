"""The classes of torch.optim as optimizers of a chain: the elementwise ones by their own arithmetic, with the state as
a value; SGD, Muon and Adafactor as this package's own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funczero.core import tree
from funczero.core.number import flag, kind, number
from funczero.core.number import shown as described
from funczero.core.optimizer import Formula, GradientTransformation
from funczero.core.types import ChainError
from funczero.optim.adafactor import adafactor
from funczero.optim.muon import muon
from funczero.optim.rate import Beta, Rate, lasting, value_at
from funczero.optim.rates import Rates
from funczero.optim.sgd import sgd
from funczero.transforms.formula import optimizer

SAME = ("params", "foreach", "differentiable", "fused", "capturable")  # ways to compute the same
NEVER = {"LBFGS": "it runs the forward again inside its step", "SparseAdam": "gradients are dense here"}
ELEMENTWISE = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop")


class FromTorch(NamedTuple):
    """The class's own state: what is one number for all values, what is like the parameters, and the rates lr and
    weight_decay.
    """

    scalars: dict[str, Tensor]  # step, and eta, mu, mu_product where the class has them
    moments: dict[str, Any]
    rates: Any = ()


class Scalars(NamedTuple):
    """What the class counts by itself, before and after the update: the latter is written by `leaf`."""

    ok: Tensor
    factor: Tensor
    rates: dict[str, Any]
    old: dict[str, Tensor]
    new: dict[str, Tensor]
    names: list[str]  # of the moments


class Kind(NamedTuple):
    """A class of torch.optim with those of its arguments that are no leaves of the state."""

    who: str  # as errors name it
    cls: Any
    options: dict[str, Any]
    decays: bool  # does it take weight_decay?
    betas: bool  # does it take betas?

    def build(self, params: list[Tensor], now: dict[str, Any]) -> Any:
        """The class over these tensors, with the rates as they are in this update."""
        given: dict[str, Any] = {"weight_decay": float(now["weight_decay"])} if self.decays else {}
        if self.betas:
            given["betas"] = (float(now["b1"]), float(now["b2"]))
        return self.cls(params, lr=float(now["lr"]), foreach=False, **given, **self.options)

    def fresh(self, leaf: Tensor, now: dict[str, Any]) -> dict[str, Tensor]:
        """The state that the class gives a parameter before its first step."""
        p = leaf.detach().clone()
        p.grad = torch.zeros_like(p)
        own = self.build([p], now)
        lists: list[list[Tensor]] = [[] for _ in list(inspect.signature(own._init_group).parameters)[1:]]
        own._init_group(own.param_groups[0], *lists)
        return {k: x for k, x in own.state[p].items() if isinstance(x, Tensor)}

    def leaf(self, params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], s: Scalars) -> None:
        """The class steps on clones, which count where ok; one value of its own counts for it, as this rank may hold
        no other.
        """
        counter = [torch.zeros(1, device=s.old["step"].device) for _ in range(2 + len(moments))]
        rows = [[x.detach().clone() for x in xs] for xs in (params, grads, *moments)]
        own = self.build([counter[0], *rows[0]], s.rates)
        for g in rows[1]:
            g.mul_(s.factor.to(g.dtype))
        for p, g, *moment in [counter, *zip(*rows, strict=True)]:
            p.grad = g
            own.state[p] = {k: x.clone() for k, x in s.old.items()} | dict(zip(s.names, moment, strict=True))
        own.step()
        for xs, ys in zip((params, *moments), (rows[0], *rows[2:]), strict=True):
            for x, y in zip(xs, ys, strict=True):
                x.copy_(torch.where(s.ok, y, x))
        for k, x in s.new.items():
            x.copy_(torch.where(s.ok.to(x.device), own.state[counter[0]][k], s.old[k]))


def from_torch(
    name: Any, lr: Beta | None = None, weight_decay: Rate | None = None, **options: Any
) -> GradientTransformation:
    """torch.optim's class of this name; a skipped update leaves its state alone.

    Law: the values of the class's own single-tensor step, on any mesh. What is left out is the class's own default.

    Args:
      name: of a class of torch.optim, the class itself, or a function of parameters that makes one, as
        functools.partial(torch.optim.AdamW, lr=1e-3), whose arguments are read. SGD, Muon and Adafactor are fz.sgd,
        fz.muon and fz.adafactor; adamw, adam and adagrad of this package are the same formulas, faster.
      lr: number, or schedule of applied updates.
      weight_decay: as the class means it; number, schedule, rules or tree.
      options: the class's other arguments; betas are leaves of the state (b1, b2), as lr and weight_decay are.

    Raises:
      ChainError: the class is no function of one dense gradient (LBFGS, SparseAdam), or not one of torch.optim.
      TypeError, ValueError: the class does not take such an argument.

    >>> from_torch("RMSprop", 1e-3, momentum=0.9).name
    'rmsprop'
    """
    name, made = _named(name)
    cls, who = getattr(torch.optim, name), f"from_torch({name!r})"
    lr, weight_decay = made.pop("lr", None) if lr is None else lr, made.pop("weight_decay", weight_decay)
    options = {**made, **options}
    defaults = {
        k: p.default
        for k, p in inspect.signature(cls).parameters.items()
        if k not in ("params", "foreach", "differentiable")
    }
    lr = defaults["lr"] if lr is None else lr
    given = _options(who, name, defaults, lr, weight_decay, options)
    if name in OWN:
        others = {k: x for k, x in defaults.items() if k not in ("lr", "weight_decay")}
        return OWN[name](
            who, lr, defaults["weight_decay"] if weight_decay is None else weight_decay, {**others, **given}
        )
    options = {k: x for k, x in given.items() if k != "betas"}
    betas = given.get("betas", defaults.get("betas", ()))
    moving = dict(zip(("b1", "b2"), betas, strict=False))
    own = Kind(who, cls, options, "weight_decay" in defaults, bool(betas))
    decay = {"weight_decay": defaults["weight_decay"] if weight_decay is None else weight_decay} if own.decays else {}
    rate = Rates(who, lr=lr, **decay, **moving)
    try:
        own.build([torch.zeros(1)], {"lr": 0.0 if callable(lr) else lr, "weight_decay": 0.0, **moving})
    except (ValueError, TypeError, RuntimeError) as e:
        raise ValueError(
            f"{who}: torch.optim.{name} refuses its arguments ({e}); correct {', '.join(given) or 'lr'}"
        ) from None
    eps = float(options.get("eps", defaults.get("eps", 0.0)) or 0.0)

    def init(params: Any) -> FromTorch:
        kept = rate.init(params)
        lasting(who, eps, params)
        first = value_at(who, "lr", lr, torch.zeros((), dtype=torch.int64))
        now = {"lr": first, "weight_decay": 0.0, **moving}
        probe = own.fresh(torch.zeros(1, device=next(iter(tree.tensors(params)), torch.zeros(())).device), now)
        moments = {k: tree.map(lambda p, k=k: own.fresh(p, now)[k], params) for k, x in probe.items() if x.dim()}
        return FromTorch({k: x for k, x in probe.items() if not x.dim()}, moments, kept)

    def scalars(
        state: FromTorch, now: list[dict[str, Any]], factor: Tensor, ok: Tensor
    ) -> tuple[FromTorch, list[Scalars]]:
        new = {k: x.clone() for k, x in state.scalars.items()}
        return state._replace(scalars=new), [
            Scalars(ok, factor, each, state.scalars, new, [*state.moments]) for each in now
        ]

    reads = rate.reads(lambda state: state.scalars["step"])
    return optimizer(name.lower(), init, Formula(reads, lambda state: [*state.moments.values()], scalars, own.leaf))


def _named(which: Any) -> tuple[str, dict[str, Any]]:
    """The name of a class of torch.optim, and the arguments with which a function makes one.

    Raises:
      ChainError: it is none, or none that could be a value.
    """
    made: dict[str, Any] = {}
    if callable(which) and not isinstance(which, type):
        instance = which([torch.nn.Parameter(torch.zeros(2, 2))])
        if not isinstance(instance, torch.optim.Optimizer) or len(instance.param_groups) != 1:
            raise ChainError(
                f"from_torch: {described(which)} does not make one optimizer with one group of parameters; write a part"
                " of fz.partition for each group"
            )
        known = inspect.signature(type(instance)).parameters
        made = {
            k: float(x) if isinstance(x, Tensor) else x
            for k, x in instance.param_groups[0].items()
            if k in known and k not in SAME and (k in ("lr", "weight_decay") or x != known[k].default)
        }
        which = type(instance)
    name = which if isinstance(which, str) else getattr(which, "__name__", type(which).__name__)
    if isinstance(which, type) and getattr(torch.optim, name, None) is not which:
        raise ChainError(
            f"from_torch: {name} is no class of torch.optim, and nothing says how much of a leaf it reads; write its"
            " (init, update) pair and fz.lift(pair, needs=...)"
        )
    if name in NEVER:
        raise ChainError(f"from_torch: torch.optim.{name} cannot work here: {NEVER[name]}; write fz.adamw(lr)")
    if name not in (*ELEMENTWISE, *OWN) or not isinstance(which, (str, type)):
        raise ChainError(
            f"from_torch: torch.optim.{name} is not known here; write one of {', '.join((*ELEMENTWISE, *OWN))}"
        )
    return name, made


def _sgd(who: str, lr: Any, decay: Any, own: dict[str, Any]) -> GradientTransformation:
    _downhill(who, own)
    return sgd(lr, own["momentum"], own["nesterov"], decay, own["dampening"])


def _muon(who: str, lr: Any, decay: Any, own: dict[str, Any]) -> GradientTransformation:
    names = {"ns_coefficients": "coefficients", "ns_steps": "steps"}
    scale = own.pop("adjust_lr_fn") or "original"
    return muon(lr, weight_decay=decay, scale=scale, **{names.get(k, k): x for k, x in own.items()})


def _adafactor(who: str, lr: Any, decay: Any, own: dict[str, Any]) -> GradientTransformation:
    _downhill(who, own)
    return adafactor(lr, weight_decay=decay, **own)


def _downhill(who: str, own: dict[str, Any]) -> None:
    if own.pop("maximize"):
        raise ValueError(f"{who}: maximize=True climbs; return the negative loss instead")


OWN: dict[str, Callable[..., GradientTransformation]] = {"SGD": _sgd, "Muon": _muon, "Adafactor": _adafactor}


def _options(
    who: str, name: str, defaults: dict[str, Any], lr: Any, weight_decay: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """The class's other arguments, each of its kind; refuses what the class does not take."""
    known = set(defaults) - {"lr"}
    odd = sorted(set(options) - known)
    if odd:
        raise TypeError(f"from_torch: torch.optim.{name} takes no {odd[0]!r} here; write some of {sorted(known)}")
    if "weight_decay" not in known and weight_decay not in (None, 0):
        raise TypeError(
            f"from_torch: torch.optim.{name} takes no weight_decay; leave weight_decay={described(weight_decay)} out"
        )
    if isinstance(lr, (list, tuple, dict)) and name not in OWN:
        raise TypeError(
            f"from_torch: lr is {kind(lr)}, but these classes keep one number for all leaves; write a number or a"
            " schedule"
        )
    return {k: _option(who, k, defaults[k], x) for k, x in options.items()}


def _option(who: str, what: str, default: Any, x: Any) -> Any:
    """An option of the kind that its default is of."""
    if isinstance(default, bool):
        return flag(who, what, x)
    if isinstance(default, (int, float)):
        value = number(who, what, x, low=-math.inf)
        return x if type(default) is type(x) is int else value
    if isinstance(default, tuple):
        if not isinstance(x, (tuple, list)) or len(x) != len(default):
            raise TypeError(f"{who}: {what}={described(x)} is {kind(x)}; write {len(default)} numbers, as {default}")
        return tuple(
            None if y is None is z else number(who, what, y, low=-math.inf) for y, z in zip(x, default, strict=True)
        )
    return x
