"""Rates by number, schedule, rule and tree: exact, reported, and refused by the leaf that they miss."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from optimizers import F32, F64, close, masters, torchs

import funczero as fz
from funczero import tree
from funczero.layout.lazy import lazy
from funczero.optim.rate import value_at
from funczero.optim.rates import Rates
from funczero.transforms.formula import pieces


def test_rates_are_exact_doubles():
    """A schedule may return a Python number, which is never rounded to float32; and an unmodified get_lr gives its own
    numbers.
    """

    def get_lr(it, learning_rate=6e-4, warmup_iters=5, lr_decay_iters=50, min_lr=6e-5):
        if it < warmup_iters:
            return learning_rate * (it + 1) / (warmup_iters + 1)
        if it > lr_decay_iters:
            return min_lr
        decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
        coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
        return min_lr + coeff * (learning_rate - min_lr)

    for n in range(60):
        assert value_at("adamw", "lr", get_lr, torch.tensor(float(n))) == get_lr(n)
    table = [0.1, 0.3]
    for schedule, want in [
        (lambda u: 0.1, 0.1),
        (lambda u: table[u], 0.3),
        (lambda u: u / 3, 1 / 3),
        (lambda u: torch.cos(u) ** 2, math.cos(1) ** 2),
        (lambda u: u, 1.0),
    ]:
        assert masters(fz.sgd(schedule), updates=2)[1][1].lr.item() == want


def test_a_schedule_is_handed_an_int64_count():
    seen = []

    def schedule(updates):
        seen.append((updates.dtype, updates.dim(), int(updates)))
        return 0.1

    masters(fz.adamw(schedule), updates=3)
    assert seen == [(torch.int64, 0, n) for n in range(3)]  # read once an update


def by_path(rate):
    """A tree of rates like the zoo's parameters."""
    return tree.unflatten([rate(n) for n, _ in tree.paths(zoo.params())], tree.flatten(zoo.params())[1])


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


@pytest.mark.parametrize(
    ("lr", "error", "words"),
    [
        ([("blocks", 1.0)], ValueError, "lr: no rule matches parameter 'embed'; end the rules with"),
        ({"embed": 1.0}, TypeError, "lr: dict is neither a number, a schedule, rules"),
        (
            [("blocks", 1.0), ("haed", 2.0), ("", 0.1)],
            ValueError,
            "adamw: lr: the rule 'haed' is found in no parameter's path; correct it or leave it out",
        ),
        (
            [("", 0.1), ("conv", 0.0)],
            ValueError,
            (
                "adamw: lr: the rule 'conv' never counts, because a rule before it takes 'conv' and all else that it"
                " matches; put it first"
            ),
        ),
        (
            by_path(lambda n: 0.5 if n == "head/scale" else 1.0),
            ValueError,
            "adamw: lr: the tree says two things of one tied parameter, norm = head/scale; write the same",
        ),
    ],
)
def test_rates_that_fit_no_leaf_are_named_at_init(lr, error, words):
    """In the fused form and in the plain one, as rate and as decay, alike."""
    for tx in (
        fz.adamw(lr),
        fz.lift((fz.adamw(lr).init, fz.adamw(lr).update), elementwise=True),
        fz.adamw(0.1, weight_decay=lr),
        fz.from_torch("RMSprop", 0.1, lr),
    ):
        step = fz.train_step(*fz.zero(zoo.source(), tx, stage=1), mesh={"data": 1})
        with pytest.raises(error) as caught:
            step.init(zoo.params())
        assert words.split(": lr: ")[-1].removeprefix("lr: ") in str(caught.value)


def test_a_rule_may_name_a_tied_leaf_by_any_of_its_paths():
    for dtype in (F32, F64):
        by_first, by_second = ([(path, 0.0), ("", 0.1)] for path in ("^norm$", "^head/scale$"))
        runs = [
            masters(tx, dtype=dtype)[0]
            for r in (by_first, by_second)
            for tx in (fz.sgd(r), fz.lift((fz.sgd(r).init, fz.sgd(r).update), elementwise=True))
        ]
        assert all(torch.equal(run[n], zoo.params(dtype)["norm"]) for run in runs for n in ("norm", "head/scale"))
        assert all(not torch.equal(run["gain"], zoo.params(dtype)["gain"]) for run in runs)


def test_a_rule_that_says_what_holds_anyway_is_welcome():
    """Recipes name norms and biases, whichever come first."""
    rule = [("norm", 0.0), ("blocks/.*/b$", 0.0), ("blocks/0/b", 0.0), ("", 0.1), (".*", 0.2)]
    masters(fz.adamw(0.1, weight_decay=rule), updates=1)


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
