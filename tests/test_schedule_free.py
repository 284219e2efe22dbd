"""optim/schedule_free.py beside the tables of optimizers: its average, warmups, partitions, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero.testing import tree_hash


def by_hand(lrs, b1=0.9):
    """SGD on (w - 3)^2 / 2 from 0: y and x of the paper, weighted by the square of the largest rate so far."""
    x = y = z = 0.0
    total = largest = 0.0
    for lr in lrs:
        largest = max(largest, lr)
        total += largest**2
        z -= lr * (y - 3)
        x += (z - x) * largest**2 / total
        y = (1 - b1) * z + b1 * x
    return y, x


def test_a_warmup_weighs_what_it_moves():
    loss_fn = lambda p, b: (((p["w"] - 3) ** 2 / 2).sum() * len(b), torch.tensor(float(len(b))))
    warmup = lambda n: 0.5 * torch.clamp((n + 1) / 4, max=1.0)
    step = fz.train_step(fz.value_and_grad(loss_fn), fz.schedule_free_sgd(warmup), policy="float64")
    state = step.init({"w": torch.zeros((), dtype=torch.float64)})
    for _ in range(7):
        state, _ = step(state, torch.ones(2))
    y, x = by_hand([min(0.5, 0.125 * (n + 1)) for n in range(7)])
    assert step.params(state)["w"].item() == pytest.approx(y, rel=1e-12)
    assert step.params(fz.eval_params(state))["w"].item() == pytest.approx(x, rel=1e-12)


def trained(stage, size):
    some = fz.partition([("blocks", fz.schedule_free_adamw(1e-2)), ("", fz.adamw(1e-2))])
    chain = fz.zero(zoo.source(), some, stage=stage, accumulate=zoo.FEW // size)
    masters, _, state, step = zoo.train(chain, {"data": size})
    found = step.params(fz.eval_params(state))
    same = {n: torch.equal(x, y) for (n, x), (_, y) in zip(fz.tree.paths(masters), fz.tree.paths(found), strict=True)}
    assert all(equal == ("blocks" not in n or not dict(fz.tree.paths(masters))[n].numel()) for n, equal in same.items())
    return tree_hash(found)


def test_one_hash_of_averages_in_a_partition(run_world):
    want = trained(0, 1)
    assert {trained(3, 1), *run_world(2, trained, 1, 2), *run_world(2, trained, 3, 2)} == {want}


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fz.schedule_free_adamw([("w", 0.1), ("", 0.2)]), TypeError, "the average weighs all alike"),
        (lambda: fz.schedule_free_adamw(0.1, b1=0.0), ValueError, "schedule_free_adamw: b1=0.0 is not above 0"),
        (lambda: fz.schedule_free_sgd(0.1, momentum=1.0), ValueError, "schedule_free_sgd: momentum=1.0 is not below 1"),
        (lambda: fz.schedule_free_adamw(0.1, eps=0.0), ValueError, "eps"),
    ],
)
def test_what_cannot_be_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_a_chain_without_one_is_told():
    step = fz.train_step(zoo.source(), fz.all_reduce("data"), fz.adamw(1e-2), mesh={"data": 1})
    with pytest.raises(KeyError, match="eval_params: no optimizer of this chain is schedule-free"):
        fz.eval_params(step.init(zoo.params()))
