"""Which states a step takes: its own, in any copy; none of another stage, chain or policy; and views are always those
of the masters.
"""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pytest
import torch
import zoo
from cover import EACH, cover
from torch import nn
from torch.utils._pytree import tree_map

import funczero as fz
from funczero import P, tree
from funczero.layout.processes import world_size
from funczero.testing import tree_hash

MESH = {"data": -1}
OTHER = "step: this state is not one of this step: "


def make(stage, tx=None, units=("blocks",), policy=None, source=None, **kw):
    source = source or zoo.source(units=units)
    return fz.train_step(*fz.zero(source, *(tx or zoo.tx()), stage=stage), mesh=MESH, policy=policy, **kw)


def said(call, *args):
    """What a call raised, or nothing."""
    try:
        call(*args)
    except (ValueError, RuntimeError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


# --- row 2: states of others ------------------------------------------------------------------------------------------
def pairs():
    """By (stage that made it, stage that is given it): what update, eval, view and params say."""
    out = {}
    for a in range(4):
        for b in range(4):
            state, step = make(a).init(zoo.params()), make(b)
            rows = step.local_rows(zoo.batch(0))
            calls = [
                (step, state, rows),
                (step.eval(zoo.loss_plain), state, rows),
                (step.view, state),
                (step.params, state),
            ]
            out[a, b] = [said(*c) for c in (calls if a != b else calls[:1])]
    return out


@pytest.mark.parametrize("world", [1, 2])
def test_a_state_of_another_stage_is_refused(run_world, world):
    """Stages 1 and 2 keep the same state, and may hand it on."""
    for found in run_world(world, pairs):
        for (a, b), words in found.items():
            same = a == b or {a, b} == {1, 2}
            assert all(
                w == "" if same else w.startswith(f"ValueError: {OTHER}") and "step.init(other.params(state))" in w
                for w in words
            ), (a, b, words)


def handed_on():
    """Two updates by stage 2, and one by stage 1 and one by stage 2."""
    out = []
    for stages in ((2, 2), (1, 2)):
        state = make(1).init(zoo.params())
        for t, stage in enumerate(stages):
            step = make(stage)
            state, _ = step(state, step.local_rows(zoo.batch(t)))
        out.append(tree_hash(step.params(state)))
    return out


def test_a_state_that_fits_may_change_hands(run_world):
    a, b = zoo.everywhere(run_world, 2, handed_on)
    assert a == b


CHAINS = {
    "another optimizer": (lambda: make(2, (fz.sgd(0.1),)), "its chain keeps ['sgd'], but this step's keeps ['adamw']"),
    "a loss scale": (
        lambda: make(2, (fz.scale_loss(), *zoo.tx())),
        "its chain keeps ['adamw', 'scale_loss'], but this step's keeps ['adamw']",
    ),
    "a frozen leaf": (
        lambda: make(2, (fz.freeze("embed"), *zoo.tx())),
        "parameter 'embed' has unit 'none, frozen' in it, but 'none' in this step",
    ),
    "other units": (
        lambda: make(2, units=()),
        "parameter 'blocks/0/w' has unit 'none' in it, but 'blocks/0' in this step",
    ),
    "another policy": (
        lambda: make(2, policy="compute=bfloat16"),
        "its views are bfloat16, but this step keeps them in float32",
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_state_of_another_chain_is_refused(name):
    other, words = CHAINS[name]
    remedy = (
        "begin with step.init(other.params(state)), or take the moments along with"
        " Checkpointer(...).restore(like=(step, params))"
    )
    assert said(lambda: make(2)(other().init(zoo.params()), zoo.batch(0))) == f"ValueError: {OTHER}{words}; {remedy}"


def test_parts_of_two_states_are_refused():
    """The chain of a state whose moments lie elsewhere, and masters in another dtype."""
    step, other = make(2), make(0)
    mine, theirs = step.init(zoo.params()), other.init(zoo.params())
    assert said(lambda: step(mine._replace(chain=theirs.chain), zoo.batch(0))).startswith(
        f"ValueError: {OTHER}the state of 'adamw' lies whole on every rank, but this step's lies cut"
    )
    half = mine._replace(params=mine.params.map(lambda b: b.bfloat16()))
    assert said(lambda: step(half, zoo.batch(0))).startswith(
        f"ValueError: {OTHER}its params are bfloat16, but this step keeps them in float32"
    )
    short = mine._replace(params=mine.params.map(lambda b: b[:-1]))
    assert said(lambda: step(short, zoo.batch(0))).startswith(f"ValueError: {OTHER}its params have [")


def accepted(stage, donate):
    """Bits after an update of a state, and of its copies."""
    step = make(stage)
    state, _ = step(step.init(zoo.params()), step.local_rows(zoo.batch(0)))
    copies = [
        state,
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        tree_map(lambda x: x * 1, state),
        tree_map(lambda x: x, state),
    ]
    rows, run = step.local_rows(zoo.batch(1)), fz.donate(step) if donate else step
    return {tree_hash(step.params(run(copy.deepcopy(s) if donate else s, rows)[0])) for s in copies}


COPIED = list(product((1, 2), range(4), (False, True)))


@EACH
def test_any_copy_of_a_state_is_as_good(run_world, whole):
    for world, stage, donate in COPIED if whole else cover(COPIED):
        assert len(zoo.everywhere(run_world, world, accepted, stage, donate)) == 1


def restored(folder, stage):
    step = make(stage)
    state, _ = step(step.init(zoo.params()), step.local_rows(zoo.batch(0)))
    saver = fz.Checkpointer(folder, step=step)
    saver.save(state, 1)
    saver.wait()
    back = saver.restore(1, like=(step, zoo.params())).state
    loss = [step.eval(zoo.loss_plain)(s, step.local_rows(zoo.batch(1))).loss.item() for s in (state, back)]
    after = [tree_hash(step.params(step(s, step.local_rows(zoo.batch(1)))[0])) for s in (state, back)]
    saver.close()
    return loss[0] == loss[1], after[0] == after[1]


def test_a_restored_state_is_taken_as_it_is(run_world, tmp_path):
    for stage in (1, 3):
        assert zoo.everywhere(run_world, 2, restored, str(tmp_path / f"stage{stage}"), stage) == (True, True)


def test_without_views_a_tree_map_meets_tensors_alone():
    state = make(3).init(zoo.params())
    assert state.views is None and all(isinstance(x, torch.Tensor) for x in tree.leaves(state))
    assert (
        tree_map(lambda x: x + 0, state).views is None
        and state._replace(views=None).views is None
        and state._asdict().keys() == set(state._fields)
    )


# --- row 3: masters that were replaced --------------------------------------------------------------------------------
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), *(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)), nn.Linear(6, 1)
    )


def module_loss(model, b):
    x = b["x"].to(next(model.parameters()).dtype)
    return model(x).float().square().sum(), torch.tensor(float(len(x)))


def module_source():
    loss_fn, params = fz.stateless(net(), module_loss)
    return loss_fn, params, {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(1))}


def averaged(stage, kind, policy):
    """By way of replacing the masters: do eval, view and an update see them, and with as many gathers?"""
    if kind == "module":
        loss_fn, params, batch = module_source()
        source = fz.value_and_grad(loss_fn, batch=P("data"))
    else:
        loss_fn, params, batch = zoo.loss_remat if kind == "remat" else zoo.loss_plain, zoo.params(), zoo.batch(1)
        source = fz.value_and_grad(loss_fn, batch=P("data"), units=() if kind == "whole" else ("blocks",))
    step = make(stage, source=source, policy=policy)
    rows, out = step.local_rows(batch), []
    for how in ("new buffers", "tree_map", "in place"):
        state, _ = step(step.init(params), rows)
        half = lambda x: x.detach() * 0.5
        if how == "in place":
            for b in state.params.buffers:
                b.mul_(0.5)
            ema = state
        else:
            ema = state._replace(
                params=state.params.map(half) if how == "new buffers" else tree_map(half, state.params)
            )
        right = step.init(step.params(ema))._replace(chain=state.chain, step=state.step, updates=state.updates)
        losses = [step.eval(loss_fn)(s, rows).loss.item() for s in (ema, right)]
        views = [tree_hash(step.view(s)) for s in (ema, right)]
        after = [tree_hash(step.params(step(s, rows)[0])) for s in (ema, right)]
        out += [how for a, b in (losses, views, after) if a != b]
    return out


REPLACED = list(product((1, 2), ("whole", "blocks", "remat", "module"), range(4), (None, "compute=bfloat16")))


@EACH
def test_replaced_masters_count_everywhere(run_world, whole):
    for world, kind, stage, policy in REPLACED if whole else cover(REPLACED, pairs=[(0, 2), (1, 3), (2, 3)]):
        assert zoo.everywhere(run_world, world, averaged, stage, kind, policy) == [], (world, kind, stage, policy)


def gathers():
    """Bytes gathered by an evaluation of a state, and of one whose masters were replaced."""
    step = make(1)
    state, _ = step(step.init(zoo.params()), step.local_rows(zoo.batch(0)))
    found = []
    for s in (state, state._replace(params=state.params.map(torch.clone))):
        with fz.count_bytes(step) as sent:
            step.eval(zoo.loss_plain)(s, step.local_rows(zoo.batch(1)))
        found.append(sent["data", "all_gather", "float32"])
    again = fz.donate(step)
    with fz.count_bytes(step) as sent:
        again(copy.deepcopy(state), step.local_rows(zoo.batch(1)))
    whole = sum(b.nbytes for b in state.params.buffers)
    return found, whole


def test_views_of_the_steps_own_are_not_gathered_again(run_world):
    (none, once), whole = zoo.everywhere(run_world, 2, gathers)
    assert none == 0 and 0 < once <= whole


def streamed():
    """A window over replaced masters gathers once, and gives the bits of one that was begun with them."""
    source = zoo.source()
    step = fz.train_step(source, fz.accumulate(2, stream=True), fz.shard("data", *zoo.tx()), mesh=MESH)
    state = step.init(zoo.params())
    state = state._replace(params=state.params.map(lambda b: b * 0.5))
    right = step.init(step.params(state))
    micros, out, sent = zoo.split(step.local_rows(zoo.batch(0)), 2), [], []
    for s in (state, right):
        with fz.count_bytes(step) as n:
            for m in micros:
                s, _ = step(s, m)
        sent.append(n["data", "all_gather", "float32"])
        out.append(tree_hash(step.params(step(s, None)[0])))
    return out[0] == out[1], sent[1] == 0 and sent[0] <= sum(b.nbytes for b in state.params.buffers)


def test_a_window_renews_views_once(run_world):
    assert zoo.everywhere(run_world, 2, streamed) == (True, True)


# --- row 5: derivatives -----------------------------------------------------------------------------------------------
def test_a_derivative_through_a_step_is_refused():
    loss = lambda p, b: (((torch.tanh(b @ p["w"]) - 1) ** 2).sum(), torch.tensor(4.0))
    for stage in range(4):
        step = make(stage, (fz.sgd(0.5, momentum=0.9),), source=fz.value_and_grad(loss, batch=P("data")))
        state, b = step.init({"w": torch.full((1, 1), 0.3)}), torch.ones(4, 1)
        graph = state._replace(params=state.params.map(lambda x: x.clone().requires_grad_()))
        words = "requires grad, but what the step returns would carry a wrong derivative; write fz.differentiable(step)"
        for call in ((step, graph, b), (step.eval(loss), graph, b), (step.view, graph), (step.params, graph)):
            assert said(*call).startswith(f"RuntimeError: step: 'params/buffers/0' of its state {words}")
        moments = state.chain["sgd"]._replace(count=state.chain["sgd"].count.clone().requires_grad_())
        assert "'chain/sgd/count' of its state requires grad" in said(step, state._replace(chain={"sgd": moments}), b)
        state.params.buffers[0].requires_grad_()
        assert words in said(step, state, b)
        through = lambda x, step=step, b=b, s=graph: step(s._replace(params=s.params.map(lambda _: x)), b)[1].loss
        told = said(torch.func.grad(through), torch.ones(16))
        assert "is batched or differentiated by torch.func" in told and "write fz.differentiable(step)" in told
        assert said(step, tree_map(torch.detach, graph), b) == ""


def test_worlds_of_one_are_not_alike_by_chance():
    """At W = 1 a whole leaf and a cut one have the same shape; they are told apart all the same, so that a program
    means the same on any world.
    """
    assert world_size() == 1 and said(lambda: make(0)(make(3).init(zoo.params()), zoo.batch(0))).startswith(
        f"ValueError: {OTHER}its parameters lie cut (part 1 of 1 over 'data')"
    )
