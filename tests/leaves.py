"""Optimizers that read whole leaves: the table, runs of the zoo and of one leaf whose gradients are given."""

from __future__ import annotations

import torch
import zoo

import funczero as fz
from funczero.layout.processes import world_size
from funczero.testing import tree_hash

MUON = dict(lr=0.02, momentum=0.9, weight_decay=0.1)


def with_muon(**kw):
    """Muon for matrices, as nanochat has it, and AdamW for the rest."""
    return fz.partition([(fz.matrices(but="embed"), fz.muon(**(MUON | kw))), ("", fz.adamw(3e-3))])


TX = {
    "lamb": fz.lamb(1e-2, weight_decay=0.1, high=10.0),
    "lars": fz.lars([("blocks", 3.0), ("", 1.0)], weight_decay=0.1),
    "muon": with_muon(small=0),
    "muon, small leaves by all": with_muon(small=36),
    "muon, flattened": with_muon(flatten=3, dtype=torch.float32, small=0, nesterov=False),
    "adafactor": fz.adafactor(0.05, small=0, weight_decay=0.1),
    "shampoo": fz.partition(
        [(fz.matrices(but="embed"), fz.shampoo(0.1, 0.9, 0.1, every=2, small=0)), ("", fz.adamw(3e-3))]
    ),
    "soap": fz.partition(
        [(fz.matrices(but="embed"), fz.soap(0.01, every=2, weight_decay=0.1, small=0)), ("", fz.adamw(3e-3))]
    ),
    "muon, rates by rule": with_muon(lr=[("blocks/1", 0.01), ("", 0.03)], small=0, scale="match_rms_adamw"),
}


def trained(tx, stage=3, updates=4, donate=False, mesh=None, parts=None, **kw):
    """A run of the zoo, whose fourth and last update is skipped."""
    made = parts or (lambda k: fz.zero(zoo.source(**kw), tx, stage=stage, accumulate=k))
    step = fz.train_step(*made(zoo.FEW // world_size()), mesh=mesh or {"data": -1})
    step = fz.donate(step) if donate else step
    state = step.init(zoo.params())
    for t in range(updates):
        state, _ = step(state, step.local_rows(zoo.batch(t)))
    return step, state


def masters(*args, **kw):
    step, state = trained(*args, **kw)
    return tree_hash(step.params(state))


def directly(tx, grads, start):
    """A run in a step whose gradients are exactly the given ones."""
    step = fz.train_step(
        fz.value_and_grad(lambda p, b: ((p["w"] * b["g"][0]).sum(), torch.ones(()))),
        tx,
        policy=str(start.dtype).removeprefix("torch."),
    )
    state, out = step.init({"w": start}), []
    for g in grads:
        state, _ = step(state, {"g": g[None]})
        out.append(step.params(state)["w"])
    return out


def drawn(*shape, updates=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=dtype) for _ in range(updates)], torch.randn(
        shape, generator=g, dtype=dtype
    )


def going_on(step, state, updates):
    for t in updates:
        state, _ = step(state, step.local_rows(zoo.batch(t)))
    return tree_hash(step.params(state))
