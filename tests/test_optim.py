"""Optimizers: torch's own, an oracle in plain arithmetic, rates by rule, tree and schedule, and optax's pair by hand."""
from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import zoo

import funczero as fz
from funczero import P, tree
from funczero.optim import rates

MESH = {"data": -1}
F32, F64 = torch.float32, torch.float64


def masters(tx, stage=3, dtype=F32, updates=4, policy=None, batch=zoo.batch, **kw):
    """Whole masters after some updates of the zoo, and its metrics."""
    parts = fz.zero(zoo.source(), tx, stage=stage, accumulate=zoo.MICROS // fz.mesh.world_size())
    got, log, state, _ = zoo.train(parts, MESH, dtype=dtype, updates=updates, policy=policy or str(dtype).removeprefix("torch."), **kw)
    return dict(tree.paths(got)), log, state


def torchs(make, updates=4, dtype=F64):
    """The same by torch.optim, unsharded."""
    p = zoo.params(dtype)
    unique = list({id(x): x.requires_grad_() for x in tree.leaves(p)}.values())
    optimizer = make(unique)
    for t in [t for t in range(updates) if t != zoo.BAD]:
        loss, weight = zoo.loss_plain(p, zoo.batch(t, dtype))
        for x, g in zip(unique, torch.autograd.grad(loss / weight, unique, allow_unused=True), strict=True):
            x.grad = torch.zeros_like(x) if g is None else g
        optimizer.step()
    return {n: x.detach() for n, x in tree.paths(p)}


def close(a, b, atol):
    for n in b:
        torch.testing.assert_close(a[n], b[n], rtol=0, atol=atol, msg=lambda m, n=n: f"{n}: {m}")


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of the paper, leaf by leaf."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, (b1, b2), decay = group["lr"], group["betas"], group["weight_decay"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                move = torch.sign(b1 * m + (1 - b1) * p.grad) + decay * p
                m.copy_(b2 * m + (1 - b2) * p.grad)
                p.sub_(lr * move)


PAIRS = {
    "adamw": (fz.adamw(1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 1e-2, (0.8, 0.95), 1e-6, 0.1)),
    "adamw, no decay": (fz.adamw(1e-2, weight_decay=0.0), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.0)),
    "sgd": (fz.sgd(0.5), lambda p: torch.optim.SGD(p, 0.5)),
    "momentum": (fz.sgd(0.5, momentum=0.9), lambda p: torch.optim.SGD(p, 0.5, momentum=0.9)),
    "adam": (fz.adam(1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1), lambda p: torch.optim.Adam(p, 1e-2, (0.8, 0.95), 1e-6, 0.1)),
    "adagrad": (fz.adagrad(1e-2, weight_decay=0.1), lambda p: torch.optim.Adagrad(p, 1e-2, weight_decay=0.1)),
    "lion": (fz.lion(1e-2, 0.8, 0.95, weight_decay=0.1), lambda p: Lion(p, 1e-2, (0.8, 0.95), 0.1)),
    "nesterov, decay": (fz.sgd(0.5, 0.9, nesterov=True, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.5, 0.9, nesterov=True, weight_decay=0.1)),
}


OWN = {"RMSprop": dict(momentum=0.9, centered=True), "Rprop": {}, "NAdam": dict(decoupled_weight_decay=True), "Adadelta": {}, "ASGD": dict(t0=2.0), "RAdam": {}, "Adamax": {}}
PAIRS |= {
    f"torch {n}": (fz.from_torch(n, 1e-2, **own, **decay), lambda p, n=n, own=own, decay=decay: getattr(torch.optim, n)(p, lr=1e-2, foreach=False, **own, **decay))
    for n, own in OWN.items()
    for decay in [{} if n == "Rprop" else {"weight_decay": 0.1}]
}
SIGNS = ("lion", "torch Rprop")  # a sign near zero differs in float32


@pytest.mark.parametrize("name", PAIRS)
def test_an_optimizer_is_torchs(name):
    tx, make = PAIRS[name]
    want = torchs(make)
    close(masters(tx, dtype=F64)[0], want, 1e-13)
    if name not in SIGNS:
        close(masters(tx)[0], {n: x.float() for n, x in want.items()}, 2e-6 if name in ("sgd", "momentum", "nesterov, decay") else 2e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(F64, 1e-13), (F32, 1e-6)])
@pytest.mark.parametrize("name", PAIRS)
def test_the_fused_form_is_the_plain_one(name, dtype, atol):
    """`update` in plain arithmetic, lifted, is the oracle of `apply`."""
    tx, _ = PAIRS[name]
    close(masters(tx, dtype=dtype)[0], masters(fz.lift((tx.init, tx.update)), dtype=dtype)[0], atol)


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
    close(masters(fz.lift((tx.init, tx.update)), dtype=F64)[0], masters(tx, dtype=F64)[0], 1e-13)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fz.from_torch("Muon", 1e-3), "from_torch: torch.optim.Muon is not known to work value by value; write one of ASGD"),
        (lambda: fz.from_torch("RMSprop", 1e-3, betas=(0, 1)), "from_torch: torch.optim.RMSprop takes no 'betas' here; write some of"),
        (lambda: fz.from_torch("RMSprop", [("", 1.0)]), "from_torch: lr is a list, but these classes keep one number for all leaves"),
        (lambda: fz.lion(1e-3, b1=1.0), r"lion: b1=1.0, b2=0.99 must lie in \[0, 1\)"),
        (lambda: fz.adagrad(1e-3, eps=0.0), "adagrad: eps=0.0 must be positive"),
        (lambda: fz.adam(1e-3, b2=1.0), r"adam: b1=0.9, b2=1.0 must lie in \[0, 1\)"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


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
        hand, fused = (masters(tx, stage, dtype)[0] for tx in (fz.lift((by_hand_init, by_hand_update)), fz.adamw(**zoo.TX)))
        out.append((max((hand[n] - fused[n]).abs().max().item() for n in hand if hand[n].numel()), zoo.tree_hash(hand)))
    return out


@pytest.mark.parametrize(("dtype", "atol"), [(F64, 1e-13), (F32, 1e-6)])
def test_a_pair_by_hand_is_adamw_at_every_stage(run_world, dtype, atol):
    for world in (1, 2):
        found = zoo.everywhere(run_world, world, lifted, dtype)
        assert max(d for d, _ in found) < atol


def test_an_integer_in_a_lifted_state_may_stay_one():
    _, _, state = masters(fz.lift((by_hand_init, by_hand_update), name="mine"))
    assert state.chain["mine"].count == 4 and [*state.chain] == ["mine"]


def test_a_lifted_pair_sees_parts_and_is_tried_on_parts():
    shapes = []

    def init(params):
        shapes.append(sorted(tuple(x.shape) for x in tree.leaves(params)))
        return ()

    tx = fz.lift((init, lambda u, s, p: (tree.map(lambda g: -g, u), s)), name="descend")
    assert shapes[0] == [(8,), (8, 6)] and shapes[1] == [(3,), (3, 6)] and tx.name == "descend" and tx.elementwise
    fz.lift((init, lambda u, s, p: (u, s)), elementwise=True)  # trusted
    assert len(shapes) == 3


# --- rates ------------------------------------------------------------------------------------------------------------
def by_path(rate):
    """A tree of rates like the zoo's parameters."""
    return tree.unflatten([rate(n) for n, _ in tree.paths(zoo.params())], tree.flatten(zoo.params())[1])


RULES = [(r"blocks/1|head/b", 3e-2), ("embed", 0.0), (r"/w$", fz.schedules.warmup_cosine(1e-2, 2, 8)), ("", 1e-2)]
DECAYS = [(r"/b$|norm|gain", 0.0), ("", 0.2)]


def rated(kind):
    """Runs with rates by rule, by tree, and by hand."""
    lr = RULES if kind == "rules" else by_path(lambda n: tree.rule(RULES, "norm" if n == "head/scale" else n, None))
    decay = DECAYS if kind == "rules" else by_path(lambda n: tree.rule(DECAYS, "norm" if n == "head/scale" else n, None))
    return {make.__name__: [zoo.tree_hash(masters(make(lr, weight_decay=decay), stage, F64)[0]) for stage in range(4)] for make in (fz.adamw, fz.sgd)}


def test_rules_and_trees_of_rates_are_one_thing(run_world):
    rules = rated("rules")
    assert rules == rated("tree") == zoo.everywhere(run_world, 2, rated, "rules") and all(len(set(h)) == 1 for h in rules.values())


class Scheduled(torch.optim.AdamW):
    """torch's AdamW with a group a leaf, whose rates may be schedules of its own steps."""

    def __init__(self, leaves):
        names = [n for n, _ in tree.paths(zoo.params()) if n != "head/scale"]  # tied: named by its first path
        rate = lambda rules, n: tree.rule(rules, n, None)
        super().__init__([{"params": [x], "weight_decay": rate(DECAYS, n), "rate": rate(RULES, n)} for n, x in zip(names, leaves, strict=True)])
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
    assert [m.lr.item() for m in log] == pytest.approx([schedule(torch.tensor(u)).item() for u in (0, 1, 2, 3, 3, 4)])  # update 3 was skipped
    assert [int(m.updates) for m in log] == [1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize(("lr", "shown"), [(0.25, 0.25), (RULES, 1e-2), (lambda u: torch.tensor(0.5), 0.5), ([("", 0.125)], 0.125)])
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
        (by_path(lambda n: True if n == "conv" else 1.0), TypeError, "lr: the value for parameter 'conv' is neither a number nor a schedule"),
    ],
)
def test_rates_that_fit_no_leaf_are_named(lr, error, words):
    with pytest.raises(error, match=words):
        masters(fz.adamw(lr), updates=1)


def test_leaves_of_one_rate_share_a_kernel_call():
    x = fz.spec.lazy(zoo.params(), ("blocks",), {}, lambda path: False, torch.device("cpu")).at((), F32)
    assert len(rates.groups(0.1, 0.2, x, x)) == 1 and len(rates.groups(0.1, 0.2, x, x)[0][2][0]) == len(x.buffers)
    by_rule = rates.groups([("blocks", 1.0), ("", 2.0)], DECAYS, x, x, x)
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
    runs = [masters(make, dtype=F32)[0] for make in (fz.adamw(1e-2, weight_decay=0.1), fz.adamw([("w", 1e-2), ("", 1e-2)], weight_decay=[("", 0.1)]))]
    assert zoo.tree_hash(runs[0]) == zoo.tree_hash(runs[1])


def test_adamw_counts_in_its_own_state():
    step = fz.train_step(fz.value_and_grad(lambda p, b: ((p * b["x"]).sum(), torch.ones(())), batch=P("data")), fz.shard("data", fz.adamw(0.1)), mesh={"data": 1})
    state = step.init(torch.zeros(3))
    for x in (1.0, torch.nan, 1.0):
        state, _ = step(state, {"x": torch.tensor([x])})
    assert state.chain["adamw"].count == 2 == int(state.updates) and int(state.step) == 3
