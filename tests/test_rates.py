"""Rates by number, schedule, rule and tree: exact, reported, and refused by the leaf that they miss."""

from __future__ import annotations

import pytest
import torch
import zoo
from optimizers import F32, F64, by_path, close, masters, torchs

import funczero as fz
from funczero import tree
from funczero.layout.lazy import lazy
from funczero.optim.rates import Rates
from funczero.transforms.formula import pieces

RULES = [(r"blocks/1|head/b", 3e-2), ("embed", 0.0), (r"/w$", fz.schedules.warmup_cosine(1e-2, 2, 8)), ("", 1e-2)]
DECAYS = [(r"/b$|norm|gain", 0.0), ("", 0.2)]


def rated(kind):
    """Runs with rates by rule, by tree, and by hand."""
    lr = RULES if kind == "rules" else by_path(lambda n: tree.rule(RULES, "norm" if n == "head/scale" else n, None))
    decay = (
        DECAYS if kind == "rules" else by_path(lambda n: tree.rule(DECAYS, "norm" if n == "head/scale" else n, None))
    )
    return {
        make.__name__: [zoo.tree_hash(masters(make(lr, weight_decay=decay), stage, F64)[0]) for stage in range(4)]
        for make in (fz.adamw, fz.sgd)
    }


def test_rules_and_trees_of_rates_are_one_thing(run_world):
    rules = rated("rules")
    assert rules == rated("tree") == zoo.everywhere(run_world, 2, rated, "rules") and all(
        len(set(h)) == 1 for h in rules.values()
    )


class Scheduled(torch.optim.AdamW):
    """torch's AdamW with a group a leaf, whose rates may be schedules of its own steps."""

    def __init__(self, leaves):
        names = [n for n, _ in tree.paths(zoo.params()) if n != "head/scale"]  # tied: named by its first path
        rate = lambda rules, n: tree.rule(rules, n, None)
        super().__init__(
            [
                {"params": [x], "weight_decay": rate(DECAYS, n), "rate": rate(RULES, n)}
                for n, x in zip(names, leaves, strict=True)
            ]
        )
        self.steps = 0

    def step(self, closure=None):
        for group in self.param_groups:
            rate = group["rate"]
            group["lr"] = rate(torch.tensor(self.steps)).item() if callable(rate) else rate
        self.steps += 1
        return super().step(closure)


def test_each_leaf_has_its_own_rate():
    close(masters(fz.adamw(RULES, weight_decay=DECAYS), dtype=F64)[0], torchs(Scheduled), 1e-13)


def test_a_rate_follows_applied_updates_and_is_reported():
    schedule = fz.schedules.warmup_cosine(1e-2, 4, 10)
    _, log, _ = masters(fz.adamw(schedule), updates=6)
    assert [m.lr.item() for m in log] == pytest.approx(
        [schedule(torch.tensor(u)).item() for u in (0, 1, 2, 3, 3, 4)]
    )  # update 3 was skipped
    assert [int(m.updates) for m in log] == [1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize(
    ("lr", "shown"), [(0.25, 0.25), (RULES, 1e-2), (lambda u: torch.tensor(0.5), 0.5), ([("", 0.125)], 0.125)]
)
def test_the_rate_shown_is_the_number_or_the_default(lr, shown):
    for make in (fz.adamw, fz.sgd):
        assert masters(make(lr), updates=1)[1][0].lr.item() == shown


def test_a_tree_of_rates_is_shown_as_nan():
    assert masters(fz.sgd(by_path(lambda n: 0.1)), updates=1)[1][0].lr.isnan()


def test_leaves_of_one_rate_share_a_kernel_call():
    x = lazy(zoo.params(), ("blocks",), {}, lambda path: False, torch.device("cpu")).at((), F32)

    def called(lr, decay):
        rate = Rates("adamw", lr=lr, weight_decay=decay)
        read = rate.read(torch.zeros(()), rate.init(x), x, torch.ones((), dtype=torch.bool), False)
        return [(g.rates["lr"], g.rates["weight_decay"], pieces((x, x, x), g.leaves)) for g in read.groups], read.lr

    ((_, _, (buffers, _, _)),), shown = called(0.1, 0.2)
    assert len(buffers) == len(x.buffers) and shown == 0.1
    by_rule, _ = called([("blocks", 1.0), ("", 2.0)], DECAYS)
    assert sorted((a, d) for a, d, _ in by_rule) == [(1.0, 0.0), (1.0, 0.2), (2.0, 0.0), (2.0, 0.2)]
    assert sum(t.numel() for _, _, (p, *_) in by_rule for t in p) == sum(b.numel() for b in x.buffers)


def test_moments_are_one_hash_however_leaves_are_rated():
    """Rules that say the same for every leaf go slot by slot, and one number by whole buffers: the same bits."""
    runs = [
        masters(make, dtype=F32)[0]
        for make in (fz.adamw(1e-2, weight_decay=0.1), fz.adamw([("w", 1e-2), ("", 1e-2)], weight_decay=[("", 0.1)]))
    ]
    assert zoo.tree_hash(runs[0]) == zoo.tree_hash(runs[1])
