"""step/frozen.py: parameters that a loss reads and nobody moves, sharded with a stage of their own."""

from __future__ import annotations

import pytest
import torch

import funczero as fz
from funczero import P
from funczero.gradients.tape import Tape
from funczero.testing import simulate, tree_hash

TEN = torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6)


def params(shift=0.0):
    return {"head": TEN[:5].T + shift, "blocks": [{"w": TEN * (i + 1) / 2 + shift, "b": TEN[i]} for i in range(4)]}


def forward(p, x):
    return fz.layers(lambda p, x: x + torch.tanh(x @ p["w"] + p["b"]), p["blocks"], x) @ p["head"]


def rows(t):
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(t))


def distilled(stage, own, through=False, updates=2, units=("blocks",)):
    """Hashes after some updates against a teacher; with `through`, gradients pass through the teacher as well."""

    def loss_fn(p, x):
        if through:
            return (forward(teacher.params(), torch.tanh(forward(p, x)) @ TEN[:5]) ** 2).sum(), torch.tensor(1.0)
        with torch.no_grad():
            want = forward(teacher.params(), x)
        return ((forward(p, x) - want) ** 2).sum(), torch.tensor(float(len(x)))

    grad = fz.value_and_grad(loss_fn, batch=P("data"), units=units)
    accumulate = 2 // torch.distributed.get_world_size()
    chain = fz.zero(grad, fz.adamw(1e-2), stage=stage, accumulate=accumulate)
    step = fz.train_step(*chain, mesh={"data": -1}, policy="float64")
    teacher, state = fz.frozen(params(0.1), step, stage=own), step.init(params())
    for t in range(updates):
        state, metrics = step(state, step.local_rows(rows(t)))
    held = sum(b.numel() for b in teacher.views.buffers)
    return tree_hash((step.params(state), metrics.loss)), held


@pytest.mark.parametrize("through", [False, True], ids=["beside", "through"])
def test_one_hash_over_stages_of_both_and_worlds(through):
    found = {
        bits
        for world in (1, 2)
        for stage, own in ((0, 0), (1, 3), (2, 3), (3, 3), (3, 0))
        for bits, _ in simulate({"data": world})(distilled, stage, own, through)
    }
    assert len(found) == 1


def test_values_are_the_plain_ones():
    """One update of the loss through the teacher, by hand."""
    p = {"head": params()["head"].requires_grad_(), "blocks": params()["blocks"]}
    loss = (forward(params(0.1), torch.tanh(forward(p, rows(0))) @ TEN[:5]) ** 2).sum()
    (want,) = torch.autograd.grad(loss, p["head"])

    def gradient():
        loss_fn = lambda p, x: (
            (forward(teacher.params(), torch.tanh(forward(p, x)) @ TEN[:5]) ** 2).sum(),
            torch.tensor(0.5),
        )
        grad = fz.value_and_grad(loss_fn, batch=P("data"), units=("blocks",))
        step = fz.train_step(*fz.zero(grad, fz.adamw(1e-2), stage=3), mesh={"data": -1}, policy="float64")
        teacher = fz.frozen(params(0.1), step)
        return step.grads(step.init(params()), step.local_rows(rows(0)))["head"]

    for found in simulate({"data": 2})(gradient):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_it_rests_in_rows_and_is_opened_unit_by_unit(monkeypatch):
    tapes = []
    made = Tape.__init__

    def noted(self, *args, **kwargs):
        made(self, *args, **kwargs)
        tapes.append(self)

    monkeypatch.setattr(Tape, "__init__", noted)
    (_, cut), _ = simulate({"data": 2})(distilled, 3, 3, True, 1)
    ((_, whole),) = simulate({"data": 1})(distilled, 3, 3, True, 1)
    assert cut < 0.75 * whole  # with its padding
    still = [t for t in tapes if all(u.frozen for u in t.whole.structure.units) and t.seam]
    assert still and all(t.gathers.peak <= 2 and not t.gathers.flying for t in still)


def of_a_state(stage):
    """Another step's state read in place: no copy, its newest values, and refused once it is used up."""
    square = lambda p, x: ((p["w"] * x).sum() ** 2, torch.tensor(1.0))
    other = fz.train_step(
        *fz.zero(fz.value_and_grad(square, batch=P("data")), fz.sgd(0.1), stage=stage), mesh={"data": -1}
    )
    reading = lambda p, batch: (
        (p["v"] - batch["other"].params()["w"]).square().sum() * batch["x"].sum(),
        batch["x"].sum(),
    )
    step = fz.train_step(
        *fz.zero(fz.value_and_grad(reading, batch=P("data")), fz.sgd(0.1), stage=stage), mesh=other.mesh
    )
    state, mine = other.init({"w": torch.ones(3)}), step.init({"v": torch.zeros(3)})
    read = fz.frozen(state, other)
    want = {b.data_ptr() for b in other.views(state).buffers}
    shared = stage == 0 or stage == 3
    assert not shared or {b.data_ptr() for b in read.views.buffers} == want
    mine, m = step(mine, step.local_rows({"x": torch.ones(4)}) | {"other": read})
    assert m.loss.item() == 3.0
    state, _ = fz.donate(other)(state, other.local_rows(torch.ones(4, 3)))
    with pytest.raises(RuntimeError, match="its state was donated"):
        read.params()
    mine, m = step(mine, step.local_rows({"x": torch.ones(4)}) | {"other": fz.frozen(state, other)})
    return tree_hash((step.params(mine), m.loss))


def test_a_state_of_another_step_is_read_where_it_lies():
    assert len({bits for stage in range(4) for bits in simulate({"data": 2})(of_a_state, stage)}) == 1


def test_a_write_into_it_is_told():
    def loss_fn(p, x):
        teacher.params()["w"].clamp_(max=0.5)
        return (p["w"] * x).sum(), torch.tensor(1.0)

    step = fz.train_step(fz.value_and_grad(loss_fn), fz.sgd(0.1))
    teacher = fz.frozen({"w": torch.ones(3)}, step)
    state, _ = step(step.init({"w": torch.ones(3)}), torch.ones(3))
    with pytest.raises(RuntimeError, match="the loss writes into parameter 'w' in place"):
        step(state, torch.ones(3))
    with pytest.raises(ValueError, match="frozen: stage=4 does not exist"):
        fz.frozen({"w": torch.ones(3)}, step, stage=4)


def writing(stage, how):
    def loss_fn(p, x):
        w = teacher.params()
        if how == "twice":
            teacher.params()
        leaf = w["head"] if how != "gather" else fz.gather(w["blocks"][0])["w"]
        with torch.no_grad():
            leaf.clamp_(max=0.5)
        return (p["head"] * x.sum()).sum(), torch.tensor(1.0)

    grad = fz.value_and_grad(loss_fn, batch=P("data"), units=("blocks",))
    step = fz.train_step(*fz.zero(grad, fz.sgd(0.1), stage=3), mesh={"data": -1}, policy="float64")
    teacher = fz.frozen(params(), step, stage=stage)
    state, _ = step(step.init(params()), step.local_rows(rows(0)))
    path = "blocks/0/w" if how == "gather" else "head"
    with pytest.raises(RuntimeError, match=f"the loss writes into parameter '{path}' in place"):
        step(state, step.local_rows(rows(0)))


@pytest.mark.parametrize("how", ["once", "twice", "gather"])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_write_into_what_was_gathered_is_told(stage, how):
    simulate({"data": 2})(writing, stage, how)


@pytest.mark.parametrize("stage", [0, 3])
def test_it_is_opened_inside_torch_func(stage):
    def run():
        inside = lambda x: (x @ teacher.params()["head"]).square().sum()
        loss_fn = lambda p, x: (
            (p["head"].sum() * torch.func.vmap(torch.func.grad(inside))(x).sum()) ** 2,
            torch.tensor(1.0),
        )
        grad = fz.value_and_grad(loss_fn, batch=P("data"), units=("blocks",))
        step = fz.train_step(*fz.zero(grad, fz.sgd(0.1), stage=3), mesh={"data": -1}, policy="float64")
        teacher = fz.frozen(params(0.1), step, stage=stage)
        return step.grads(step.init(params()), step.local_rows(rows(0)))["head"]

    x, head = rows(0).view(2, 2, 6), params(0.1)["head"]
    slopes = [(2 * (y @ head) @ head.T).sum() for y in x]
    want = sum(2 * params()["head"].sum() * s * s for s in slopes) / 2
    for found in simulate({"data": 2})(run):
        torch.testing.assert_close(found, want.expand(6, 5), rtol=1e-10, atol=1e-10)
