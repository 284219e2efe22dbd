"""step.grads and step.set: values for a look, and by path."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.func import grad

import funczero as fz
from funczero import P
from funczero.testing import simulate, tree_hash

LIMIT = 0.05


def looked(stage):
    """How far whole gradients are from plain torch's clipped ones; whether parts join to them; what a look leaves."""
    right = (fz.scale_loss(init=8.0, weight=64), fz.clip_by_global_norm(LIMIT), fz.adamw(1e-2))
    chain = fz.zero(zoo.source(), fz.freeze("head/b"), *right, stage=stage, accumulate=2)
    step = fz.train_step(*chain, mesh={"data": 2}, policy="float64")
    state, b = step.init(zoo.params(torch.float64)), zoo.batch(0, torch.float64)
    before = tree_hash(state._asdict())
    whole, parts = step.grads(state, step.local_rows(b)), step.grads(state, step.local_rows(b), whole=False)
    structure = state.params.where.structure
    mean = lambda p: (lambda lw: lw[0] / lw[1])(zoo.loss_plain(structure.unflatten(list(p.values())), b))
    found = dict(fz.tree.paths(step.params(state)))
    plain = grad(mean)({leaf.path: found[leaf.path] for leaf in structure.leaves})  # a tied leaf once
    norm = sum((plain[n] ** 2).sum() for n in whole).sqrt()
    gaps = [(x - plain[n] * (LIMIT / norm).clamp(max=1)).abs().max().item() for n, x in whole.items() if x.numel()]
    again = step.grads(state, step.local_rows(b))
    same = all(torch.equal(x, again[n]) for n, x in whole.items()) and tree_hash(state._asdict()) == before
    cut = sum(x.numel() for x in parts.values()) < sum(x.numel() for x in whole.values())
    return max(gaps), same, cut == (stage > 0), "head/b" in whole


@pytest.mark.parametrize("stage", range(4))
def test_a_gradient_for_a_look_is_what_the_optimizer_reads(stage):
    for gap, same, cut, frozen in simulate({"data": 2})(looked, stage):
        assert gap < 1e-14 and same and cut and not frozen


def replaced(stage):
    step = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=stage), mesh={"data": 2})
    state, _ = step(step.init(zoo.params()), step.local_rows(zoo.batch(0)))
    value = torch.arange(55.0).view(11, 5)
    new = step.set(state, {"embed": value, "blocks/1/b": 0.5})
    params, others = step.params(new), step.params(state)
    other = step.init(params)
    loss = [step.eval(zoo.loss_plain)(s, step.local_rows(zoo.batch(1))).loss.item() for s in (new, other)]
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else step.mesh.index("data")
    try:
        step.set(state, {"norm": float(rank)})
        told = ""
    except ValueError as error:
        told = str(error)
    kept = torch.equal(params["norm"], others["norm"]) and not torch.equal(others["embed"], value)
    return torch.equal(params["embed"], value), params["blocks"][1]["b"].tolist() == [0.5] * 7, kept, loss, told


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_set_writes_whole_values_by_path(run_world, stage):
    for embed, filled, kept, loss, told in run_world(2, replaced, stage):
        assert embed and filled and kept and loss[0] == loss[1]
        assert "ranks are given different values" in told


def test_what_does_not_fit_is_refused():
    step = fz.train_step(
        fz.value_and_grad(zoo.loss_plain, batch=P("data")), fz.all_reduce("data"), fz.sgd(0.1), mesh={"data": 1}
    )
    state = step.init(zoo.params())
    refusals = {
        KeyError: ({"emb": 0.0}, "there is no parameter 'emb'"),
        ValueError: ({"embed": torch.zeros(5)}, "the value of 'embed' has shape"),
        TypeError: ({"embed": torch.zeros(11, 5).double()}, "the value of 'embed' is torch.float64"),
    }
    for kind, (values, why) in refusals.items():
        with pytest.raises(kind, match=why):
            step.set(state, values)
    with pytest.raises(TypeError, match="is a str; give its whole tensor, or a number"):
        step.set(state, {"embed": "zero"})
    streamed = fz.train_step(
        fz.value_and_grad(zoo.loss_plain, batch=P("data")),
        fz.accumulate(2, stream=True),
        fz.all_reduce("data"),
        fz.sgd(0.1),
        mesh={"data": 1},
    )
    with pytest.raises(RuntimeError, match="a streamed window is no one batch"):
        streamed.grads(streamed.init(zoo.params()), zoo.batch(0))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_look_leaves_a_state_alone_whatever_stands_right_of_the_update(stage):
    """An average and a projection write new parameters, of which a look has none."""
    right = (fz.adamw(1e-2), fz.project(lambda w: w.clamp(-0.05, 0.05), "embed", elementwise=True), fz.ema(0.5))
    step = fz.train_step(*fz.zero(zoo.source(), *right, stage=stage), mesh={"data": 1})
    for one in (step, fz.donate(step)):
        state = one.init(zoo.params())
        before = tree_hash(state._asdict()), [b._version for b in state.params.buffers]
        one.grads(state, zoo.batch(0))
        assert (tree_hash(state._asdict()), [b._version for b in state.params.buffers]) == before
