"""DCGAN: two convolutional networks with batch norm, each with its own step, which learn from each other in turns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from programs.table import MICROS, Pair, seeded
from torch import nn
from torch.func import functional_call

import funczero as fz
from funczero import P
from funczero.core.rows import split


def generator():
    up = lambda a, b: nn.Sequential(nn.ConvTranspose2d(a, b, 2, 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    return nn.Sequential(up(5, 8), up(8, 4), nn.ConvTranspose2d(4, 1, 2, 2), nn.Tanh()).double()


def critic():
    down = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 2, 2, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2))
    return nn.Sequential(down(1, 4), down(4, 8), nn.Flatten(), nn.Linear(32, 1)).double()


NETS = {"g": seeded(generator, 1), "d": seeded(critic, 2)}


def run(name, params, stats, x):
    """A network's output, and the statistics that it leaves."""
    new = {n: s.clone() for n, s in stats.items()}
    return functional_call(NETS[name], (params, new), (x,)), new


def judged(logits, real):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)), reduction="sum")


def critic_loss(d, stats, other, other_stats, batch):
    """Real images are real, and made ones are not."""
    with torch.no_grad():
        made, _ = run("g", other, other_stats, batch["z"])
    real, stats = run("d", d, stats, batch["x"])
    fake, stats = run("d", d, stats, made)
    return judged(real, True) + judged(fake, False), torch.tensor(float(len(made))), stats


def generator_loss(g, stats, other, other_stats, batch):
    """Made images pass for real."""
    made, stats = run("g", g, stats, batch["z"])
    return judged(run("d", other, other_stats, made)[0], True), torch.tensor(float(len(made))), stats


LOSSES = {"d": critic_loss, "g": generator_loss}


def batch(t):
    g = torch.Generator().manual_seed(t)
    new = lambda *shape: torch.randn(8, *shape, dtype=torch.float64, generator=g)
    return {"x": new(1, 8, 8).tanh(), "z": new(5, 1, 1)}


def sharded(stage, accumulate):
    mesh, steps, states, losses = {"data": -1}, {}, {}, []
    for name, loss in LOSSES.items():
        fn = lambda p, s, b, loss=loss: loss(p, s, b["other"].params(), b["other"].model_state, b)
        grad = fz.value_and_grad(fn, batch=P("data"), state=dict(NETS[name].named_buffers()))
        chain = fz.zero(grad, fz.adam(2e-3, b1=0.5), stage=stage, accumulate=accumulate)
        steps[name] = fz.train_step(*chain, mesh=mesh, policy="float64")
        states[name], mesh = steps[name].init(dict(NETS[name].named_parameters())), steps[name].mesh
    for t in range(3):
        rows = steps["d"].local_rows(batch(t))
        for name, other in ("d", "g"), ("g", "d"):
            given = rows | {"other": fz.frozen(states[other], steps[other])}
            states[name], metrics = steps[name](states[name], given)
            losses.append(metrics.loss)
    return {n: steps[n].params(s) | s.model_state for n, s in states.items()}, losses


def plain():
    params = {k: {n: p.detach().clone().requires_grad_() for n, p in m.named_parameters()} for k, m in NETS.items()}
    stats = {k: {n: b.clone() for n, b in m.named_buffers()} for k, m in NETS.items()}
    adams, losses = {k: torch.optim.Adam(p.values(), 2e-3, betas=(0.5, 0.999)) for k, p in params.items()}, []
    for t in range(3):
        for name, other in ("d", "g"), ("g", "d"):
            given = params[name], stats[name], params[other], stats[other]
            found = [LOSSES[name](*given, micro) for micro in split(batch(t), MICROS, "plain")]
            total = sum(loss for loss, *_ in found) / 8
            adams[name].zero_grad()
            total.backward(inputs=list(params[name].values()))
            adams[name].step()
            stats[name] = {n: sum(new[n] for *_, new in found) / MICROS for n in stats[name]}
            losses.append(total.detach())
    return {k: {n: x.detach() for n, x in {**params[k], **stats[k]}.items()} for k in ("d", "g")}, losses


def program():
    """Two steps."""
    return Pair(sharded, plain)
