"""Every optimizer of the table is torch's own class, at every stage, on any world, with units and without, frozen
leaves and skips included.
"""

from __future__ import annotations

import random

import pytest
import torch
import zoo
from cover import EACH
from optimizers import F64, MICROS, PAIRS, Lion, masters, plain_adagrad, plain_adam, plain_lion, plain_sgd, torchs

import funczero as fz
from funczero import tree
from funczero.layout.processes import world_size

STILL = "embed|blocks/1|gain"
VARIANTS = {"plain": {}, "donated": {"donate": True}, "no units": {"units": ()}, "frozen": {"frozen": STILL}}


def gaps(names, dtype, stages, whole):
    """By optimizer, stage and variant: the largest distance from torch's class after five updates, of which the fourth
    is skipped. Without `whole` each optimizer has one variant beside the plain one, in turn.
    """
    out, turn = {}, list(VARIANTS)[1:]
    for i, name in enumerate(names):
        tx, make = PAIRS[name]
        for variant, kw in VARIANTS.items():
            if not whole and variant not in ("plain", turn[i % len(turn)]):
                continue
            want = torchs(make, 5, dtype, kw.get("frozen"))
            for stage in stages if variant == "plain" else (1,) if variant == "no units" else (3,):
                got = masters(tx, stage, dtype, updates=5, **kw)[0]
                out[name, variant, stage] = max((got[n] - want[n]).abs().max().item() for n in want if want[n].numel())
    return out


@EACH
@pytest.mark.parametrize(
    ("world", "stages"), [(1, (3,)), *(pytest.param(w, (0, 1, 2, 3), marks=pytest.mark.slow) for w in (1, 2))]
)
def test_an_optimizer_is_torchs_class_at_every_stage(run_world, world, stages, whole):
    """Three stages more wait for make test-all: that all have the bits of one is asked in tests/test_optim.py."""
    found = zoo.everywhere(run_world, world, gaps, list(PAIRS), F64, stages, whole)
    assert (
        len(found) == ((3 if whole else 1) + len(stages)) * len(PAIRS)
        and {k: d for k, d in found.items() if not d <= 1e-12} == {}
    )


# --- narrow and extreme numbers ---------------------------------------------------------------------------------------
NARROW = {
    "adamw": (fz.adamw(1e-2, eps=1e-3), lambda p: torch.optim.AdamW(p, 1e-2, eps=1e-3, fused=True), 0),
    "adam": (
        fz.adam(1e-2, eps=1e-3, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 1e-2, eps=1e-3, weight_decay=0.1, fused=True),
        0,
    ),
    "sgd": (fz.sgd(1e-2, weight_decay=0.1), lambda p: torch.optim.SGD(p, 1e-2, weight_decay=0.1), 2),
    "momentum": (fz.sgd(1e-2, 0.9), lambda p: torch.optim.SGD(p, 1e-2, 0.9), 2),
    "adagrad": (fz.adagrad(1e-2, eps=1e-3), lambda p: torch.optim.Adagrad(p, 1e-2, eps=1e-3), 2),
    "lion": (fz.lion(1e-2, 0.8, 0.95), lambda p: Lion(p, 1e-2, (0.8, 0.95), 0.0), 2),
    "from_torch": (fz.from_torch("RMSprop", 1e-2, eps=1e-3), lambda p: torch.optim.RMSprop(p, 1e-2, eps=1e-3), 0),
    "lifted": (
        fz.lift((fz.sgd(1e-2, 0.9).init, fz.sgd(1e-2, 0.9).update), elementwise=True),
        lambda p: torch.optim.SGD(p, 1e-2, 0.9),
        2,
    ),
}


def constant_gradient(tx, target, policy, weight, updates=3):
    """Masters after some updates whose mean gradient is exactly `target`, from a sum of `weight` times as much."""
    g = fz.value_and_grad(lambda p, b: ((p["w"] * b["t"]).sum() * weight, torch.tensor(weight, dtype=torch.float64)))
    step = fz.train_step(g, tx, mesh={"data": 1}, policy=policy)
    state = step.init({"w": torch.linspace(-1, 1, len(target)).to(target.dtype)})
    for _ in range(updates):
        state, m = step(state, {"t": target.to(step.grad.env.policy.compute)})
        assert m.ok
    return step.params(state)["w"]


def by_torch(make, target, updates=3):
    """The same by torch's class in the masters' own dtype."""
    w = torch.linspace(-1, 1, len(target)).to(target.dtype).requires_grad_()
    optimizer = make([w])
    for _ in range(updates):
        w.grad = target.clone()
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NARROW)
def test_narrow_masters_round_as_torchs_do(name, dtype):
    """A factor of a ninth has 8 bits in bfloat16, and the sum that it divides overflows float16: it is multiplied
    before the cast.
    """
    tx, make, ulps = NARROW[name]
    target = (torch.linspace(-1, 1, 50) * 30_000 / (1 if dtype == torch.float16 else 30_000)).to(dtype)
    if dtype == torch.float16 and name in ("adagrad", "adamw", "adam", "from_torch"):
        target = target / 1000  # their squares
    if name in ("momentum", "lifted"):
        target = target / 3  # their sums
    got = constant_gradient(tx, target, f"params={str(dtype).removeprefix('torch.')},compute=float32", 9.0)
    want = by_torch(make, target)
    assert got.isfinite().all() and got.dtype == dtype
    torch.testing.assert_close(
        got.float(), want.float(), rtol=ulps * torch.finfo(dtype).eps, atol=ulps * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("weight", [1e-40, 1e-30, 1e30, 1e36, 1e38, 1e40])
@pytest.mark.parametrize("name", NARROW)
def test_a_factor_that_float32_does_not_have_counts(name, weight):
    """Mean gradients are the same whatever was summed and divided; 1 / factor used to overflow, and the factor to
    vanish.
    """
    tx, make, _ = NARROW[name]
    target = torch.linspace(-1, 1, 50) if weight > 1 else torch.linspace(-1, 1, 50) * 1e6
    got = constant_gradient(tx, target, "compute=float64,accumulate=float64", weight)
    torch.testing.assert_close(got, by_torch(make, target), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [fz.adamw, fz.adam, fz.adagrad, lambda lr: fz.from_torch("RMSprop", lr)])
def test_an_eps_that_is_nothing_in_the_masters_dtype_is_refused(make):
    step = fz.train_step(
        fz.value_and_grad(lambda p, b: (p["w"].sum(), torch.ones(()))), make(1e-3), mesh={"data": 1}, policy="float16"
    )
    with pytest.raises(
        ValueError,
        match=(
            r"eps=1e-\d+ is 0 in float16, the dtype of the masters; write a larger eps, or"
            r" policy='params=float32,compute=float16'"
        ),
    ):
        step.init({"w": torch.zeros(3, dtype=torch.float16)})


# --- the plain form is the oracle of the fused one, in any chain ------------------------------------------------------
def drawn(seed):
    """An optimizer with arguments of any kind, what stands left of it, and a stage."""
    r = random.Random(seed)
    late = lambda u: 0.01 + 0.02 * u  # noqa: E731
    value = lambda: r.choice([0.0, 0.03, late])  # noqa: E731
    names = [n for n, _ in tree.paths(zoo.params())]
    by_path = {n: r.choice([0.01, 0.05, late]) for n in names} | {"head/scale": 0.02, "norm": 0.02}
    kinds = (
        value,
        lambda: [("blocks/1|bias|/b$", value()), ("norm", 0.02), ("", value())],
        lambda: tree.unflatten([by_path[n] for n in names], tree.flatten(zoo.params())[1]),
    )
    lr, decay = r.choice(kinds)(), r.choice(kinds)()
    b1, momentum, cls, moving = (
        r.choice([0.8, lambda u: 0.7 + 0.05 * u]),
        r.choice([0.0, 0.9]),
        r.choice(["RMSprop", "NAdam", "Adadelta"]),
        r.choice([0.01, late]),
    )
    tx, oracle = r.choice(
        [
            lambda: (fz.adamw(lr, b1, 0.95, 1e-6, decay), plain_adam(lr, b1, 0.95, 1e-6, decay)),
            lambda: (fz.adam(lr, 0.8, 0.95, 1e-6, decay), plain_adam(lr, 0.8, 0.95, 1e-6, decay, decoupled=False)),
            lambda: (fz.sgd(lr, momentum, weight_decay=decay), plain_sgd(lr, momentum, weight_decay=decay)),
            lambda: (fz.sgd(lr, 0.9, True, decay), plain_sgd(lr, 0.9, True, decay)),
            lambda: (fz.adagrad(lr, 1e-6, decay), plain_adagrad(lr, 1e-6, decay)),
            lambda: (fz.lion(lr, 0.8, 0.95, decay), plain_lion(lr, 0.8, 0.95, decay)),
            lambda: (fz.from_torch(cls, moving, decay), None),
        ]
    )()
    left = [
        fz.scale_loss(2.0**8, weight=64),
        fz.clip_by_global_norm(0.1),
        fz.clip_by_value(0.01),
        fz.lift((tree_of_zeros, halved), "half", True),
    ]
    return [x for x in left if r.random() < 0.5], tx, oracle, r.randrange(4)


def tree_of_zeros(params):
    return tree.map(torch.zeros_like, params)


def halved(grads, state, params):
    new = tree.map(lambda t, g: (t + g) / 2, state, grads)
    return new, new


def random_chains(seeds):
    """By seed: the distance of the masters by the fused form from those by the plain one."""
    out = []
    for seed in seeds:
        left, tx, oracle, stage = drawn(seed)
        runs = [
            dict(
                tree.paths(
                    zoo.train(
                        fz.zero(zoo.source(), *left, t, stage=stage, accumulate=MICROS // world_size()),
                        {"data": -1},
                        dtype=F64,
                        policy="float64",
                        updates=5,
                    )[0]
                )
            )
            for t in (tx, fz.lift((tx.init, tx.update), elementwise=True), oracle)
            if t is not None
        ]
        out.append(max((runs[0][n] - run[n]).abs().max().item() for run in runs[1:] for n in run if run[n].numel()))
    return out


@EACH
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_plain_form_is_the_fused_one_in_random_chains(run_world, world, whole):
    found = zoo.everywhere(run_world, world, random_chains, range((24 if whole else 6) // world))
    assert {seed: d for seed, d in enumerate(found) if not d <= 1e-12} == {}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adagrad", "torch RMSprop"])
def test_nothing_to_train_is_no_error_and_moves_nothing(name):
    """All leaves frozen, with rates by rule: an optimizer has no leaf at all."""
    made = {
        "adamw": fz.adamw,
        "sgd": fz.sgd,
        "lion": fz.lion,
        "adagrad": fz.adagrad,
        "torch RMSprop": lambda lr, **kw: fz.from_torch("RMSprop", 0.1, **kw),
    }[name]
    for kw in ({}, {"weight_decay": [("blocks", 0.1), ("", 0.2)]}):
        got, log, _ = masters(made(0.1, **kw), updates=2, frozen=".*")
        assert all(torch.equal(got[n], x) for n, x in tree.paths(zoo.params())) and log[-1].ok
