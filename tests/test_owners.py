"""States that lie whole with a leaf's owner: named by the parameter's path, read by any world and stage."""

from __future__ import annotations

import copy
import pickle

import pytest
import zoo
from cover import EACH
from leaves import TX, going_on, trained

import funczero as fz
from funczero.checkpoint.names import named
from funczero.layout.processes import world_size
from funczero.testing.simulate import simulate

# --- checkpoints ------------------------------------------------------------------------------------------------------
OWNERS = {name: TX[name] for name in ("adafactor", "shampoo", "soap")}


def stepped(name, stage):
    parts = fz.zero(zoo.source(), OWNERS[name], stage=stage, accumulate=zoo.FEW // world_size())
    return fz.train_step(*parts, mesh={"data": -1})


def saved(folder, name, stage):
    step = stepped(name, stage)
    state = step.init(zoo.params())
    for t in (0, 1):
        state, _ = step(state, step.local_rows(zoo.batch(t)))
    with fz.Checkpointer(folder) as ck:
        ck.save(state, 1)
    return going_on(step, state, (2, 4))


def restored(folder, name, stage):
    step = stepped(name, stage)
    got = fz.Checkpointer(folder).restore(like=(step, zoo.params()))
    return going_on(step, got.state, (2, 4)), got.notes


@pytest.mark.parametrize(
    ("name", "worlds"), [("shampoo", (1, 2)), pytest.param("adafactor", (1, 2, 4), marks=pytest.mark.slow)]
)
@EACH
def test_states_of_owners_are_read_by_any_world(run_world, tmp_path, name, worlds, whole):
    """Saved on two ranks at stage 3, and in one process: whoever goes on has the bits of the run that never ended."""
    want = zoo.everywhere(run_world, 2, saved, tmp_path / "a", name, 3)
    assert saved(tmp_path / "b", name, 0) == want
    for folder in ("a", "b"):
        for world in worlds if whole else worlds[folder == "b" :][:1]:
            assert zoo.everywhere(run_world, world, restored, tmp_path / folder, name, 3) == (want, ())


def test_states_of_owners_are_named_by_their_parameters_path():
    """The same names and whole shapes at every stage; a leaf that another optimizer has is not among them."""
    parts = [named(trained(TX["shampoo"], stage, updates=0)[1]).parts for stage in (0, 3)]
    assert parts[0].keys() == parts[1].keys()
    assert parts[0]["shampoo/left/blocks/0/w"].shape == (5, 5) and parts[0]["shampoo/roots/right/conv"].shape == (
        3,
        5,
        5,
    )
    assert "shampoo/trace/head/w" in parts[0] and not any(n.startswith("shampoo") and "embed" in n for n in parts[0])


def resharded(name):
    two, three = (stepped(name, s) for s in (1, 3))
    state = two.init(zoo.params())
    for t in (0, 1):
        state, _ = two(state, two.local_rows(zoo.batch(t)))
    return going_on(two, state, (2,)), going_on(three, fz.reshard(state, three), (2,))


@pytest.mark.parametrize("name", OWNERS)
def test_states_of_owners_are_handed_to_another_stage(name):
    for one, other in simulate({"data": 2})(resharded, name):
        assert one == other


def test_only_the_owner_holds_a_state():
    """Two ranks together hold each preconditioner once."""
    chains = simulate({"data": 2})(lambda: trained(TX["shampoo"], 1, updates=0)[1].chain["shampoo"])
    held = [sum(b.numel() for b in c.left.buffers) for c in chains]
    alone = sum(b.numel() for b in trained(TX["shampoo"], 1, updates=0)[1].chain["shampoo"].left.buffers)
    assert sum(held) - alone < 5 * 16 * 3 and min(held) > alone / 4  # the batch of matrices is cut as it lies


@pytest.mark.parametrize("name", ["shampoo", "muon", "adafactor"])
def test_a_copy_of_such_a_state_is_as_good(name):
    step, state = trained(TX[name], 3, updates=1)
    want = going_on(step, state, (1,))
    for copied in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert going_on(step, copied, (1,)) == want
