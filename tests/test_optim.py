"""Optimizers: torch's own, an oracle in plain arithmetic, one hash at every stage, and numbers that are refused."""

from __future__ import annotations

import pytest
import torch
import zoo
from cover import EACH, places
from optimizers import F64, PAIRS, close, masters, torchs

import funczero as fz
from funczero import tree

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


def staged(name, stage):
    """The hash of the masters, on ranks that hold little or nothing of a leaf."""
    return zoo.tree_hash(masters(PAIRS[name][0], stage)[0])


HASHED = "adam", "adagrad", "lion", "torch RMSprop", "torch NAdam", "torch ASGD"


@EACH
@pytest.mark.parametrize("name", HASHED)
def test_an_optimizer_gives_one_hash_at_every_stage_and_world(run_world, name, whole):
    at = places(name, HASHED, whole)
    assert len({zoo.everywhere(run_world, world, staged, name, stage) for world, stage in at}) == 1 < len(at)


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


@pytest.mark.parametrize("policy", ["params=bfloat16,compute=bfloat16", "params=float64,compute=float32"])
def test_masters_and_moments_live_in_the_params_dtype(policy):
    want = fz.Policy.parse(policy).params
    for tx in (fz.adamw(1e-2), fz.sgd(1e-2, momentum=0.9)):
        got, log, state = masters(tx, dtype=torch.bfloat16, policy=policy, updates=2)
        held = [x for x in tree.tensors(next(iter(state.chain.values()))) if x.dim()]
        assert {x.dtype for x in (*got.values(), *held)} == {want} and log[-1].ok
