"""The table of optimizers: each with torch's own class of the same formula, and runs of the zoo by both."""
from __future__ import annotations

import re

import torch
import zoo

import funczero as fz
from funczero import tree
from funczero.layout.mesh import world_size

MESH = {"data": -1}
F32, F64 = torch.float32, torch.float64


def masters(tx, stage=3, dtype=F32, updates=4, policy=None, frozen=None, units=("blocks",), **kw):
    """Whole masters after some updates of the zoo, and its metrics."""
    still = () if frozen is None else (fz.freeze(frozen),)
    parts = fz.zero(zoo.source(units=units), *still, tx, stage=stage, accumulate=zoo.MICROS // world_size())
    got, log, state, _ = zoo.train(parts, MESH, dtype=dtype, updates=updates, policy=policy or str(dtype).removeprefix("torch."), **kw)
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


PAIRS = {
    "adamw": (fz.adamw(1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 1e-2, (0.8, 0.95), 1e-6, 0.1)),
    "adamw, no decay": (fz.adamw(1e-2, weight_decay=0.0), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.0)),
    "sgd": (fz.sgd(0.5), lambda p: torch.optim.SGD(p, 0.5)),
    "momentum": (fz.sgd(0.5, momentum=0.9), lambda p: torch.optim.SGD(p, 0.5, momentum=0.9)),
    "adam": (fz.adam(1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1), lambda p: torch.optim.Adam(p, 1e-2, (0.8, 0.95), 1e-6, 0.1)),
    "adagrad": (fz.adagrad(1e-2, weight_decay=0.1), lambda p: torch.optim.Adagrad(p, 1e-2, weight_decay=0.1)),
    "lion": (fz.lion(1e-2, 0.8, 0.95, weight_decay=0.1), lambda p: Lion(p, 1e-2, (0.8, 0.95), 0.1)),
    "nesterov, decay": (fz.sgd(0.5, 0.9, nesterov=True, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.5, 0.9, nesterov=True, weight_decay=0.1)),
}


OWN = {"RMSprop": dict(momentum=0.9, centered=True), "Rprop": {}, "NAdam": dict(decoupled_weight_decay=True), "Adadelta": {}, "ASGD": dict(t0=2.0), "RAdam": {}, "Adamax": {}}
PAIRS |= {
    f"torch {n}": (fz.from_torch(n, 1e-2, **own, **decay), lambda p, n=n, own=own, decay=decay: getattr(torch.optim, n)(p, lr=1e-2, foreach=False, **own, **decay))
    for n, own in OWN.items()
    for decay in [{} if n == "Rprop" else {"weight_decay": 0.1}]
}
