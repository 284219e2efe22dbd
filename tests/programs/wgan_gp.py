"""A Wasserstein GAN with a gradient penalty: two steps in turn, each loss of which reads the other's network."""

from __future__ import annotations

import torch
from programs.table import Pair, seeded
from torch import nn
from torch.func import functional_call

import funczero as fz
from funczero import P

mlp = lambda *dims: nn.Sequential(
    *(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(dims[:-2], dims[1:-1], strict=True)),
    nn.Linear(*dims[-2:]),
).double()
GENERATOR, CRITIC = (seeded(lambda dims=dims: mlp(*dims), i) for i, dims in enumerate([(3, 8, 8, 4), (4, 8, 8, 1)]))
generate, criticize = (lambda p, x, m=m: functional_call(m, p, (x,)) for m in (GENERATOR, CRITIC))
weight = lambda batch: torch.tensor(float(len(batch["z"])))


def critic_loss(critic, generator, batch):
    """E D(fake) - E D(real) + 10 E (|dD/dx| - 1)^2 between them."""
    with torch.no_grad():
        fake = generate(generator, batch["z"])
    between = (batch["mix"] * batch["x"] + (1 - batch["mix"]) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(criticize(critic, between).sum(), between, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().sum()
    return (criticize(critic, fake) - criticize(critic, batch["x"])).sum() + 10 * penalty, weight(batch)


def generator_loss(generator, critic, batch):
    """-E D(fake)."""
    return -criticize(critic, generate(generator, batch["z"])).sum(), weight(batch)


def batch(t):
    """Four real points, noise, and where between the penalty is taken."""
    g = torch.Generator().manual_seed(t)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return {"x": new(4, 4), "z": new(4, 3), "mix": new(4, 1).sigmoid()}


def sharded(stage, accumulate):
    """Both networks after a few rounds, and both losses."""

    def step_of(loss, mesh, **kw):
        with_other = lambda params, batch: loss(params, batch["other"].params(), batch)
        grad = fz.value_and_grad(with_other, batch=P("data"), **kw)
        chain = fz.zero(grad, fz.adam(1e-2, b1=0.5), stage=stage, accumulate=accumulate)
        return fz.train_step(*chain, mesh=mesh, policy="float64")

    step_d = step_of(critic_loss, {"data": -1}, higher_order=True)
    step_g = step_of(generator_loss, step_d.mesh)
    d, g = (step.init(dict(m.named_parameters())) for step, m in ((step_d, CRITIC), (step_g, GENERATOR)))
    losses = []
    for t in range(3):
        rows = step_d.local_rows(batch(t))
        d, of_d = step_d(d, rows | {"other": fz.frozen(g, step_g)})
        g, of_g = step_g(g, rows | {"other": fz.frozen(d, step_d)})
        losses += [of_d.loss, of_g.loss]
    return losses, step_d.params(d), step_g.params(g)


def plain():
    """The same in one process."""
    d, g = ({n: p.detach().clone().requires_grad_() for n, p in m.named_parameters()} for m in (CRITIC, GENERATOR))
    adams, losses = [torch.optim.Adam(p.values(), 1e-2, betas=(0.5, 0.999)) for p in (d, g)], []
    for t in range(3):
        for mine, other, loss, adam in ((d, g, critic_loss, adams[0]), (g, d, generator_loss, adams[1])):
            total, n = loss(mine, other, batch(t))
            adam.zero_grad()
            (total / n).backward(inputs=list(mine.values()))
            adam.step()
            losses.append((total / n).detach())
    return losses, *({n: p.detach() for n, p in x.items()} for x in (d, g))


def program():
    """Two chains."""
    return Pair(sharded, plain)
