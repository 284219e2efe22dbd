"""Optimizers: torch's own, an oracle in plain arithmetic, rates by rule, tree and schedule, and optax's pair by hand."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import zoo
from optimizers import F32, F64, ORACLES, PAIRS, close, masters, torchs

import funczero as fz
from funczero import P, tree
from funczero.layout.lazy import lazy
from funczero.optim.rate import value_at
from funczero.optim.rates import Rates
from funczero.transforms.formula import pieces

SIGNS = ("lion", "torch Rprop")  # a sign near zero differs in float32


@pytest.mark.parametrize("name", PAIRS)
def test_an_optimizer_is_torchs(name):
    tx, make = PAIRS[name]
    want = torchs(make)
    close(masters(tx, dtype=F64)[0], want, 1e-13)
    if name not in SIGNS:
        close(
            masters(tx)[0],
            {n: x.float() for n, x in want.items()},
            2e-6 if name in ("sgd", "momentum", "nesterov, decay") else 2e-5,
        )


SINGLE = [name for name in PAIRS if name != "a partition"]


@pytest.mark.parametrize(("dtype", "atol"), [(F64, 1e-13), (F32, 1e-6)])
@pytest.mark.parametrize("name", SINGLE)
def test_the_fused_form_is_the_plain_one(name, dtype, atol):
    """The formula is plain arithmetic's, and the pair that is made of it gives its values."""
    tx, got = PAIRS[name][0], masters(PAIRS[name][0], dtype=dtype)[0]
    close(got, masters(fz.lift((tx.init, tx.update), elementwise=True), dtype=dtype)[0], atol)
    if name in ORACLES:
        close(got, masters(ORACLES[name], dtype=dtype)[0], atol)


def test_the_pairs_updates_keep_what_a_large_parameter_would_round_away():
    """Its updates are differences in float64, as an optimizer further right reads them."""
    tx = fz.adamw(1e-9, weight_decay=0.0)
    params = {"w": torch.ones(16)}
    updates, state = tx.update({"w": torch.full((16,), 0.5)}, tx.init(params), params)
    torch.testing.assert_close(updates["w"], torch.full((16,), -1e-9), rtol=1e-6, atol=0)
    assert state.count == 1 and state.mu["w"].dtype == torch.float32 and torch.equal(params["w"], torch.ones(16))


def staged(name):
    """By stage: one hash of the masters, on ranks that hold little or nothing of a leaf."""
    tx = PAIRS[name][0]
    return [zoo.tree_hash(masters(tx, stage)[0]) for stage in range(4)]


@pytest.mark.parametrize("name", ["adam", "adagrad", "lion", "torch RMSprop", "torch NAdam", "torch ASGD"])
def test_an_optimizer_gives_one_hash_at_every_stage_and_world(run_world, name):
    alone = staged(name)
    assert len(set(alone)) == 1 and zoo.everywhere(run_world, 2, staged, name) == alone


def test_a_momentum_may_be_a_schedule():
    """Adam's kernel with beta 1 as written into torch's groups before every step."""
    beta = fz.schedules.one_cycle_momentum(0.7, 0.95, 2)

    class Cycled(torch.optim.AdamW):
        n = 0

        def step(self, closure=None):
            self.param_groups[0]["betas"] = (beta(torch.tensor(self.n)).item(), 0.99)
            self.n += 1
            return super().step(closure)

    tx = fz.adamw(1e-2, b1=beta, b2=0.99)
    close(masters(tx, dtype=F64)[0], torchs(lambda p: Cycled(p, 1e-2, foreach=False)), 1e-13)
    close(masters(fz.lift((tx.init, tx.update), elementwise=True), dtype=F64)[0], masters(tx, dtype=F64)[0], 1e-13)


def test_rates_are_exact_doubles():
    """A schedule may return a Python number, which is never rounded to float32; and an unmodified get_lr gives its own numbers."""

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


BAD_VALUES = {
    "nan": float("nan"), "negative": torch.tensor(-1e-3), "inf": torch.tensor(float("inf"), dtype=F64), "two": torch.zeros(2), "a word": "1e-3", "nothing": None,
    "a bool": torch.tensor(True),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_VALUES)
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adagrad", "from_torch"])
def test_a_schedule_that_gives_nonsense_stops_the_step_before_it_writes(name, kind):
    make = (lambda lr, **kw: fz.from_torch("RMSprop", lr, **kw)) if name == "from_torch" else getattr(fz, name)
    late = lambda u: BAD_VALUES[kind] if u == 2 else 0.1
    for tx, what in [(make(late), "lr"), (make(0.1, weight_decay=[("blocks", 0.1), ("", late)]), "weight_decay")]:
        step = fz.donate(fz.train_step(*fz.zero(zoo.source(), tx, stage=3), mesh={"data": 1}))
        state = step.init(zoo.params())
        for t in range(2):
            state, _ = step(state, zoo.batch(t))
        before = zoo.tree_hash([state.params, state.chain])
        with pytest.raises((TypeError, ValueError), match=f"the schedule.*{what}"):
            step(state, zoo.batch(2))
        assert zoo.tree_hash([state.params, state.chain]) == before


def test_a_beta_that_leaves_its_range_is_told():
    with pytest.raises(
        ValueError,
        match=r"adamw: after 1 applied updates the schedule's value: b1=1.0 is not below 1; write a number in \[0, 1\)",
    ):
        masters(fz.adamw(1e-2, b1=lambda u: 0.9 + 0.1 * u), updates=2)


def test_a_count_at_its_end_is_told():
    with pytest.raises(OverflowError, match="sgd: 16777216 applied updates are the end of a float32 count"):
        value_at("sgd", "lr", lambda u: 0.1, torch.tensor(2.0**24))


def test_a_class_of_torch_has_its_own_defaults():
    for name in ("AdamW", "RMSprop", "Adadelta", "NAdam"):
        close(
            masters(fz.from_torch(name), dtype=F64)[0],
            torchs(lambda p, name=name: getattr(torch.optim, name)(p, foreach=False)),
            1e-13,
        )
    moved = masters(fz.from_torch("AdamW", 0.5), updates=1)[0]["unused"] / zoo.params()["unused"]
    torch.testing.assert_close(moved, torch.full((4,), 1 - 0.5 * 0.01))


class ByHand(NamedTuple):
    """AdamW as somebody writes it against optax: a pair of functions on trees."""

    count: Any
    mu: Any
    nu: Any


def by_hand_init(params):
    return ByHand(0, tree.map(torch.zeros_like, params), tree.map(torch.zeros_like, params))


def by_hand_update(grads, state, params):
    n = state.count + 1
    mu = tree.map(lambda m, g: zoo.B1 * m + (1 - zoo.B1) * g, state.mu, grads)
    nu = tree.map(lambda v, g: zoo.B2 * v + (1 - zoo.B2) * g * g, state.nu, grads)
    step = lambda m, v, p: -zoo.LR * (m / (1 - zoo.B1**n) / ((v / (1 - zoo.B2**n)).sqrt() + zoo.EPS) + zoo.DECAY * p)
    return tree.map(step, mu, nu, params), ByHand(n, mu, nu)


def lifted(dtype):
    """By stage: the pair's masters as a list, and their distance from the fused AdamW's."""
    out = []
    for stage in range(4):
        hand, fused = (
            masters(tx, stage, dtype)[0]
            for tx in (fz.lift((by_hand_init, by_hand_update), elementwise=True), fz.adamw(**zoo.TX))
        )
        out.append((max((hand[n] - fused[n]).abs().max().item() for n in hand if hand[n].numel()), zoo.tree_hash(hand)))
    return out


@pytest.mark.parametrize(("dtype", "atol"), [(F64, 1e-13), (F32, 1e-6)])
def test_a_pair_by_hand_is_adamw_at_every_stage(run_world, dtype, atol):
    for world in (1, 2):
        found = zoo.everywhere(run_world, world, lifted, dtype)
        assert max(d for d, _ in found) < atol


def test_an_integer_in_a_lifted_state_may_stay_one():
    """It does not count a skipped update, so that what follows is still AdamW."""
    hand, _, state = masters(
        fz.lift((by_hand_init, by_hand_update), name="mine", elementwise=True), dtype=F64, updates=6
    )
    assert state.chain["mine"].count == 5 == int(state.updates) and [*state.chain] == ["mine"]
    close(hand, masters(fz.adamw(**zoo.TX), dtype=F64, updates=6)[0], 1e-13)


def writing(where):
    """A pair that writes into what it is given."""

    def update(grads, state, params):
        tree.map(lambda x: x.mul_(0.5), params if where == "params" else state)
        return tree.map(lambda g: -g, grads), state

    return fz.lift((lambda p: tree.map(torch.zeros_like, p), update), "writer", elementwise=True)


ODD_UPDATES = {
    "writes params": (writing("params"), RuntimeError, "writer: its update writes into the parameters, which stay as they were given; return new tensors"),
    "writes state": (writing("state"), RuntimeError, "writer: its update writes into its state, which stay as they were given; return new tensors"),
    "a number": ((lambda p: (), lambda g, s, p: (tree.map(lambda x: 0.0, g), s)), TypeError, "lift: its update of parameter 'embed' is a float; return a tensor of this part's shape"),
    "a scalar that would spread": (
        (lambda p: (), lambda g, s, p: (tree.map(lambda x: x.sum(), g), s)), TypeError, r"lift: its update of parameter 'embed' is a tensor of shape \(\); return",
    ),
    "another tree": ((lambda p: (), lambda g, s, p: ([], s)), TypeError, "lift: its updates are no tree like the parameters"),
    "two updates of a tied leaf": (
        (lambda p: (), lambda g, s, p: ({**g, "norm": -g["norm"] - 1}, s)), ValueError, "lift: it gives the tied parameter 'norm' one update at each of its paths, and they differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("behind", [(), (fz.sgd(1.0),)], ids=["last", "before another"])
@pytest.mark.parametrize("name", ODD_UPDATES)
def test_a_pair_that_does_not_return_updates_is_refused(name, behind):
    pair, error, words = ODD_UPDATES[name]
    tx = pair if isinstance(pair, fz.GradientTransformation) else fz.lift(pair, elementwise=True)
    step = fz.train_step(*fz.zero(zoo.source(), tx, *behind, stage=1), mesh={"data": 1})
    state = step.init(zoo.params())
    with pytest.raises(error, match=words):
        step(state, zoo.batch(0))


def test_a_name_that_would_break_paths_is_refused():
    with pytest.raises(
        ValueError, match="lift: name='a/b' would not tell leaves of the state apart on disk; write a word without"
    ):
        fz.lift((by_hand_init, by_hand_update), "a/b")


def test_a_lifted_pair_is_not_run_before_the_step_and_says_what_it_was_told():
    def init(params):
        raise AssertionError("nothing is tried")

    for told in (None, True, False):
        tx = fz.lift((init, lambda u, s, p: (u, s)), name="descend", elementwise=told)
        assert (tx.name, tx.elementwise) == ("descend", told)
    assert (
        fz.lift(fz.adamw(0.1)).elementwise is True and fz.lift(fz.adamw(0.1), elementwise=False).elementwise is False
    )  # an optimizer says it of itself


class LateTrust(NamedTuple):
    """A pair that works value by value for three updates, and then scales each leaf by its own norm: no probe of three updates sees it."""

    n: Any


LATE = (
    lambda params: LateTrust(0),
    lambda g, s, p: (tree.map(lambda x: -x / (x.square().sum().sqrt() + 1) if s.n >= 3 else -x, g), LateTrust(s.n + 1)),
)


def big_leaves_update(g, state, params):
    """Adafactor's habit: leaves of 128 values and more are treated otherwise."""
    return tree.map(lambda x: -x / (x.square().mean().sqrt() + 1) if x.numel() >= 128 else -x, g), state


@pytest.mark.parametrize(
    "pair", [LATE, (lambda params: (), big_leaves_update)], ids=["a trust ratio that starts late", "a size threshold"]
)
def test_a_pair_that_a_probe_would_trust_is_refused_in_a_bracket(pair):
    for told in (None, False):
        for stage in (1, 2, 3):
            with pytest.raises(
                fz.ChainError, match="lift: (nothing says that it works value by value|it needs whole leaves)"
            ):
                fz.train_step(*fz.zero(zoo.source(), fz.lift(pair, elementwise=told), stage=stage), mesh={"data": 2})
        fz.train_step(*fz.zero(zoo.source(), fz.lift(pair, elementwise=told), stage=0), mesh={"data": 2})
    fz.train_step(*fz.zero(zoo.source(), fz.lift(pair, elementwise=True), stage=3), mesh={"data": 2})  # promised


# --- rates ------------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("policy", ["params=bfloat16,compute=bfloat16", "params=float64,compute=float32"])
def test_masters_and_moments_live_in_the_params_dtype(policy):
    want = fz.Policy.parse(policy).params
    for tx in (fz.adamw(1e-2), fz.sgd(1e-2, momentum=0.9)):
        got, log, state = masters(tx, dtype=torch.bfloat16, policy=policy, updates=2)
        held = [x for x in tree.tensors(next(iter(state.chain.values()))) if x.dim()]
        assert {x.dtype for x in (*got.values(), *held)} == {want} and log[-1].ok


def test_moments_are_one_hash_however_leaves_are_rated():
    """Rules that say the same for every leaf go slot by slot, and one number by whole buffers: the same bits."""
    runs = [
        masters(make, dtype=F32)[0]
        for make in (fz.adamw(1e-2, weight_decay=0.1), fz.adamw([("w", 1e-2), ("", 1e-2)], weight_decay=[("", 0.1)]))
    ]
    assert zoo.tree_hash(runs[0]) == zoo.tree_hash(runs[1])


def test_adamw_counts_in_its_own_state():
    step = fz.train_step(
        fz.value_and_grad(lambda p, b: ((p * b["x"]).sum(), torch.ones(())), batch=P("data")),
        fz.shard("data", fz.adamw(0.1)),
        mesh={"data": 1},
    )
    state = step.init(torch.zeros(3))
    for x in (1.0, torch.nan, 1.0):
        state, _ = step(state, {"x": torch.tensor([x])})
    assert state.chain["adamw"].count == 2 == int(state.updates) and int(state.step) == 3
