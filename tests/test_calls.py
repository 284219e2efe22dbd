"""Calls that all ranks must make alike: what they launch is entered with call, step, key, rates and rows."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P
from funczero.step.calls import recorded, watched
from funczero.testing import simulate
from funczero.world.ledger import DivergenceError

TWO = {"data": 2}


def context_of(call, **kw):
    """The ledger's context inside `fn` of a recorded call of two ranks, and after it; with the state's own numbers."""
    step = zoo.make(1, mesh=TWO, right=(fz.scale_loss(init=4.0), fz.adamw(1e-2)))
    state = step.init(zoo.params(), key=9)
    for t in range(2):
        state, _ = step(state, step.local_rows(zoo.batch(t)))
    ledger, inside = step.live_mesh.ledger, []
    fn = recorded("tried", lambda *given: inside.append(ledger.context), step.running)
    call(fn, state)
    return inside, ledger.context, ledger


def test_a_call_is_entered_with_all_that_ranks_compare():
    batch = {"x": torch.zeros(6, 2), "n": torch.tensor(3.0), "y": torch.zeros(4)}

    def look():
        (inside,), after, ledger = context_of(lambda fn, state: fn(state, batch))
        own = dict(zip(inside.names, inside.scalars, strict=True))
        return inside[:3], inside.rows, inside.units[:2], own, after.call, after.step, ledger.describe(None)[0] != 0

    for (call, step, key), rows, units, own, after, later, spec in simulate(TWO)(look):
        assert (call, step, key, rows, units) == ("tried", 2, 9, "4/6", ("", "blocks/0")) and spec
        assert own["adamw.count"] == 2 and own["adamw.rates.lr"] == 1e-2 and own["scale_loss.scale"] == 4.0
        assert own["learning rate of the last update"] == 1e-2
        assert (after, later) == ("no call", 2)


def test_a_call_inside_another_has_its_own_context_and_gives_the_others_back():
    def look():
        step = zoo.make(0, mesh=TWO)
        state, seen = step.init(zoo.params()), []
        ledger = step.live_mesh.ledger
        inner = recorded("inner", lambda s: seen.append(ledger.context.call), step.running)

        def both(s):
            seen.append(ledger.context.call)
            inner(s)
            seen.append(ledger.context.call)

        recorded("outer", both, step.running)(state)
        return seen

    assert simulate(TWO)(look) == [["outer", "inner", "outer"]] * 2


def test_a_call_that_raises_gives_the_context_back_and_ranks_go_on():
    def look():
        step = zoo.make(0, mesh=TWO)
        state = step.init(zoo.params())

        def fail(s):
            raise ArithmeticError("a bad batch")

        before = step.live_mesh.ledger.context.call
        with pytest.raises(ArithmeticError):
            recorded("tried", fail, step.running)(state)
        state, m = step(state, step.local_rows(zoo.batch(0)))
        return before == step.live_mesh.ledger.context.call, m.ok.item()

    assert simulate(TWO)(look) == [(True, True)] * 2


def test_ranks_that_call_otherwise_hear_of_it_in_the_sum_of_the_call():
    def look():
        step = zoo.make(0, mesh=TWO)
        state = step.init(zoo.params())
        loss = zoo.loss_plain if step.mesh.index("data") else zoo.loss_remat
        name = "step.eval" if step.mesh.index("data") else "step.score"
        ask = recorded(name, lambda s, b: step.eval(loss)(s, b), step.running)
        step.live_mesh.ledger.note("tried", name)
        with pytest.raises(DivergenceError) as e:
            ask(state, step.local_rows(zoo.batch(0)))
        return str(e.value)

    (said,) = set(simulate(TWO)(look))
    assert said.startswith("rank ") and " launched tried over 'step." in said


@pytest.mark.parametrize("given", ["the same", "others"])
def test_rows_are_compared_where_ranks_must_be_given_the_same(given):
    def look():
        grad = fz.value_and_grad(lambda p, b: ((b["x"] @ p["w"]).sum(), torch.ones(())), replicated=("data",))
        step = fz.train_step(grad, fz.sgd(0.1), mesh=TWO)
        state = step.init({"w": torch.ones(3)})
        x = torch.ones(2, 3) + (step.mesh.index("data") if given == "others" else 0)
        return step(state, {"x": x})[1].ok.item()

    if given == "the same":
        assert simulate(TWO)(look) == [True, True]
    else:
        with pytest.raises(DivergenceError, match="rank 1 was given other rows than rank 0 at step 0"):
            simulate(TWO)(look)


def test_one_rank_is_called_as_it_is():
    step = zoo.make(0, mesh={"data": 1})
    state = step.init(zoo.params())
    before = step.live_mesh.ledger.context
    assert recorded("tried", lambda s, b: (s, b), step.running)(state, 3) == (state, 3)
    assert step.live_mesh.ledger.context is before and step.live_mesh.ledger.sum == 0


# --- the thread -------------------------------------------------------------------------------------------------------
def test_nobody_looks_in_a_world_of_one_or_when_told_not_to():
    grad = fz.value_and_grad(lambda p, b: ((p["w"] * b).sum(), torch.tensor(1.0)), batch=P("data"))
    for check in (0, 10, True):
        step = fz.train_step(grad, fz.all_reduce("data"), fz.adamw(1e-2), mesh={"data": 1}, check=check)
        assert step.running().env.mesh.ledger.watch is None


@pytest.mark.parametrize("check", [0, True])
def test_simulated_ranks_have_no_thread_and_know_their_chain(check):
    def look():
        step = zoo.make(3, mesh=TWO, right=(fz.sgd(0.1),))
        mesh = watched(step.running().env.mesh, step.running(), check, (), ("data",))
        return mesh.ledger.watch, mesh.ledger.chain, mesh.ledger.replicated

    for watch, chain, replicated in simulate(TWO)(look):
        assert watch is None and replicated == ("data",)
        assert chain[0].startswith("mesh data=2, ") and chain[0].endswith(
            ", sums='tree', Link(latency=0.00025, speed=1000000000.0)"
        )
        assert [line.split(" -> ")[0] for line in chain[1:]][-2:] == ["mean", "sgd"]
