"""One rank of a small world in which, from some update on, the last rank does one thing otherwise: `apart.py KIND STAGE
AT CHECK`.

It prints `apart` with the time when it goes apart, and `end` with its last loss where it comes to its end.
"""

from __future__ import annotations

import os
import sys
import time

import torch

import funczero as fz
from funczero import P

ROWS, AFTER = 4, 6  # rows a rank and update; updates after the one at which a rank goes apart
RIGHT = ("none", "rows")  # what is right at every stage
STAGES = {
    "unit": (0, 1, 2),
    "order": (0, 1, 2),
    "count": (0, 1, 2),
    "save": (0,),
}  # where these are right, too: nothing is gathered unit by unit; at stage 0 whole parameters need no other rank
KINDS = (
    "none",
    "unit",
    "order",
    "count",
    "rows",
    "dtype",
    "params",
    "key",
    "rate",
    "chain",
    "step",
    "eval",
    "save",
    "fewer",
    "error",
)


def block(p, x):
    """An expert."""
    return torch.tanh(x @ p["w"])


def loss_fn(params, batch):
    """Experts named by the batch, one after another."""
    if int(batch["fails"][0]):
        raise ValueError("bad sample 17")
    x = batch["x"] @ params["w1"]
    for e in batch["route"][0].tolist():
        x = x + fz.layers(block, [params["experts"][e]], x) if e >= 0 else x
    return (x - batch["y"]).square().sum(), torch.tensor(float(len(x)))


def params():
    """The same on every rank."""
    g = torch.Generator().manual_seed(0)
    return {
        "w1": torch.randn(8, 8, generator=g) / 3,
        "experts": [{"w": torch.randn(8, 8, generator=g) / 3} for _ in range(3)],
    }


def batch(t, rank, kind, at):
    """The rows of one rank at one update; kinds that are a matter of data go apart here."""
    g, odd = torch.Generator().manual_seed(1000 * t + rank), rank == 1 and t >= at
    route = {"unit": (0, 2, -1), "order": (1, 0, -1), "count": (0, 1, 2)}.get(kind, (0, 1, -1)) if odd else (0, 1, -1)
    n = ROWS - 1 if odd and kind == "rows" and t == at else ROWS
    return {
        "x": torch.randn(ROWS, 8, generator=g)[:n], "y": torch.randn(ROWS, 8, generator=g)[:n],
        "route": torch.tensor([route] * n), "fails": torch.full((n,), int(odd and kind == "error")),
    }  # fmt: skip


def make(stage, check, lr=1e-2, limit=1.0, policy=None, loss=loss_fn, mesh=None):
    """A step."""
    grad = fz.value_and_grad(loss, batch=P("data"), units=("experts",), conditional=())
    return fz.train_step(
        *fz.zero(grad, fz.clip_by_global_norm(limit), fz.adamw(lr), stage=stage),
        mesh=mesh or {"data": -1},
        policy=policy,
        check=check,
    )


def reference(kind, at):
    """The last loss of one process that has the rows of both ranks."""

    def both(params, batches):
        (a, n), (b, m) = (loss_fn(params, x) for x in batches)
        return a + b, n + m

    step = make(0, 0, loss=both, mesh={"data": 1})
    state = step.init(params())
    for t in range(at + AFTER):
        state, m = step(state, [batch(t, r, kind, at) for r in range(2)])
    return m.loss.item()


def main(kind, stage, at, check, said=print):
    """The run of one rank; its last loss."""
    odd = int(os.environ["RANK"]) == 1
    rank = int(odd)
    lr = (lambda n: 1e-2 * (2 if odd and int(n) >= at else 1)) if kind == "rate" else 1e-2
    step = make(stage, check, lr)
    state, m = step.init(params()), None
    for t in range(at + AFTER):
        if t == at:
            said("apart", time.time(), flush=True)
        if t == at and odd and kind in ("chain", "dtype"):
            step = make(
                stage,
                check,
                limit=2.0 if kind == "chain" else 1.0,
                policy="compute=bfloat16" if kind == "dtype" else None,
            )
            step.running()
        if t == at and kind == "params":
            state = step.init(fz.tree.map(lambda x: x + odd, params()))
        if t == at and odd:
            if kind == "key":
                state = state._replace(key=state.key + 1)
            if kind == "step":
                state = state._replace(step=state.step + 1)
            if kind == "eval":
                step.eval(loss_fn)(state, batch(t, rank, "none", at))
            if kind == "save":
                step.params(state)
            if kind == "fewer":
                return m.loss.item()
        state, m = step(state, batch(t, rank, kind, at))
    return m.loss.item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("end", main(sys.argv[1], *map(int, sys.argv[2:5])), flush=True)
