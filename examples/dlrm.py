"""A recommender: large tables of embeddings, of which a batch reads a few rows, beside a small dense net.

Shows: rules by path. Tables learn by Adagrad at a rate of their own, `[("tables", 0.3), ("", 0.02)]`. A row that no
batch has named has a gradient of zeros, under which Adagrad leaves it as it was. At stage 3 tables are cut by rows, as
any leaf, and are gathered one by one; what travels is the whole table.

Run:
    python examples/dlrm.py --stage=3 --nproc=2
    python examples/dlrm.py --nproc=1 --accumulate=2 --out=runs/dlrm1
Expect: both print one result. The held-out loss falls below log 2, and rows of rare users stay where they are.
Found: the first eight losses are plain torch's to 2e-7, at stages 0 and 3 on one and two processes;
    held out 0.597 after 200 updates, on one process; 0.70 of the users' rows have moved.
"""

import torch
import torch.nn.functional as F
from torch import nn

import funczero as fz

SIZES, TASTES, WIDTH = (20000, 500), 3, 8  # users, items; numbers of a taste; of an embedding


def clicks(rows, seed):
    """Who saw what and at what hour, and whether it was clicked: by tastes that nobody is told. Few are seen often."""
    tastes = [torch.randn(n, TASTES, generator=torch.Generator().manual_seed(n)) for n in SIZES]
    g = torch.Generator().manual_seed(seed)
    chosen = torch.stack([(n * torch.rand(rows, generator=g) ** 4).long() for n in SIZES], 1)
    hour = torch.rand(rows, 1, generator=g)
    liked = 2 * (tastes[0][chosen[:, 0]] * tastes[1][chosen[:, 1]]).sum(1) + 4 * hour[:, 0] - 2
    return {"chosen": chosen, "hour": hour, "clicked": torch.bernoulli(liked.sigmoid(), generator=g)}


class DLRM(nn.Module):
    """Products of all pairs of embeddings, and a net above."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, WIDTH) for n in SIZES)
        self.dense = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, WIDTH))
        self.above = nn.Sequential(nn.Linear(WIDTH + 3, 16), nn.ReLU(), nn.Linear(16, 1))
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, chosen, hour):
        dense = self.dense(hour)
        rows = torch.stack([dense, *(table(i) for table, i in zip(self.tables, chosen.T))], 1)
        i, j = torch.tril_indices(3, 3, -1)
        return self.above(torch.cat([dense, (rows @ rows.mT)[:, i, j]], 1))[:, 0]


def loss(net, batch):
    logits = net(batch["chosen"], batch["hour"])
    return F.binary_cross_entropy_with_logits(logits, batch["clicked"], reduction="sum"), len(logits)


def begin(run):
    loss_fn, params = fz.stateless(DLRM(), loss, units=["tables"])
    adagrad = fz.adagrad([("tables", 0.3), ("", 0.02)])
    step = run.train_step(fz.value_and_grad(loss_fn, batch=fz.P(run.axis)), adagrad)
    held, ask = clicks(4096, run.seed + 1), step.eval(loss_fn)

    def evaluate(state):
        now = step.params(state)
        moved = {n: (now[n] != x).any(1).float().mean() for n, x in params.items() if n.startswith("tables")}
        names = zip(("users_moved", "items_moved"), moved.values())
        return {"held_out": ask(state, step.local_rows(held)).loss.item(), **{n: x.item() for n, x in names}}

    return fz.Experiment(step, params, lambda n: clicks(run.batch, run.seed + 2 + n), evaluate=evaluate)


if __name__ == "__main__":
    fz.experiment(begin, rows="rows", steps=200, batch=256)
