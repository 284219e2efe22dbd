"""transforms/noise.py, and the values of core/rng.py that are named by rows and places."""

from __future__ import annotations

import pytest
import torch
import zoo
from cover import EACH

import funczero as fz
from funczero import P, rng
from funczero.testing import simulate, tree_hash

RIGHT = (fz.clip_by_global_norm(zoo.CLIP), fz.add_noise(0.01), fz.adamw(1e-2))


def trained(stage, size):
    """A hash of masters, with a skipped update on the way."""
    chain = fz.zero(zoo.source(), *RIGHT, stage=stage, accumulate=zoo.FEW // size)
    return tree_hash(zoo.train(chain, {"data": size})[0])


@EACH
def test_one_hash_over_stages_and_worlds(whole):
    found = {trained(0, 1), trained(3, 1)}
    found |= {
        h
        for size, stage in ((2, 0), (2, 1), (2, 2), (2, 3), (4, 3))[:: 1 if whole else 2]
        for h in simulate({"data": size})(trained, stage, size)
    }
    assert len(found) == 1


def test_the_number_of_micro_batches_does_not_change_it():
    """A gradient of zeros, so that all that is seen is the noise; another one at every update."""

    def noise(k):
        loss_fn = lambda p, b: ((p["w"] * 0).sum() + b.sum() * 0, b.sum())
        grad = fz.value_and_grad(loss_fn, batch=P("data"))
        step = fz.train_step(
            grad, fz.accumulate(k), fz.shard("data", fz.add_noise(0.5), fz.sgd(1.0)), mesh={"data": -1}
        )
        state, out = step.init({"w": torch.zeros(3, 5)}), []
        for _ in range(2):
            before = step.params(state)["w"]
            state, _ = step(state, step.local_rows(torch.ones(4)))
            out.append(step.params(state)["w"] - before)
        return out

    found = [out for size, k in ((1, 1), (1, 4), (2, 1), (2, 2)) for out in simulate({"data": size})(noise, k)]
    assert len({tree_hash(out) for out in found}) == 1
    first, second = found[0]
    assert not torch.equal(first, second) and len(set(first.flatten().tolist())) == 15


def test_a_value_depends_on_its_place_alone():
    """No bit depends on the neighbours, the memory's offset or the length."""
    places = torch.arange(-500, 5000) * 977
    whole = rng.normal_at(5, places, torch.float64)
    for start, stop in ((0, 1), (1, 2), (3, 3000), (1234, 1300), (5499, 5500)):
        assert torch.equal(rng.normal_at(5, places[start:stop], torch.float64), whole[start:stop])
    x = rng.normal_at(7, torch.arange(200_000), torch.float64)
    moments = torch.stack([x.mean(), x.var() - 1, (x**3).mean(), (x**4).mean() - 3])
    assert moments.abs().max() < 0.05 and x.isfinite().all()
    assert (x[1:] * x[:-1]).mean().abs() < 0.01 and len(x.unique()) == len(x)
    assert not torch.equal(x, rng.normal_at(8, torch.arange(200_000), torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_named_by_their_keys(dtype):
    keys = rng.row_keys(3, 4000)
    assert keys.dtype == torch.int64 and torch.equal(keys[7:9], rng.row_keys(3, 2, start=7))
    for draw in (rng.row_normal, rng.row_uniform):
        whole = draw(keys, (2, 3), dtype)
        assert whole.shape == (4000, 2, 3) and whole.dtype == dtype
        order = torch.randperm(4000)
        assert torch.equal(draw(keys[order], (2, 3), dtype), whole[order])
    u = rng.row_uniform(keys, (3,), dtype).double()
    assert u.min() > 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([rng.row_normal(keys), rng.row_uniform(keys)]))[0, 1]) < 0.05


def test_what_is_no_key_is_refused():
    for wrong in (torch.ones(3), torch.ones(3, 3, dtype=torch.int64), 5):
        with pytest.raises(TypeError, match=r"give int64 \[rows\]"):
            rng.row_normal(wrong)
    with pytest.raises(ValueError, match="add_noise: std=-1.0"):
        fz.add_noise(-1.0)
    with pytest.raises(fz.ChainError, match="the update is already applied"):
        fz.train_step(zoo.source(), fz.all_reduce("data"), fz.sgd(0.1), fz.add_noise(1.0), mesh={"data": 1})
