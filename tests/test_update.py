"""Rates as leaves of the state: schedules write them, hands edit them, checkpoints keep them, ranks compare them."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from optimizers import F64, MAKERS

import funczero as fz
from funczero import checkpoint, tree
from funczero.layout.processes import world_size
from funczero.testing import tree_hash

RULES = [("blocks/1", 1e-2), ("embed", fz.schedules.warmup_cosine(1e-2, 2, 8)), ("", 3e-2)]


def made(tx, stage=3, donate=False, dtype="float32"):
    step = fz.train_step(
        *fz.zero(zoo.source(), tx, stage=stage, accumulate=zoo.FEW // world_size()), mesh={"data": -1}, policy=dtype
    )
    return fz.donate(step) if donate else step


def updated(step, state, updates):
    for t in updates:
        state, m = step(state, step.local_rows(zoo.batch(t)))
    return state, m


def leaves(state, name):
    return dict(tree.paths(state.chain[name].rates))


# --- rates are leaves -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MAKERS)
def test_rates_are_float64_leaves_that_a_number_keeps_and_a_schedule_writes(name):
    schedule = fz.schedules.warmup_cosine(1e-2, 4, 10)
    step = made(MAKERS[name](schedule, weight_decay=0.1))
    state = step.init(zoo.params())
    assert math.isnan(leaves(state, name)["lr"]) and leaves(state, name)["weight_decay"] == 0.1
    for t, updates in [(0, 0), (1, 1), (2, 2), (zoo.BAD, 2), (4, 3)]:
        state, m = updated(step, state, [t])
        assert (
            leaves(state, name)["lr"] == schedule(torch.tensor(updates)) and leaves(state, name)["weight_decay"] == 0.1
        )  # of the last applied update
    for x in leaves(state, name).values():
        assert x.dtype == F64 and x.dim() == 0 and x.device.type == "cpu"


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_an_edited_number_counts_from_the_next_update(name, donate):
    """It is the run of an optimizer that was built with it."""
    first, second = (made(MAKERS[name](lr, weight_decay=d), donate=donate) for lr, d in ((1e-2, 0.1), (3e-2, 0.0)))
    state, _ = updated(first, first.init(zoo.params()), [0])
    want, _ = updated(
        second,
        tree.clone(state)._replace(
            chain={
                k: v._replace(rates=second.init(zoo.params()).chain[k].rates)
                for k, v in tree.clone(state).chain.items()
            }
        ),
        [1],
    )
    leaves(state, name)["lr"].fill_(3e-2)
    leaves(state, name)["weight_decay"].fill_(0.0)
    got, m = updated(first, state, [1])
    assert tree_hash([got.params, got.chain]) == tree_hash([want.params, want.chain]) and m.lr == 3e-2


def test_betas_and_momentum_may_be_edited_as_well():
    torchs = [(fz.from_torch(kind, 1e-2), what) for kind in ("NAdam", "Adamax") for what in ("b1", "b2")]
    for tx, what in ((fz.adamw(1e-2), "b1"), (fz.lion(1e-2), "b2"), (fz.sgd(1e-2, 0.9), "momentum"), *torchs):
        step = made(tx)
        state, _ = updated(step, step.init(zoo.params()), [0])
        other = tree.clone(state)
        leaves(other, tx.name)[what].fill_(0.5)
        assert tree_hash(updated(step, state, [1, 2])[0].params) != tree_hash(updated(step, other, [1, 2])[0].params)


def test_what_a_class_of_torch_does_not_take_is_no_leaf_that_could_be_edited_in_vain():
    held = {kind: [*fz.from_torch(kind, 1e-2).init(zoo.params()).rates] for kind in ("Rprop", "RMSprop", "RAdam")}
    assert held == {
        "Rprop": ["lr"],
        "RMSprop": ["lr", "weight_decay"],
        "RAdam": ["lr", "weight_decay", "b1", "b2"],
    }


def test_an_edit_of_one_state_leaves_others_alone():
    step = made(fz.adamw(1e-2))
    state = step.init(zoo.params())
    later, m = updated(step, state, [0])
    leaves(later, "adamw")["lr"].fill_(1.0)
    assert leaves(state, "adamw")["lr"] == 1e-2 and m.lr == 1e-2


def test_rules_and_trees_are_leaves_by_regex_and_by_path():
    step = made(fz.adamw(RULES, weight_decay=tree.map(lambda x: 0.1, zoo.params())))
    state, m = updated(step, step.init(zoo.params()), [0, 1])
    assert leaves(state, "adamw")["lr/blocks/1"] == 1e-2 and leaves(state, "adamw")["lr/"] == 3e-2 == m.lr
    assert (
        leaves(state, "adamw")["lr/embed"] == RULES[1][1](torch.tensor(1))
        and leaves(state, "adamw")["weight_decay/blocks/0/w"] == 0.1
    )
    state.chain["adamw"].rates["lr"][""].fill_(0.0)
    state.chain["adamw"].rates["weight_decay"]["conv"].fill_(0.0)
    after, _ = updated(step, state, [2])
    same = {
        n
        for (n, a), (_, b) in zip(tree.paths(step.params(state)), tree.paths(step.params(after)), strict=True)
        if torch.equal(a, b)
    }
    assert {"conv", "gain", "norm"} <= same and not {"embed"} & same


ODD = {
    "negative": (
        lambda r: r["lr"].fill_(-1.0),
        ValueError,
        "adamw: in its state: lr=-1.0 is below 0; write a finite number",
    ),
    "nan": (
        lambda r: r["weight_decay"].fill_(math.nan),
        ValueError,
        "adamw: in its state: weight_decay=nan is not finite",
    ),
    "a beta of one": (
        lambda r: r["b1"].fill_(1.0),
        ValueError,
        r"adamw: in its state: b1=1.0 is not below 1; write a number in \[0, 1\)",
    ),
    "a float": (
        lambda r: r.update(lr=0.1),
        TypeError,
        r"adamw: rates\['lr'\] of its state is a float; write it in place, as rates\['lr'\].fill_\(x\)",
    ),
    "a float32 tensor": (
        lambda r: r.update(lr=torch.tensor(0.1)),
        TypeError,
        r"is a float32 tensor of shape \(\); write it in place",
    ),
    "none": (
        lambda r: r.pop("lr"),
        TypeError,
        "adamw: the rates of its state have another form than it was built with",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_edit_that_is_no_rate_is_refused_before_anything_is_written(kind):
    edit, error, words = ODD[kind]
    step = made(fz.adamw(1e-2), donate=True)
    state, _ = updated(step, step.init(zoo.params()), [0])
    edit(state.chain["adamw"].rates)
    before = zoo.tree_hash([state.params, state.chain["adamw"].mu])
    with pytest.raises(error, match=words):
        step(state, step.local_rows(zoo.batch(1)))
    assert zoo.tree_hash([state.params, state.chain["adamw"].mu]) == before


def test_a_tied_leaf_that_is_edited_at_one_path_is_refused():
    step = made(fz.adamw(tree.map(lambda x: 0.1, zoo.params())))
    state = step.init(zoo.params())
    state.chain["adamw"].rates["lr"]["norm"].fill_(0.2)
    with pytest.raises(
        ValueError,
        match=(
            "adamw: lr: in its state the tree says two things of one tied parameter, norm = head/scale; write the same"
        ),
    ):
        step(state, step.local_rows(zoo.batch(1)))


def edited_alone():
    """An edit on rank 1 alone, and the sentence that every rank raises."""
    step = made(fz.adamw([("blocks", 1e-2), ("", 2e-2)]), 1)
    state, _ = updated(step, step.init(zoo.params()), [0])
    if torch.distributed.get_rank():
        state.chain["adamw"].rates["lr"]["blocks"].fill_(0.5)
    try:
        step(state, step.local_rows(zoo.batch(1)))
    except RuntimeError as e:
        return str(e)
    return "nothing"


def test_an_edit_on_one_rank_alone_is_told(run_world):
    for said in run_world(2, edited_alone):
        assert (
            "has 0.5 as adamw.rates.lr.blocks in step(state, batch) at step 1, while rank 0 has 0.01" in said
            and "hold the same state and rates" in said
        )


# --- checkpoints ------------------------------------------------------------------------------------------------------
def saved(tmp_path, tx, updates=(0, 1), edit=lambda rates: None):
    step = made(tx)
    state, _ = updated(step, step.init(zoo.params()), updates)
    edit(next(iter(state.chain.values())).rates)
    with checkpoint.Checkpointer(tmp_path) as ck:
        ck.save(state, 1)
    return step, state


def restored(tmp_path, tx, **kw):
    step = made(tx)
    return step, checkpoint.Checkpointer(tmp_path).restore(like=(step, zoo.params()), **kw)


def test_a_checkpoint_keeps_rates_and_its_value_counts(tmp_path):
    _, state = saved(tmp_path, fz.adamw(RULES), edit=lambda rates: rates["b2"].fill_(0.5))
    _, got = restored(tmp_path, fz.adamw([(RULES[0][0], 0.7), *RULES[1:]]))
    assert tree_hash(got.state._asdict()) == tree_hash(state._asdict())
    assert got.notes == (
        (
            "'adamw/rates/lr/blocks%2F1' is 0.01 in the checkpoint, which counts, and 0.7 in the script; write another"
            " value into the restored state"
        ),
        (
            "'adamw/rates/b2' is 0.5 in the checkpoint, which counts, and 0.999 in the script; write another value into"
            " the restored state"
        ),
    )


def test_a_script_that_says_the_same_is_told_nothing(tmp_path):
    saved(tmp_path, fz.adamw(RULES))
    assert restored(tmp_path, fz.adamw(RULES))[1].notes == ()


def test_a_schedule_that_becomes_a_number_and_a_number_that_becomes_a_schedule(tmp_path):
    schedule = fz.schedules.warmup_cosine(1e-2, 4, 10)
    saved(tmp_path / "a", fz.adamw(schedule))
    _, got = restored(tmp_path / "a", fz.adamw(1e-3))
    assert got.state.chain["adamw"].rates["lr"] == schedule(torch.tensor(1)) and "0.001 in the script" in got.notes[0]
    saved(tmp_path / "b", fz.adamw(1e-3))
    step, got = restored(tmp_path / "b", fz.adamw(schedule))
    assert got.notes == () and updated(step, got.state, [2])[1].lr == schedule(torch.tensor(2))


def test_a_schedule_that_had_written_nothing_leaves_the_scripts_number(tmp_path):
    saved(tmp_path, fz.adamw(lambda u: 0.1), updates=(zoo.BAD,))
    _, got = restored(tmp_path, fz.adamw(1e-3))
    assert got.state.chain["adamw"].rates["lr"] == 1e-3
    assert any("adamw/rates/lr = 0.001" in note for note in got.notes)


def test_rules_that_come_and_go_are_told(tmp_path):
    saved(tmp_path, fz.adamw([("embed", 0.1), ("", 0.2)]))
    _, got = restored(tmp_path, fz.adamw([("blocks", 0.3), ("", 0.2)]))
    assert got.state.chain["adamw"].rates["lr"]["blocks"] == 0.3
    assert got.notes == (
        "the script has no place for these rates of the checkpoint, which were left out: 'adamw/rates/lr/embed'",
        "the checkpoint says nothing of these rates, which come from the script: adamw/rates/lr/blocks = 0.3",
    )
