"""Law: a state that was saved is restored bit for bit on any world, mesh and stage, and training on gives the bits of
the uninterrupted run.
"""

from __future__ import annotations

from functools import cache

import checkpoints
import pytest
import zoo
from cover import EACH

from funczero.checkpoint import Checkpointer

SAVED = [(2, "3 [grad acc"), (1, "0 grad acc ar"), (4, "hpZ"), (3, "1 grad acc [")]
STAGES = ["0 grad acc ar", "1 grad acc [", "2 grad [acc", "3 [grad acc"]
NESTED = ["MiCS", "ZeRO-3", "hpZ", "hpZ outwards"]
HALF = 4


def saved(directory, chain, size, policy=None):
    """Train to HALF where the world allows the zoo's batch, and save."""
    step = checkpoints.make(chain, size, policy=policy)
    state = step.init(zoo.params(), key=7)
    state = checkpoints.train(step, state, 0, HALF) if zoo.MICROS % size == 0 else state
    with Checkpointer(directory, step=step) as ck:
        ck.save(state, HALF, client_state={"rank 0's": [1, (2, 3)]})
    return checkpoints.parts(state)


def restored(directory, chain, size, policy=None):
    """Read it here: the parts, what the notes say, and after the rest of the run the parts again."""
    step = checkpoints.make(chain, size, policy=policy)
    found = Checkpointer(directory).restore(like=(step, checkpoints.abstract()))
    assert found.client_state == {"rank 0's": [1, (2, 3)]} and found.name == str(HALF)
    first = checkpoints.parts(found.state)
    on = zoo.MICROS % size == 0
    return (
        first,
        found.notes,
        checkpoints.parts(checkpoints.train(step, found.state, int(found.state.step), zoo.UPDATES)) if on else None,
    )


def readers(size, whole):
    """(world, chain) to read what `size` ranks wrote: one of each world; what two wrote, at every stage of two, too.
    `whole`: at every stage of all worlds.
    """
    for world, chains in ((1, STAGES), (2, STAGES), (3, STAGES), (4, NESTED)):
        every = size == 2 and (whole or world == 2)
        yield from ((world, chain) for chain in (chains if every else chains[-1:]))


@cache
def uninterrupted():
    """The parts at the end of a run of one rank that was never saved."""
    step = checkpoints.make("0 grad acc ar", 1)
    return checkpoints.joined(
        [checkpoints.parts(checkpoints.train(step, step.init(zoo.params(), key=7), 0, zoo.UPDATES))]
    )


@EACH
@pytest.mark.parametrize(("size", "chain"), [*SAVED[:-1], pytest.param(*SAVED[-1], marks=pytest.mark.slow)])
def test_from_any_mesh_to_any_mesh(run_world, tmp_path, size, chain, whole):
    before = checkpoints.joined(
        run_world(size, saved, tmp_path, chain, size) if size > 1 else [saved(tmp_path, chain, 1)]
    )
    end = uninterrupted()
    for world, other in readers(size, whole):
        got = run_world(world, restored, tmp_path, other, world) if world > 1 else [restored(tmp_path, other, 1)]
        assert not checkpoints.same(before, checkpoints.joined([g[0] for g in got])), (world, other)
        assert got[0][1] == ()
        if got[0][2] is not None and size != 3:
            assert not checkpoints.same(end, checkpoints.joined([g[2] for g in got])), (world, other)


MIXED = "params=float32,compute=bfloat16,accumulate=float32"


@EACH
def test_views_in_another_dtype_are_made_again(run_world, tmp_path, whole):
    before = checkpoints.joined(run_world(2, saved, tmp_path, "3 [grad acc", 2, MIXED))
    ends = []
    for size, chain in ((1, "0 grad acc ar"), (2, "1 grad acc ["), (4, "hpZ"), (4, "ZeRO-1"))[: 4 if whole else 3]:
        got = (
            run_world(size, restored, tmp_path, chain, size, MIXED)
            if size > 1
            else [restored(tmp_path, chain, 1, MIXED)]
        )
        assert not checkpoints.same(before, checkpoints.joined([g[0] for g in got]))
        ends.append(checkpoints.joined([g[2] for g in got]))
    assert not any(checkpoints.same(ends[0], end) for end in ends[1:])
