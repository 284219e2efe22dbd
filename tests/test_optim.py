"""Optimizers: torch's own, an oracle in plain arithmetic, one hash at every stage, and numbers that are refused."""

from __future__ import annotations

import pytest
import torch
import zoo
from optimizers import F64, PAIRS, close, masters, torchs

import funczero as fz
from funczero import P, tree
from funczero.optim.rate import value_at

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


BAD_VALUES = {
    "nan": float("nan"),
    "negative": torch.tensor(-1e-3),
    "inf": torch.tensor(float("inf"), dtype=F64),
    "two": torch.zeros(2),
    "a word": "1e-3",
    "nothing": None,
    "a bool": torch.tensor(True),
}


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


@pytest.mark.parametrize("policy", ["params=bfloat16,compute=bfloat16", "params=float64,compute=float32"])
def test_masters_and_moments_live_in_the_params_dtype(policy):
    want = fz.Policy.parse(policy).params
    for tx in (fz.adamw(1e-2), fz.sgd(1e-2, momentum=0.9)):
        got, log, state = masters(tx, dtype=torch.bfloat16, policy=policy, updates=2)
        held = [x for x in tree.tensors(next(iter(state.chain.values()))) if x.dim()]
        assert {x.dtype for x in (*got.values(), *held)} == {want} and log[-1].ok


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
