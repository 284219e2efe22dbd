"""transforms/outputs.py: what a loss returns beside its sums, by rule, at every stage and world."""

from __future__ import annotations

import pytest
import torch

import funczero as fz
from funczero import P
from funczero.core.rows import split
from funczero.testing import tree_hash
from funczero.testing.simulate import simulate

ROWS, MICROS = 8, 4
RULES = [("logits|mark", "rows"), ("^all|each", "cat"), ("table", "sum")]


def loss(params, batch):
    """Linear; its logits, a table of sums, and what is joined."""
    out = batch["x"] @ params["w"]
    aux = {
        "logits": out,
        "mark": {"rows": batch["n"] % 2 == 0},
        "all": batch["n"],
        "each": out.sum(),
        "table": (batch["x"] ** 2).sum(0),
        "hits": (out > 0).sum(),
    }
    return (out**2).sum(), torch.tensor(float(len(out))), aux


def params():
    return {"w": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)}


def batch():
    x = torch.randn(ROWS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {"x": x, "n": torch.arange(ROWS)}


def step_of(stage, world, has_aux=RULES, **kw):
    grad = fz.value_and_grad(loss, batch=P("data"), has_aux=has_aux, **kw)
    chain = fz.zero(grad, fz.sgd(0.1), stage=stage, accumulate=MICROS // world)
    return fz.train_step(*chain, mesh={"data": -1}, policy="float64")


def found(stage, world, **kw):
    step = step_of(stage, world, **kw)
    rows = step.local_rows(batch())
    _, metrics = step(step.init(params()), rows)
    own = metrics.aux.pop("logits"), metrics.aux.pop("mark")
    logits = torch.allclose(own[0], rows["x"] @ params()["w"], rtol=1e-12)
    return metrics.aux, logits, torch.equal(own[1]["rows"], rows["n"] % 2 == 0)


@pytest.mark.parametrize("higher_order", [False, True])
def test_sums_and_joined_rows_are_the_batchs_and_rows_are_this_ranks(higher_order):
    per = {
        (s, w): simulate({"data": w})(lambda s=s, w=w: found(s, w, higher_order=higher_order))
        for s in range(4)
        for w in (1, 2, 4)
    }
    aux, out = per[0, 1][0][0], batch()["x"] @ params()["w"]
    assert all(logits and mark for ranks in per.values() for _, logits, mark in ranks)
    assert len({tree_hash(x) for ranks in per.values() for x, *_ in ranks}) == 1
    assert aux["all"].tolist() == list(range(ROWS)) and aux["all"].dtype == torch.int64
    torch.testing.assert_close(aux["each"], out.view(MICROS, -1).sum(1))
    torch.testing.assert_close(aux["table"], (batch()["x"] ** 2).sum(0))
    assert aux["hits"] == (out > 0).sum() and aux["hits"].dtype == torch.float64 and not aux["hits"].requires_grad


def test_a_window_that_closes_early_joins_what_came():
    grad = fz.value_and_grad(loss, has_aux=RULES)
    step = fz.train_step(grad, fz.accumulate(4, stream=True), fz.sgd(0.1), policy="float64")
    state = step.init(params())
    for micro in split(batch(), 4, "test")[:3]:
        state, _ = step(state, micro)
    aux = step(state, None)[1].aux
    assert aux["all"].tolist() == [0, 1, 2, 3, 4, 5] and len(aux["logits"]) == 6 and aux["each"].shape == (3,)


def test_an_open_window_is_saved_with_it(tmp_path):
    grad = fz.value_and_grad(loss, has_aux=RULES)
    make = lambda: fz.train_step(grad, fz.accumulate(4, stream=True), fz.sgd(0.1), policy="float64")
    step, micros = make(), split(batch(), 4, "test")
    state = step.init(params())
    for micro in micros[:3]:
        state, _ = step(state, micro)
    with fz.Checkpointer(tmp_path, step=step) as ck:
        ck.save(state, "open")
    again = make()
    held = fz.Checkpointer(tmp_path).restore(like=(again, params())).state
    assert tree_hash(again(held, None)[1].aux) == tree_hash(step(state, None)[1].aux)


def test_derivatives_of_what_is_joined():
    step = step_of(0, 1)
    state, pure = step.init(params()), fz.differentiable(step)
    grads = torch.func.grad(lambda p: pure(fz.with_parts(state, p), batch())[1].aux["each"].sum())(fz.parts(state))
    torch.testing.assert_close(grads["w"], batch()["x"].sum(0))


BAD = {
    "no rule": (
        True,
        lambda x: {"y": x},
        TypeError,
        (
            "aux 'y' is a tensor of shape (2, 3) and float32, but what has no rule is a 0-d sum; write x.sum(), or"
            " has_aux=[('y', 'rows')]"
        ),
    ),
    "a string": (True, lambda x: {"y": "many"}, TypeError, "aux 'y' is a string, which cannot be added or joined"),
    "nothing": (True, lambda x: None, TypeError, "aux is a missing value, which cannot be added or joined"),
    "a complex sum": (
        True,
        lambda x: torch.tensor(1j),
        TypeError,
        "aux is a tensor of shape () and complex64, but sums are real",
    ),
    "no rows": (
        [("", "rows")],
        lambda x: {"y": 1.0},
        TypeError,
        "aux 'y' is a tensor of shape () and float32 and has no rows",
    ),
    "no such path": ([("z", "sum")], lambda x: {"y": 1.0}, ValueError, "has_aux: the regex 'z' matches no leaf of aux"),
    "no such rule": ([("y", "max")], None, ValueError, "has_aux has ('y', 'max'); write True, or"),
    "no rules": ("yes", None, TypeError, "has_aux='yes' is a string; write True, or"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_by_path(name):
    has_aux, aux, error, says = BAD[name]
    with pytest.raises(error) as e:
        fn = lambda p, b: ((p["w"] * b).sum(), torch.tensor(2.0), aux(b))
        step = fz.train_step(fz.value_and_grad(fn, has_aux=has_aux), fz.sgd(0.1))
        step(step.init({"w": torch.ones(3)}), torch.ones(2, 3))
    assert says in str(e.value)


def test_micro_batches_of_another_form_are_refused():
    fn = lambda p, b: ((p["w"] * b).sum(), torch.tensor(2.0), {"y": b[: int(b[0, 0])]})
    step = fz.train_step(fz.value_and_grad(fn, has_aux=[("y", "cat")]), fz.accumulate(2), fz.sgd(0.1))
    with pytest.raises(TypeError, match="the aux of one micro-batch has another form than that of another"):
        step(step.init({"w": torch.ones(1)}), torch.tensor([[1.0], [1.0], [2.0], [2.0]]))


ONE_RANK_DIFFERS = {
    "another key": (
        True,
        lambda r, b: {"ab"[r]: b.sum()},
        "returned aux of 'b' by sum (), while rank 0 returned aux of 'a'",
    ),
    "another shape": (
        [("x", "cat")],
        lambda r, b: {"x": torch.arange(6).view((2, 3) if r == 0 else (3, 2))},
        "returned aux of 'x' by cat (3, 2) torch.int64, while rank 0 returned aux of 'x' by cat (2, 3)",
    ),
    "another dtype": (
        [("x", "cat")],
        lambda r, b: {"x": torch.ones(2, dtype=torch.int32 if r else torch.float32)},
        "returned aux of 'x' by cat (2,) torch.int32",
    ),
}


@pytest.mark.parametrize("name", ONE_RANK_DIFFERS)
def test_a_rank_whose_aux_has_another_form_is_told(name):
    """Places alone say what is added or joined: values of one size would be mixed without a word."""
    has_aux, aux, says = ONE_RANK_DIFFERS[name]

    def run():
        fn = lambda p, b: ((p["w"] * b).sum(), torch.tensor(2.0), aux(torch.distributed.get_rank(), b))
        chain = fz.zero(fz.value_and_grad(fn, batch=P("data"), has_aux=has_aux), fz.sgd(0.1), stage=1)
        step = fz.train_step(*chain, mesh={"data": -1})
        return step(step.init({"w": torch.ones(1)}), torch.ones(2, 1))

    with pytest.raises(RuntimeError) as e:
        simulate({"data": 2})(run)
    assert says in str(e.value) and "return one form on every rank" in str(e.value)
