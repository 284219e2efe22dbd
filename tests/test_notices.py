"""What is seldom meant is said once, on one rank, and only where it is so."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import zoo
from cover import EACH, cover
from test_skips import lines

import funczero as fz
from funczero import P

MESH = {"data": -1}
ROWS = (
    "train_step: in the first 3 updates all ranks had the same losses and weights, as if each were given the same rows,"
    " so that each row counts once a rank; give every rank its own with step.local_rows(batch)"
)


def params(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g).to(dtype)
    return {
        "w": draw(4, 3),
        "blocks": [{"v": draw(3, 3), "idle": draw(3)} for _ in range(2)],
        "unused": draw(7),
        "zero": torch.zeros(3),
    }


def loss(p, b):
    x = fz.layers(lambda q, x: torch.tanh(x @ q["v"]), p["blocks"], b["x"] @ p["w"])
    return ((x + p["zero"]) ** 2).sum(), torch.tensor(float(len(b["x"])))


def flat(p, b):
    """A loss that does not know its rows until its weights have moved."""
    return ((b["x"] @ p["w"] * p["zero"] - 1) ** 2).sum(), torch.tensor(1.0)


def batch(t, n=8):
    return {"x": torch.randn(n, 4, generator=torch.Generator().manual_seed(t))}


def make(stage, tx=None, units=("blocks",), k=1, loss_fn=loss, policy=None, source=None):
    g = source or fz.value_and_grad(loss_fn, batch=P("data"), units=units)
    return fz.train_step(
        *fz.zero(g, *(tx or (fz.adamw(1e-2, weight_decay=0.1),)), stage=stage, accumulate=k), mesh=MESH, policy=policy
    )


def said(stage, give, updates=5, donate=False, **kw):
    """Lines of some updates of one step; give(step, t): what this rank is given."""
    step = make(stage, **kw)
    step = fz.donate(step) if donate else step
    with lines() as out:
        state = step.init(params())
        for t in range(updates):
            state, _ = step(state, give(step, t))
    return out


# --- rows -------------------------------------------------------------------------------------------------------------
def dealt(step, t):
    return step.local_rows(batch(t))


def forgotten(step, t):
    return batch(t)


def constant(step, t):
    return {"x": torch.ones(4, 4)}


def rows_said(k, stages):
    out = {}
    frozen = (fz.freeze("unused|idle"), fz.adamw(1e-2))
    for stage in stages:
        out[stage] = [said(stage, give, k=k, tx=frozen) for give in (dealt, forgotten, constant)]
        out[stage].append(said(stage, dealt, k=k, tx=(fz.adamw(1e-2, weight_decay=0.0),), units=(), loss_fn=flat))
    return out


@EACH
@pytest.mark.parametrize("k", [1, 2])
def test_the_same_rows_on_all_ranks_are_said_once(run_world, k, whole):
    """Not for rows that were dealt, nor for a constant batch, nor for weights that begin where no row counts."""
    stages = range(4) if whole else (k, (k + 2) % 4)
    first, second = run_world(2, rows_said, k, stages)
    for stage in stages:
        assert first[stage] == [[], [ROWS], [], []] and second[stage] == [[]] * 4


def test_one_rank_has_all_rows():
    assert said(2, forgotten, tx=(fz.freeze("unused|idle"), fz.adamw(1e-2))) == []


# --- unused parameters ------------------------------------------------------------------------------------------------
DECAYED = (
    "train_step: the loss did not use 'blocks/0/idle', 'blocks/1/idle', 'unused', and weight decay shrinks what has no"
    " gradient, where torch leaves it; write fz.freeze(...) for it"
)


def decays(tried):
    return [said(stage, dealt, units=units, donate=donate, k=2) for _, stage, units, donate in tried]


WAYS = list(product((1, 2), range(4), ((), ("blocks",)), (False, True)))


@EACH
@pytest.mark.parametrize("world", [1, 2])
def test_unused_parameters_that_decay_are_named_once(run_world, world, whole):
    tried = [way for way in (WAYS if whole else cover(WAYS)) if way[0] == world]
    found, n = run_world(world, decays, tried), len(tried)
    assert found[0] == [[DECAYED]] * n and found[1:] == [[[]] * n] * (world - 1) and n > 3


@pytest.mark.parametrize(
    "tx",
    [(fz.adamw(1e-2, weight_decay=0.0),), (fz.freeze("unused|idle"), fz.adamw(1e-2, weight_decay=0.1)), (fz.sgd(0.1),)],
)
def test_unused_parameters_that_stand_still_are_not(tx):
    assert said(3, dealt, tx=tx) == []


def routed(p, b):
    """A parameter that only the rows of the second rank use."""
    far = b["x"][b["x"][:, 0] > 0]
    more = (p["unused"] * far.sum()).sum() if len(far) else 0.0
    return ((b["x"] @ p["w"]) ** 2).sum() + more, torch.tensor(1.0)


def routes():
    step = make(2, loss_fn=routed, units=(), tx=(fz.freeze("blocks|zero"), fz.adamw(1e-2, weight_decay=0.1)))
    index = step.init(params()).params.where.coords[0][2]
    sign = 1.0 if index else -1.0
    give = lambda s, t: {"x": sign * batch(t + 10 * index)["x"].abs()}
    return said(2, give, loss_fn=routed, units=(), tx=(fz.freeze("blocks|zero"), fz.adamw(1e-2, weight_decay=0.1)))


def test_what_another_rank_uses_is_not_unused(run_world):
    assert run_world(2, routes) == [[], []]


# --- at init ----------------------------------------------------------------------------------------------------------
def test_a_narrow_model_in_a_wide_policy_is_said():
    words = (
        "init: parameter 'w'{} came in bfloat16, but the policy computes in float32; write policy='compute=bfloat16' to"
        " compute as the model did"
    )
    for policy, want in ((None, [words.format(" and 5 more")]), ("compute=bfloat16", [])):
        step = make(1, policy=policy)
        with lines() as out:
            step.init(params(torch.bfloat16))
        assert out == want


def test_a_list_of_lists_of_blocks_is_said():
    words = (
        "value_and_grad: units='blocks' is a list of lists of blocks, and each inner list is gathered as one unit; "
        "write units=('blocks/0', 'blocks/1', ...) for its blocks"
    )
    stages = {"w": torch.ones(4, 3), "blocks": [[{"v": torch.ones(3, 3)} for _ in range(2)] for _ in range(2)]}
    pairs = {"w": torch.ones(4, 3), "blocks": [[torch.ones(3, 3), torch.ones(3)] for _ in range(2)]}
    for p, units, want in (
        (stages, "blocks", [words]),
        (stages, ("blocks/0", "blocks/1"), []),
        (pairs, "blocks", []),
        (params(), "blocks", []),
    ):
        with lines() as out:
            state = make(3, units=units).init(p)
        assert out == want
    names = [u.name for u in make(3, units=("blocks/0", "blocks/1")).init(stages).params.where.structure.units]
    assert names == ["", "blocks/0/0", "blocks/0/1", "blocks/1/0", "blocks/1/1"] and state is not None


def test_the_zoo_is_told_of_what_it_does_not_use():
    step = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=3), mesh=MESH)
    state = step.init(zoo.params())
    with lines() as out:
        for t in range(3):
            state, _ = step(state, zoo.batch(t))
    assert len(out) == 1 and "the loss did not use 'unused', and" in out[0]
