"""A mixture of experts keeps its experts busy without a loss for it: a bias of the router follows their load.

Shows: a rule of your own for a model's state. Every micro-batch leaves the number of rows of each expert; the rule
is given what all of them left and the old bias, and returns the new one, once an update and alike on every rank. The
experts are units that not every rank runs: those that no row of any rank was sent to are not even gathered.

Run:
    python examples/moe.py --stage=3 --nproc=2
    python examples/moe.py --nproc=1 --accumulate=2 --out=runs/moe1
Expect: both print one result. The loss falls, and no expert has much more than an eighth of the rows.
Found: loss 0.22 after 300 updates; the busiest expert has 0.15 to 0.20 of the rows, on one process.

Source: Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv 2408.15664.
"""

import torch
from torch import nn

import funczero as fz

INPUTS, WIDTH, EXPERTS, TOP = 8, 32, 8, 2


def spread(loads, weights, bias, rate=0.01):
    """The bias goes up for experts with few rows, and down for those with many.

    loads [micro-batches, experts], weights [micro-batches], bias [experts].
    """
    load = loads.sum(0)
    return bias + rate * (load.mean() - load).sign()


class Routed(nn.Module):
    """Every row goes to the experts of its highest scores; the bias has a say in who, but none in how much."""

    def __init__(self):
        super().__init__()
        layer = lambda: nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), nn.ModuleList(layer() for _ in range(EXPERTS))
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, x):
        scores, out = self.router(x).sigmoid(), torch.zeros_like(x)
        chosen = (scores + self.bias).topk(TOP).indices
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).any(1).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * scores[rows, i, None])
        self.bias.copy_(chosen.flatten().bincount(minlength=EXPERTS))  # what the rule is given
        return x + out


def loss(net, batch):
    """The error, and how many rows each expert had."""
    return (net(batch["x"]) - batch["y"]).square().sum(), len(batch["y"]), {"load": net[1].bias}


def tasks(rows, seed):
    """Rows of twelve clusters, a few of them large; each has a function of its own."""
    g = torch.Generator().manual_seed(0)
    centers, slopes = 2 * torch.randn(12, INPUTS, generator=g), torch.randn(12, INPUTS, generator=g)
    g = torch.Generator().manual_seed(seed)
    which = (12 * torch.rand(rows, generator=g) ** 3).long()
    near = torch.randn(rows, INPUTS, generator=g)
    return {"x": centers[which] + 0.5 * near, "y": (near * slopes[which]).sum(1).tanh()}


def begin(run):
    net = nn.Sequential(nn.Linear(INPUTS, WIDTH), Routed(), nn.Linear(WIDTH, 1), nn.Flatten(0))
    loss_fn, params = fz.stateless(net, loss, state=[("bias$", spread)])
    grad = fz.value_and_grad(loss_fn, batch=fz.P(run.axis), has_aux=[("load", "sum")])
    step = run.train_step(grad, fz.adamw(3e-3))
    numbers = lambda m: {"busiest": (m.aux["load"].max() / m.aux["load"].sum()).item()}
    return fz.Experiment(step, params, lambda n: tasks(run.batch, run.seed + 1 + n), numbers=numbers)


if __name__ == "__main__":
    fz.experiment(begin, rows="rows", steps=300, batch=256)
