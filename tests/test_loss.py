"""What a loss function returns: two sums without dims, or one sentence; and what has no gradient at all."""

from __future__ import annotations

from functools import reduce

import pytest
import torch

import funczero as fz
from funczero import P
from funczero.gradients.loss import check_loss, drew, no_gradient

ONE = torch.ones(())


@pytest.mark.parametrize("aux", [(), (ONE,), ({"n": 3},)], ids=["none", "a tensor", "a tree"])
@pytest.mark.parametrize("weight", [ONE, 3.0, 2, torch.tensor(4)], ids=str)
def test_two_sums_and_what_the_user_adds_come_as_they_are(weight, aux):
    loss = torch.tensor(2.0, dtype=torch.float64)
    found, weighed, _, extra = check_loss((loss, weight, *aux), bool(aux))
    assert found is loss and isinstance(weighed, torch.Tensor) and weighed == weight
    assert extra is (aux[0] if aux else None)


NONE = {
    "one tensor": (ONE, "returned one tensor of shape (), but an update needs (sum of losses, sum of weights)"),
    "a list": ([ONE, ONE], "returned a list; return (sum of losses, sum of weights)"),
    "nothing": (None, "returned a NoneType; return (sum of losses, sum of weights)"),
    "three": ((ONE, ONE, ONE), "returned (a tensor of shape (), a tensor of shape (), a tensor of shape ()); return ("),
    "losses by row": ((torch.ones(3), ONE), "returned (a tensor of shape (3,), a tensor of shape ()); both are 0-d"),
    "weights by row": ((ONE, torch.ones(3)), "returned (a tensor of shape (), a tensor of shape (3,)); both are 0-d"),
    "a number": ((1.0, ONE), "returned (a float, a tensor of shape ()); both are 0-d"),
    "an integer tensor": (
        (torch.tensor(1), ONE),
        "returned (a tensor of shape (), a tensor of shape ()); both are 0-d",
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_not_two_sums_is_named_by_its_shapes(name):
    result, words = NONE[name]
    with pytest.raises(TypeError) as e:
        check_loss(result, False)
    assert str(e.value).startswith(f"value_and_grad: the loss function {words}") and "\n" not in str(e.value)


def test_an_aux_that_is_asked_for_is_returned():
    with pytest.raises(TypeError, match=r"return \(sum of losses, sum of weights, aux\)$"):
        check_loss((ONE, ONE), True)


def test_the_reason_is_the_grad_mode_where_that_is_the_reason():
    with torch.no_grad():
        assert "the step is called under torch.no_grad or inference_mode; call it outside" in no_gradient()
    assert "it depends on no parameter that learns; compute it from `params`" in no_gradient()


def test_a_draw_without_a_key_is_told_whose_and_what_to_write():
    said = str(drew("numpy"))
    assert "draws from numpy's global generator" in said and "value_and_grad(loss_fn, ..., rng=True)" in said


# --- a mean over rows -------------------------------------------------------------------------------------------------
def test_rows_are_those_of_every_tensor_of_the_batch():
    loss = fz.per_row(lambda p, b: b["x"].mean())
    total, weight = loss({}, {"x": torch.ones(4), "y": torch.zeros(4, 2)})
    assert (total, weight) == (4, 4)
    with pytest.raises(ValueError, match="per_row"):
        loss({}, {"x": torch.ones(4), "y": torch.zeros(3)})


def test_it_cuts_into_micro_batches_as_a_sum_does():
    """The mean of all rows, however ragged the parts are."""
    loss, x = fz.per_row(lambda p, b: b["x"].square().mean()), torch.arange(7.0)
    parts = [loss({}, {"x": part}) for part in x.split([1, 2, 4])]
    assert sum(t for t, _ in parts) / sum(w for _, w in parts) == x.square().mean()


def test_a_mean_over_rows_is_a_sum_with_its_rows():
    loss = fz.per_row(lambda p, b: (b["x"] @ p["w"]).square().mean())
    p, b = {"w": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])}
    total, weight = loss(p, b)
    assert (total.item(), weight.item()) == (14.0, 3.0)
    assert loss(p, {"x": torch.zeros(0, 2)})[0].item() == 0 and loss(p, {"x": torch.zeros(0, 2)})[1].item() == 0


def test_a_mean_over_rows_keeps_its_key_and_its_units():
    def loss(p, b, key):
        return (b["x"] * p["w"]).mean() * key

    loss.units = ("blocks",)
    assert fz.per_row(loss)({"w": torch.ones(())}, {"x": torch.ones(2)}, 3)[0] == 6
    assert fz.value_and_grad(fz.per_row(loss)).units == ("blocks",) == fz.value_and_grad(loss).units
    assert fz.value_and_grad(loss, units=()).units == () and fz.value_and_grad(loss, units="layers").units == (
        "layers",
    )


def unlearned(weight):
    """A step of a loss that needs no parameter."""
    loss = lambda p, b: (b["x"].sum(), torch.full((), weight))
    step = fz.train_step(fz.shard("data", fz.value_and_grad(loss, batch=P("data")), fz.sgd(1.0)), mesh={"data": 1})
    return step, step.init({"w": torch.ones(2)}), {"x": torch.ones(3)}


def test_a_loss_without_a_gradient_is_refused_as_torch_does():
    step, state, b = unlearned(1.0)
    with pytest.raises(
        RuntimeError,
        match="the loss has no gradient, because it depends on no parameter that learns; compute it from `params`",
    ):
        step(state, b)


def test_a_micro_batch_of_no_weight_may_need_no_parameter():
    step, state, b = unlearned(0.0)
    state, m = step(state, b)
    assert m.empty and not m.ok and m.grad_norm == 0 and torch.equal(step.params(state)["w"], torch.ones(2))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("stage", range(4))
def test_a_step_under_no_grad_is_refused(stage, off):
    loss = lambda p, b: ((b["x"] * p["w"]).sum(), torch.ones(()))
    step = fz.train_step(
        *fz.zero(fz.value_and_grad(loss, batch=P("data")), fz.adamw(0.1), stage=stage), mesh={"data": 1}
    )
    state = step.init({"w": torch.ones(2)})
    with (
        off(),
        pytest.raises(
            RuntimeError,
            match="no gradient, because the step is called under torch.no_grad or inference_mode; call it outside",
        ),
    ):
        step(state, {"x": torch.ones(3, 2)})


@pytest.mark.parametrize("split", [1, 2, 4])
def test_a_mean_over_tokens_is_right_for_any_split(split):
    """Micro-batches with different numbers of tokens, one of them with none: the gradient is the whole batch's."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=g).double(), torch.randint(4, (8,), generator=g)
    y[[0, 1, 5]] = -100
    nll = lambda p, b: torch.nn.functional.cross_entropy(b["x"] @ p["w"], b["y"])  # a mean over those that count
    loss = fz.mean_loss(nll, lambda b: (b["y"] != -100).sum())
    step = fz.train_step(
        *fz.zero(fz.value_and_grad(loss, batch=P("data")), fz.sgd(1.0), stage=3, accumulate=split),
        mesh={"data": 1},
        policy="float64",
    )
    w = torch.randn(3, 4, generator=g).double()
    state, m = step(step.init({"w": w}), {"x": x, "y": y})
    want = torch.func.grad(lambda w: nll({"w": w}, {"x": x, "y": y}))(w)
    torch.testing.assert_close(w - step.params(state)["w"], want, rtol=1e-12, atol=1e-14)
    assert int(m.weight) == 5


def test_a_weight_is_one_number():
    with pytest.raises(ValueError, match="mean_loss: the weight has shape"):
        fz.mean_loss(lambda p, b: b.mean(), lambda b: b)({}, torch.ones(2))


def block(p, x):
    return torch.tanh(x @ p["w"])


def weightless(stage, form):
    """How far an update is from the whole batch's, where one of two ranks has no token that counts; is it applied?"""
    g = torch.Generator().manual_seed(0)
    params = {"blocks": [{"w": torch.randn(190, 190, generator=g).double() / 14} for _ in range(3)]}
    x, y = torch.randn(4, 190, generator=g).double(), torch.tensor([1, 2, -100, -100])  # large units and their turns
    remat = form == "remat"
    nll = lambda p, b: torch.nn.functional.cross_entropy(fz.layers(block, p["blocks"], b["x"], remat=remat), b["y"])
    loss = fz.mean_loss(nll, lambda b: (b["y"] != -100).sum())
    source = fz.value_and_grad(
        loss, batch=P("data"), units=() if form == "whole" else ("blocks",), higher_order=form == "higher"
    )
    step = fz.train_step(*fz.zero(source, fz.sgd(1.0), stage=stage), mesh={"data": 2}, policy="float64")
    state, m = step(step.init(params), step.local_rows({"x": x, "y": y}))
    ws, moved = [p["w"].clone().requires_grad_() for p in params["blocks"]], step.params(state)["blocks"]
    plain = torch.nn.functional.cross_entropy(reduce(lambda h, w: torch.tanh(h @ w), ws, x), y)
    triples = zip(params["blocks"], moved, torch.autograd.grad(plain, ws), strict=True)
    gaps = [old["w"] - new["w"] - want for old, new, want in triples]
    return max(g.abs().max().item() for g in gaps), bool(m.ok), int(m.weight)


@pytest.mark.parametrize("form", ["whole", "keep", "remat", "higher"])
def test_a_rank_without_a_token_that_counts_sends_as_the_others_do(run_world, form):
    for stage in range(4):
        for gap, ok, weight in run_world(2, weightless, stage, form):
            assert ok and weight == 2 and gap < 1e-14, (stage, gap)
