"""Denoising diffusion learns two spirals; samples are drawn with an exponential average of the weights.

Shows: `fz.ema` stands right of the update, where what flows are new parameters, and its average is a leaf of the state,
cut as the parameters are: at stage 3 no rank holds it whole. A row's time and noise are functions of its key.

Run:
    python examples/ddpm.py --stage=3 --nproc=2
    python examples/ddpm.py --nproc=1 --accumulate=2 --out=runs/ddpm1
Expect: both print one result. Samples come to lie near the spirals, in the end those of the average nearer.
Found: losses are plain torch's to 2e-7; 0.114 (average) and 0.117 away after 1,500 updates, any point of the disc 0.33.
"""

import torch
from torch import nn

import funczero as fz

STEPS = 40
KEPT = torch.cumprod(1 - torch.linspace(1e-3, 0.2, STEPS), 0)  # of the signal's square, after each step


def spirals(rows, seed):
    """Points on two spirals, and a key for each: a function of the seed."""
    g = torch.Generator().manual_seed(seed)
    r, arm = torch.rand(rows, generator=g), torch.randint(2, (rows,), generator=g)
    angle = 5 * r + torch.pi * arm
    return {"x": 2 * r[:, None] * torch.stack([angle.cos(), angle.sin()], 1), "key": fz.rng.row_keys(seed, rows)}


class Denoiser(nn.Module):
    """The noise in a point, after t steps."""

    def __init__(self, width=64, depth=3):
        super().__init__()
        self.into, self.time, self.out = nn.Linear(2, width), nn.Embedding(STEPS, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.SiLU()) for _ in range(depth))

    def forward(self, x, t):
        x = self.into(x) + self.time(t)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def loss(net, batch):
    """How far the noise is from what the net takes for it, at a time of each row's own."""
    t = (fz.rng.row_uniform(batch["key"]) * STEPS).long()
    noise, kept = fz.rng.row_normal(batch["key"], (2,)), KEPT[t, None]
    found = net(kept.sqrt() * batch["x"] + (1 - kept).sqrt() * noise, t)
    return (found - noise).square().sum(), found.numel()


@torch.no_grad()
def sampled(net, params, rows, seed):  # points out of noise
    beta, x = 1 - KEPT / torch.cat([torch.ones(1), KEPT[:-1]]), fz.rng.row_normal(fz.rng.row_keys(seed, rows), (2,))
    for t in reversed(range(STEPS)):
        found = torch.func.functional_call(net, params, (x, torch.full((rows,), t)))
        x = (x - beta[t] / (1 - KEPT[t]).sqrt() * found) / (1 - beta[t]).sqrt()
        x = x + beta[t].sqrt() * fz.rng.row_normal(fz.rng.row_keys(fz.rng.fold(seed, t), rows), (2,)) * (t > 0)
    return x


def begin(run):
    net = Denoiser()
    loss_fn, params = fz.stateless(net, loss)
    adam = fz.adamw(1e-2, weight_decay=0.0)
    step = run.train_step(fz.value_and_grad(loss_fn, batch=fz.P(run.axis)), adam, fz.ema(0.98))

    def evaluate(state):
        """The distance of samples from the nearest point of the spirals."""
        distances = lambda params: torch.cdist(sampled(net, params, 256, run.seed), spirals(2000, 0)["x"])
        away = lambda state: distances(step.params(state)).amin(1).mean().item()
        return {"average_away": away(fz.averaged(state)), "last_away": away(state)}

    batch = lambda n: spirals(run.batch, run.seed + 1 + n)
    return fz.Experiment(step, params, batch, evaluate=evaluate, unit="points")


if __name__ == "__main__":
    fz.experiment(begin, rows="points", steps=1500, batch=512, eval_every=500)
