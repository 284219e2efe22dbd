"""Ranks that differ in one thing hear of it, all of them, before anything is applied: at the third update and at the
five hundredth, with and without the thread.
"""

from __future__ import annotations

import os
import re

import pytest
import torch
from campaign import apart, told

import funczero as fz
from funczero import P
from funczero.testing.simulate import simulate
from funczero.world.ledger import DivergenceError

LATE = 500
# What differs while every rank launches as many collectives of the same sizes: the sum is reached, and tells.
PAIRED = {
    "unit": (
        r"rank 1 launched all_gather of 'experts/2' over 'data' of .*, while rank 0 launched all_gather of 'experts/1'"
        r" over .* must open the same units"
    ),
    "order": (
        r"rank 1 launched all_gather of 'experts/1' over 'data' of .*, while rank 0 launched all_gather of 'experts/0'"
        r" over "
    ),
    "params": r"rank 1 begins with another value of 'w1' than rank 0; every rank must begin alike",
    "key": (
        r"rank 1 has 1 as the key in step\(state, batch\) at step \d+, while rank 0 has 0; every rank must hold the"
        r" same state"
    ),
    "rate": r"rank 1 has 0.02 as (?:adamw|sgd)\.rates\.lr in .*, while rank 0 has 0.01; ",
    "chain": (
        r"rank 1 launched .* one has ['\"]clip_by_global_norm\(2\) -> .* where others have"
        r" ['\"]clip_by_global_norm\(1\) -> "
    ),
    "step": (
        r"rank 1 launched .* at step \d+, while rank 0 launched .* at step \d+; every rank must hold the same state"
    ),
}


def tell(kinds, stage, at, check):
    """By kind: the sentence that this rank raises, or its last loss; all in one world, since a told rank may go on with
    another step.
    """
    out = {}
    for kind in kinds:
        try:
            out[kind] = apart.main(kind, stage, at, check, said=lambda *args, **kw: None)
        except DivergenceError as error:
            out[kind] = str(error)
    return out


@pytest.mark.parametrize(("stage", "at"), [(3, 3), (0, 3), pytest.param(3, LATE, marks=pytest.mark.slow)])
def test_what_differs_is_told_on_all_ranks_at_the_next_sum(run_world, stage, at):
    kinds = [k for k in PAIRED if stage not in apart.STAGES.get(k, ())]
    if at == LATE:
        kinds = ["unit", "rate"]
    one, other = run_world(2, tell, kinds, stage, at, 0, timeout=200.0)
    assert one == other
    for kind, said in one.items():
        assert isinstance(said, str), (kind, said)
        assert re.match(PAIRED[kind], said), (kind, said)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_right_is_left_alone(run_world, stage):
    """A ragged batch; and, where nothing is gathered unit by unit, experts that only some ranks run."""
    kinds = ["none", "rows", *(k for k, stages in apart.STAGES.items() if stage in stages)]
    one, other = run_world(2, tell, kinds, stage, 3, 0)
    assert one == other
    for kind, loss in one.items():
        assert loss == pytest.approx(apart.reference(kind, 3), rel=1e-5), kind


@pytest.mark.parametrize(
    ("kind", "stage", "at"),
    [
        ("count", 3, 3),
        ("dtype", 2, 3),
    ]
    + [
        pytest.param(k, s, 3, marks=pytest.mark.slow)
        for k, s in (("eval", 3), ("eval", 1), ("save", 2), ("fewer", 3), ("error", 1))
    ]
    + [
        pytest.param(k, s, LATE, marks=pytest.mark.slow)
        for k in ("eval", "count", "save", "fewer", "error", "dtype")
        for s in (0, 1, 2, 3)
    ],
)
def test_what_is_launched_more_or_less_often_is_told_by_the_log(ends, tmp_path, kind, stage, at):
    script = f"from campaign import apart; print('end', apart.main({kind!r}, {stage}, {at}, 1), flush=True)"
    found = [(t["code"], t["out"], t["err"], t["when"]) for t in ends.run(tmp_path, script, 2, limit=180.0)]
    ended = told.ends_of(found)
    found = told.verdict(kind, stage, at, ended)
    assert found == "told" or found == "right" and (kind in apart.RIGHT or stage in apart.STAGES.get(kind, ())), (
        found,
        ended,
    )


def simulated(kind):
    """A rank of three that goes apart."""
    rank = torch.distributed.get_rank()
    params, rows = {"w": torch.ones(8) + (kind == "params") * (rank == 2)}, torch.ones(3, 8)
    step = fz.train_step(
        *fz.zero(
            fz.value_and_grad(lambda p, b: ((p["w"] * b).sum(), torch.ones(())), batch=P("data")), fz.sgd(0.1), stage=3
        ),
        mesh={"data": 3},
    )
    state = step.init(params, key=int(kind == "key" and rank == 0))
    for t in range(3):
        if t == 1 and rank == 1 and kind == "step":
            state = state._replace(step=state.step + 5)
        state, _ = step(state, rows)


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("params", "rank 2 begins with another value of 'w' than ranks 0, 1; "),
        ("key", "rank 0 begins with another value of key than ranks 1, 2: 1 instead of 0; "),
        (
            "step",
            (
                r"rank 1 launched all_gather over 'data' of .* at step 6, while ranks 0, 2 launched .* at step 1; every"
                r" rank must hold the same state"
            ),
        ),
    ],
)
def test_simulated_ranks_are_told_too(kind, want):
    with pytest.raises(DivergenceError, match=want):
        simulate({"data": 3})(simulated, kind)


# --- axes over which nothing is summed --------------------------------------------------------------------------------
def test_an_axis_over_which_nothing_is_summed_is_refused():
    loss = lambda p, b: (p["w"].sum() * b.sum(), torch.ones(()))
    with pytest.raises(
        fz.ChainError,
        match=(
            r"value_and_grad: nothing is split or summed over the mesh axis 'data' of size 2, .* write"
            r" batch=P\('data'\), or .*replicated=\('data',\)"
        ),
    ):
        fz.train_step(fz.value_and_grad(loss), fz.sgd(0.1), mesh={"data": 2})
    with pytest.raises(fz.ChainError, match=r"axis 'tp' of size 2, .* write batch=P\(\('data', 'tp'\)\)"):
        fz.train_step(
            *fz.zero(fz.value_and_grad(loss, batch=P("data")), fz.sgd(0.1), stage=1), mesh={"data": 2, "tp": 2}
        )
    with pytest.raises(fz.ChainError, match="replicated names 'tpp', which is not an axis of the mesh"):
        fz.train_step(
            *fz.zero(fz.value_and_grad(loss, batch=P("data"), replicated="tpp"), fz.sgd(0.1), stage=1), mesh={"data": 2}
        )
    with pytest.raises(fz.ChainError, match="the batch is split over 'data', so its ranks are not given the same rows"):
        fz.train_step(
            *fz.zero(fz.value_and_grad(loss, batch=P("data"), replicated=("data",)), fz.sgd(0.1), stage=1),
            mesh={"data": 2},
        )


def replicas(stage, differ, check):
    """Four ranks, two of them on an axis whose ranks are given the same rows; at update 2 one of them is not."""
    grad = fz.value_and_grad(
        lambda p, b: ((b["x"] @ p["w"]).square().sum(), torch.tensor(float(len(b["x"])))),
        batch=P("data"),
        replicated=("tp",),
    )
    step = fz.train_step(
        *fz.zero(grad, fz.clip_by_global_norm(1.0), fz.adamw(1e-2), stage=stage), mesh={"data": 2, "tp": 2}, check=check
    )
    state = step.init({"w": torch.arange(12.0).view(4, 3)})
    try:
        for t in range(4):
            rows = step.local_rows({"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(t))})
            if differ and t == 2 and os.environ["RANK"] == "3":
                rows = {"x": rows["x"] + 1}
            state, m = step(state, rows)
    except DivergenceError as error:
        return str(error)
    return (
        step.eval(lambda p, b: ((b["x"] @ p["w"]).sum(), torch.tensor(float(len(b["x"])))))(state, rows).loss.item(),
        m.loss.item(),
        m.grad_norm.item(),
    )


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_replicas_count_once_and_their_rows_are_compared(run_world, stage):
    first, *others = run_world(4, replicas, stage, False, 0)
    assert all(x == first for x in others)
    grad = fz.value_and_grad(
        lambda p, b: ((b["x"] @ p["w"]).square().sum(), torch.tensor(float(len(b["x"])))), batch=P("data")
    )
    step = fz.train_step(
        *fz.zero(grad, fz.clip_by_global_norm(1.0), fz.adamw(1e-2), stage=stage, accumulate=2), mesh={"data": 1}
    )
    state = step.init({"w": torch.arange(12.0).view(4, 3)})
    for t in range(4):
        rows = {"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(t))}
        state, m = step(state, rows)
    assert first[1:] == (m.loss.item(), m.grad_norm.item())
    said = run_world(4, replicas, stage, True, 0)
    assert len(set(said)) == 1 and said[0].startswith(
        "rank 3 was given other rows than rank 2 at step 2, but the batch is not split over ['tp']; "
    ), said
