"""The table of optimizers: each with torch's own class of the same formula, and runs of the zoo by both."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
import zoo

import funczero as fz
from funczero import tree
from funczero.layout.processes import world_size

MESH = {"data": -1}
MICROS = 2  # of an update: nothing is asked of sums here, and worlds have one rank or two
F32, F64 = torch.float32, torch.float64


def masters(tx, stage=3, dtype=F32, updates=4, policy=None, frozen=None, units=("blocks",), **kw):
    """Whole masters after some updates of the zoo, and its metrics."""
    still = () if frozen is None else (fz.freeze(frozen),)
    parts = fz.zero(zoo.source(units=units), *still, tx, stage=stage, accumulate=MICROS // world_size())
    got, log, state, _ = zoo.train(
        parts, MESH, dtype=dtype, updates=updates, policy=policy or str(dtype).removeprefix("torch."), **kw
    )
    return dict(tree.paths(got)), log, state


def torchs(make, updates=4, dtype=F64, frozen=None):
    """The same by torch.optim, unsharded."""
    p = zoo.params(dtype)
    still = {id(x) for n, x in tree.paths(p) if frozen and re.search(frozen, n)}
    unique = list({id(x): x.requires_grad_() for x in tree.leaves(p) if id(x) not in still}.values())
    optimizer = make(unique)
    for t in [t for t in range(updates) if t != zoo.BAD]:
        loss, weight = zoo.loss_plain(p, zoo.batch(t, dtype))
        for x, g in zip(unique, torch.autograd.grad(loss / weight, unique, allow_unused=True), strict=True):
            x.grad = torch.zeros_like(x) if g is None else g
        optimizer.step()
    return {n: x.detach() for n, x in tree.paths(p)}


def close(a, b, atol):
    for n in b:
        torch.testing.assert_close(a[n], b[n], rtol=0, atol=atol, msg=lambda m, n=n: f"{n}: {m}")


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of the paper, leaf by leaf."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, (b1, b2), decay = group["lr"], group["betas"], group["weight_decay"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                move = torch.sign(b1 * m + (1 - b1) * p.grad) + decay * p
                m.copy_(b2 * m + (1 - b2) * p.grad)
                p.sub_(lr * move)


class Trusted(torch.optim.Optimizer):
    """LAMB and LARS as their papers have them, leaf by leaf, in plain arithmetic."""

    def __init__(self, params, kind, **kw):
        super().__init__(params, kw)
        self.kind, self.n = kind, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.n += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.numel():
                    p.sub_(
                        getattr(self, self.kind)(
                            p, p.grad, self.state[p], **{k: x for k, x in group.items() if k != "params"}
                        )
                    )

    def lamb(self, p, g, own, lr, betas, decay):
        (b1, b2), m, v = betas, own.setdefault("m", torch.zeros_like(p)), own.setdefault("v", torch.zeros_like(p))
        m.copy_(b1 * m + (1 - b1) * g)
        v.copy_(b2 * v + (1 - b2) * g * g)
        u = m / (1 - b1**self.n) / ((v / (1 - b2**self.n)).sqrt() + 1e-6) + decay * p
        return lr * (p.norm() / u.norm() if p.norm() * u.norm() else 1.0) * u

    def lars(self, p, g, own, lr, momentum, decay, trust):
        v = own.setdefault("v", torch.zeros_like(p))
        t = trust * p.norm() / (g.norm() + decay * p.norm()) if p.norm() * g.norm() else 1.0
        return v.copy_(momentum * v + lr * t * (g + decay * p))


# --- the oracle: each formula in plain arithmetic, as somebody writes it against optax --------------------------------
class Plain(NamedTuple):
    """The number of applied updates, and trees like the parameters."""

    count: Any
    moments: Any


def walk(tx, grads, start=None):
    """By update: the parameters that the pair gives, in float64, from zeros or `start`; and the last state."""
    params = {"w": torch.zeros_like(grads[0], dtype=F64) if start is None else start.to(F64)}
    state, out = tx.init(params), []
    for g in grads:
        updates, state = tx.update({"w": g.to(F64)}, state, params)
        params = {"w": params["w"] + updates["w"]}
        out.append(params["w"])
    return out, state


def skipping(tx, kinds):
    """A run of one leaf in a step, whose updates are fine or not: the whole state after each of them, and by hash what
    a skip may not move.
    """
    g = fz.value_and_grad(lambda p, b: ((p["w"] * b["x"]).sum(), torch.ones(())))
    step = fz.train_step(g, tx, mesh={"data": 1})
    state, out = step.init({"w": torch.linspace(-1, 1, 5)}), []
    for n, fine in enumerate(kinds):
        state, m = step(state, {"x": torch.linspace(1, 2 + n, 5) if fine else torch.full((5,), torch.nan)})
        assert bool(m.ok) is fine
        out.append((state, zoo.tree_hash([step.params(state), state.chain])))
    return out


def by_path(rate):
    """A tree of rates like the zoo's parameters."""
    return tree.unflatten([rate(n) for n, _ in tree.paths(zoo.params())], tree.flatten(zoo.params())[1])


def by_leaf(rate, params, count):
    """A tree of numbers from a number, a schedule, rules or a tree, at a count; a tied leaf has the first of its names
    that is ruled.
    """
    now = lambda r: float(r(count.double())) if callable(r) else float(r)  # noqa: E731
    if callable(rate) or isinstance(rate, float):
        return tree.map(lambda p: now(rate), params)
    if isinstance(rate, dict):
        return tree.map(now, rate)
    names = {}
    for n, x in tree.paths(params):
        names.setdefault(id(x), []).append(n)
    return tree.map(
        lambda p: now(next(r for regex, r in rate if any(re.search(regex, n) for n in names[id(p)]))), params
    )


def plain(moments, formula, **rates):
    """A pair: formula(p, g, *moments, number of this update, **rates) -> (update, *moments), leaf by leaf."""

    def init(params):
        return Plain(torch.zeros(()), [tree.map(torch.zeros_like, params) for _ in range(moments)])

    def update(grads, state, params):
        trees = {k: by_leaf(r, params, state.count) for k, r in rates.items()}
        flat, treedef = tree.flatten(params)
        rows = zip(flat, *(tree.leaves(t) for t in (grads, *state.moments, *trees.values())), strict=True)
        n = int(state.count) + 1
        out = [
            formula(p, g, *rest[:moments], n, **dict(zip(trees, rest[moments:], strict=True))) for p, g, *rest in rows
        ]
        updates, *new = (tree.unflatten(list(column), treedef) for column in zip(*out, strict=True))
        return updates, Plain(state.count + 1, new)

    return fz.lift((init, update), elementwise=True)


def plain_adam(lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True):
    def formula(p, g, m, v, n, lr, b1, d):
        g = g if decoupled else g + d * p
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        return -lr * (m / (1 - b1**n) / ((v / (1 - b2**n)).sqrt() + eps) + (d * p if decoupled else 0.0)), m, v

    return plain(2, formula, lr=lr, b1=b1, d=weight_decay)


def plain_sgd(lr, momentum=0.0, nesterov=False, weight_decay=0.0):
    def formula(p, g, t, n, lr, d):
        g = g + d * p
        t = momentum * t + g
        return -lr * (g + momentum * t if nesterov else t), t

    return plain(1, formula, lr=lr, d=weight_decay)


def plain_lion(lr, b1=0.9, b2=0.99, weight_decay=0.0):
    return plain(
        1,
        lambda p, g, m, n, lr, d: (-lr * ((b1 * m + (1 - b1) * g).sign() + d * p), b2 * m + (1 - b2) * g),
        lr=lr,
        d=weight_decay,
    )


class Free(torch.optim.Optimizer):
    """Schedule-free AdamW, or SGD without b2, leaf by leaf, as Algorithm 1 of the paper has it, which keeps x, too."""

    def __init__(self, params, lr, b1, b2=None, eps=0.0, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))
        self.n = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.n += 1
        for group in self.param_groups:
            lr, b1, b2, eps, decay = (group[k] for k in ("lr", "b1", "b2", "eps", "weight_decay"))
            for p in group["params"]:
                s = self.state[p]
                x, z = s.setdefault("x", p.clone()), s.setdefault("z", p.clone())
                g = p.grad
                if b2 is not None:
                    v = s.setdefault("v", torch.zeros_like(p)).mul_(b2).add_((1 - b2) * g * g)
                    g = g / ((v / (1 - b2**self.n)).sqrt() + eps)
                z.sub_(lr * (g + decay * p))
                x.copy_(x + (z - x) / self.n)
                p.copy_((1 - b1) * z + b1 * x)


def plain_adagrad(lr=1e-2, eps=1e-10, weight_decay=0.0):
    def formula(p, g, v, n, lr, d):
        g = g + d * p
        return -lr * g / ((v + g * g).sqrt() + eps), v + g * g

    return plain(1, formula, lr=lr, d=weight_decay)


class Both:
    """Two of torch's optimizers over the zoo's leaves: what SPLIT finds, and the rest."""

    def __init__(self, leaves, first, second):
        def name(x):
            return next(n for n, y in tree.paths(zoo.params(x.dtype)) if y.shape == x.shape and torch.equal(y, x))

        ours = [[x for x in leaves if bool(re.search(SPLIT, name(x.detach()))) == which] for which in (True, False)]
        self.both = [make(x) for make, x in zip((first, second), ours, strict=True) if x]

    def step(self):
        for o in self.both:
            o.step()


ORACLES = {
    "adamw": plain_adam(1e-2, 0.8, 0.95, 1e-6, 0.1),
    "adamw, no decay": plain_adam(1e-2),
    "sgd": plain_sgd(0.5),
    "momentum": plain_sgd(0.5, 0.9),
    "adam": plain_adam(1e-2, 0.8, 0.95, 1e-6, 0.1, decoupled=False),
    "adagrad": plain_adagrad(1e-2, weight_decay=0.1),
    "lion": plain_lion(1e-2, 0.8, 0.95, 0.1),
    "nesterov, decay": plain_sgd(0.5, 0.9, True, 0.1),
}

PAIRS = {
    "schedule-free adamw": (
        fz.schedule_free_adamw(1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1),
        lambda p: Free(p, 1e-2, 0.8, 0.95, 1e-6, 0.1),
    ),
    "schedule-free sgd": (fz.schedule_free_sgd(0.5, weight_decay=0.1), lambda p: Free(p, 0.5, 0.9, weight_decay=0.1)),
    "adamw": (
        fz.adamw(1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 1e-2, (0.8, 0.95), 1e-6, 0.1),
    ),
    "adamw, no decay": (fz.adamw(1e-2, weight_decay=0.0), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.0)),
    "sgd": (fz.sgd(0.5), lambda p: torch.optim.SGD(p, 0.5)),
    "momentum": (fz.sgd(0.5, momentum=0.9), lambda p: torch.optim.SGD(p, 0.5, momentum=0.9)),
    "adam": (
        fz.adam(1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 1e-2, (0.8, 0.95), 1e-6, 0.1),
    ),
    "adagrad": (fz.adagrad(1e-2, weight_decay=0.1), lambda p: torch.optim.Adagrad(p, 1e-2, weight_decay=0.1)),
    "lion": (fz.lion(1e-2, 0.8, 0.95, weight_decay=0.1), lambda p: Lion(p, 1e-2, (0.8, 0.95), 0.1)),
    "nesterov, decay": (
        fz.sgd(0.5, 0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.5, 0.9, nesterov=True, weight_decay=0.1),
    ),
}


PAIRS |= {
    "lamb": (
        fz.lamb(1e-2, 0.8, 0.95, weight_decay=0.1),
        lambda p: Trusted(p, "lamb", lr=1e-2, betas=(0.8, 0.95), decay=0.1),
    ),
    "lars": (
        fz.lars(3.0, 0.8, 0.1, trust=0.01),
        lambda p: Trusted(p, "lars", lr=3.0, momentum=0.8, decay=0.1, trust=0.01),
    ),
    "adafactor": (
        fz.adafactor(0.05, weight_decay=0.1, small=0),
        lambda p: torch.optim.Adafactor([x for x in p if x.numel()], 0.05, weight_decay=0.1),
    ),
}

OWN = {
    "RMSprop": dict(momentum=0.9, centered=True),
    "Rprop": {},
    "NAdam": dict(decoupled_weight_decay=True),
    "Adadelta": {},
    "ASGD": dict(t0=2.0),
    "RAdam": {},
    "Adamax": {},
}
PAIRS |= {
    f"torch {n}": (
        fz.from_torch(n, 1e-2, **own, **decay),
        lambda p, n=n, own=own, decay=decay: getattr(torch.optim, n)(p, lr=1e-2, foreach=False, **own, **decay),
    )
    for n, own in OWN.items()
    for decay in [{} if n == "Rprop" else {"weight_decay": 0.1}]
}

SPLIT = "embed|/w$|norm"
PAIRS["a partition"] = (
    fz.partition([(SPLIT, fz.adamw(1e-2, eps=1e-6, weight_decay=0.1)), ("", fz.sgd(0.5, 0.9))]),
    lambda p: Both(
        p,
        lambda p: torch.optim.AdamW(p, 1e-2, eps=1e-6, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.5, momentum=0.9),
    ),
)

MAKERS = {
    "adamw": fz.adamw,
    "adam": fz.adam,
    "sgd": lambda lr, **kw: fz.sgd(lr, 0.9, **kw),
    "lion": fz.lion,
    "adagrad": fz.adagrad,
    "rmsprop": lambda lr, **kw: fz.from_torch("RMSprop", lr, **kw),
}
