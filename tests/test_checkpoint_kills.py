"""Ranks that are killed: what is on disk then is the checkpoint before or the new one, whole, and the run goes on with
the same bits.
"""

from __future__ import annotations

import random
from functools import cache

import checkpoints
import pytest
import zoo
from kills import CHAIN, Nursery, nursery

from funczero.checkpoint import Checkpointer, folder, manifest
from funczero.testing import tree_hash

OLD, NEW = 2, 4
BOTH, REPLACED, PRUNED = {"2": OLD, "4": NEW}, {"2": NEW}, {"4": NEW}
# The point, who dies, what is found (name: step), and how the world is. `tcp`: its store dies with rank 0. Without
# `quick` the pulse is the product's own. `poll`: the others ask at step boundaries instead of waiting. `signal`: how a
# rank falls silent. "absent" has died before the others save, "unread" before they restore: their patience for one that
# is late is 60 s.
POINTS = [
    ("asked", [0], {"2": OLD}, {"tcp": True}),
    ("asked", [1], {"2": OLD}, {"tcp": True, "quick": False}),
    ("absent", [0], {"2": OLD}, {"tcp": True}),
    ("absent", [1], {"2": OLD}, {"quick": False}),
    ("unread", [0], {"2": OLD}, {"tcp": True}),
    ("unread", [1], {"2": OLD}, {"tcp": True}),
    ("asked", [0], {"2": OLD}, {"tcp": True, "signal": "SIGSTOP"}),
    ("made", [1], {"2": OLD}, {"signal": "SIGSTOP"}),
    ("made", [0], {"2": OLD}, {"tcp": True, "signal": "SIGSTOP"}),
    ("copied", [0], {"2": OLD}, {}),
    ("copied", [1], {"2": OLD}, {}),
    ("made", [0], {"2": OLD}, {"quick": False}),
    ("made", [1], {"2": OLD}, {}),
    ("made", [0, 1], {"2": OLD}, {}),
    ("chunk", [1], {"2": OLD}, {}),
    ("chunk", [0, 1], {"2": OLD}, {}),
    ("written", [1], {"2": OLD}, {"quick": False}),
    ("written", [0], {"2": OLD}, {"tcp": True}),
    ("written", [0], {"2": OLD}, {"poll": True}),
    ("written", [1], {"2": OLD}, {"poll": True}),
    ("made", [0], {"2": OLD}, {"poll": True, "tcp": True}),
    ("merged", [0], {"2": OLD}, {}),
    ("merged", [1], BOTH, {}),
    ("sealed", [0, 1], {"2": OLD}, {}),
    ("renamed", [0], BOTH, {"tcp": True}),
    ("renamed", [1], BOTH, {}),
    ("beside", [0], REPLACED, {"overwrite": True}),
    ("between", [0, 1], REPLACED, {"overwrite": True}),
    ("swapped", [0], REPLACED, {"overwrite": True}),
    ("prune", [0], BOTH, {"keep": 1}),
    ("pruning", [0, 1], PRUNED, {"keep": 1}),
]


def form_of(case):
    """The point, who dies, and how the world is."""
    point, victims, _, more = case
    return point, "".join(map(str, victims)), "-".join(k for k in more if k in ("tcp", "quick", "poll", "signal"))


def name_of(case):
    return "-".join(filter(None, form_of(case)))


FEW = {  # one of each kind: asked, made, amid writing, committed, replaced, pruned; killed or stopped; one or both
    ("asked", "0", "tcp"),
    ("made", "1", "signal"),
    ("chunk", "1", ""),
    ("written", "0", "poll"),
    ("renamed", "1", ""),
    ("swapped", "0", ""),
    ("pruning", "01", ""),
}
CASES = [pytest.param(c, marks=() if form_of(c) in FEW else pytest.mark.slow, id=name_of(c)) for c in POINTS]


@pytest.fixture(scope="module")
def worlds(ends):
    """What all are forked from."""
    return Nursery(ends)


@pytest.fixture(scope="module")
def lives(request, worlds, tmp_path_factory):
    """All worlds that are asked for, a few at a time: by name (its folder, what its ranks told)."""
    root, out, running = tmp_path_factory.mktemp("kills"), {}, []
    own = [item for item in request.session.items if item.path == request.path]
    calls = [item.callspec for item in own if "lives" in getattr(item, "fixturenames", ())]
    waiting = sorted(
        (c.params["case"] for c in calls), key=lambda case: case[3].get("quick", True) and "signal" not in case[3]
    )  # first the long
    while waiting or running:
        while waiting and len(running) < 10:
            point, victims, _, more = case = waiting.pop(0)
            worlds.start(root / name_of(case), point=point, victims=victims, **more)
            running.append(name_of(case))
        name = running.pop(0)
        out[name] = (root / name / "run", worlds.told(root / name))
    return out


@cache
def uninterrupted(stop):
    """Hashes of a run's states by step; one rank, which has the bits of two."""
    step = checkpoints.make(CHAIN, 1)
    state = step.init(zoo.params(), key=7)
    out = {0: bits([checkpoints.parts(state)])}
    for t in range(stop):
        state = checkpoints.train(step, state, t, t + 1)
        out[t + 1] = bits([checkpoints.parts(state)])
    return out


def bits(by_rank):
    return tree_hash(checkpoints.joined(by_rank))


def go_on(directory, stop):
    """Restore, train on, save: the step that was found, and this rank's parts there and at the end."""
    step = checkpoints.make(CHAIN, 2)
    with Checkpointer(directory, step=step) as ck:
        found = ck.restore(like=(step, checkpoints.abstract()))
        first = checkpoints.parts(found.state)
        state = checkpoints.train(step, found.state, found.step, stop)
        ck.save(state, "after")
        ck.wait()
    return found.step, first, checkpoints.parts(state)


@pytest.mark.parametrize("case", CASES)
def test_killed_at_a_point(run_world, lives, case):
    directory, told = lives[name_of(case)]
    _, victims, expected, _ = case
    assert [told[r]["ended"] == -9 for r in range(2)] == [r in victims for r in range(2)], told
    died = max(e["at"] for rank in told for e in rank["events"] if e["what"] in ("dies", "kills"))
    for rank in {0, 1} - set(victims):
        last = told[rank]["events"][-1]
        assert last["what"] == "raised", f"rank {rank}: {last}\n{told[rank]['stderr']}"  # where it hung, if it did
        assert last["kind"] == "CheckpointError" and last["at"] - died < 10, told
        assert f"rank {victims[0]}" in last["text"], last
    assert {
        e.path.name.removesuffix(folder.NEW): e.manifest.step for e in folder.listing(directory).entries
    } == expected
    results, latest = run_world(2, go_on, directory, 6), max(expected.values())
    assert {r[0] for r in results} == {latest}
    assert bits([r[1] for r in results]) == uninterrupted(6)[latest]
    assert bits([r[2] for r in results]) == uninterrupted(6)[6]
    clean(directory, {*expected, "after"})


def clean(directory, names):
    """Nothing but these checkpoints is there, and no file of theirs is strange."""
    found = folder.listing(directory)
    assert {e.path.name for e in found.entries} == names and not (found.damaged or found.half or found.other), found
    assert {p.name for p in directory.iterdir()} == {*names, ".funczero-lock"}
    for e in found.entries:
        assert not manifest.check_files(e.path, e.manifest, strangers=True)


def test_one_that_dies_before_its_first_call_is_missed_at_once(worlds, tmp_path):
    """It joined a world that somebody else made, built its step and nothing more; the others' patience is the product's
    own 60 s.
    """
    step = checkpoints.make(CHAIN, 1)
    with Checkpointer(tmp_path / "run", step=step) as ck:
        ck.save(step.init(zoo.params(), key=7), 0)
    worlds.start(tmp_path, point="born", victims=[1])
    told = worlds.told(tmp_path)
    died, last = told[1]["events"][-1]["at"], told[0]["events"][-1]
    assert (
        told[1]["ended"] == -9 and last["what"] == "raised" and last["at"] - died < 10 and "rank 1" in last["text"]
    ), told


@pytest.mark.slow
def test_killed_at_100_random_moments(tmp_path):
    """One run after another, each of 100 lives goes on where the last one ended. With -s it prints what happened."""
    rng, directory, log = random.Random(0), tmp_path / "run", []
    reference, step = uninterrupted(0), checkpoints.make(CHAIN, 1)
    with Checkpointer(directory, step=step, keep=2) as ck:
        ck.save(step.init(zoo.params(), key=7), 0)
    with nursery() as n:
        for i in range(100):
            victims, clock = rng.choice([[0], [1], [0, 1]]), rng.uniform(0.0, 0.8)
            n.start(tmp_path, clock=clock, victims=victims, after=rng.choice(["joined", "trains", "trains", "trains"]))
            told = n.told(tmp_path)
            assert all(told[r]["ended"] == -9 for r in victims), told
            survivors = [e for r in {0, 1} - set(victims) for e in told[r]["events"] if e["what"] == "raised"]
            assert len(survivors) == 2 - len(victims) and all(
                told[r]["ended"] == 1 for r in {0, 1} - set(victims)
            ), told
            assert all(e["at"] - told[0]["struck"] < 10 for e in survivors), told
            saves = [e["step"] for e in told[0]["events"] if e["what"] == "saves"]
            there = folder.listing(directory)
            assert not there.damaged and not there.other
            found = Checkpointer(directory).restore(like=(step, checkpoints.abstract()))
            reference = uninterrupted(found.step) if found.step not in reference else reference
            assert bits([checkpoints.parts(found.state)]) == reference[found.step]
            asked = max(saves, default=0)
            log.append(
                (
                    i,
                    victims,
                    clock,
                    asked,
                    found.step,
                    found.name,
                    there.half,
                    [e.path.name for e in there.entries],
                    survivors[0]["kind"] if survivors else "-",
                )
            )
            assert found.step >= asked - 2  # every save but the last one was waited for
        n.start(tmp_path, clock=3.0, victims=[0, 1], after="trains")
        n.told(tmp_path)
    with Checkpointer(directory, step=step, keep=2) as ck:
        found = ck.restore(like=(step, checkpoints.abstract()))
        stop = found.step + 6
        assert (
            bits([checkpoints.parts(checkpoints.train(step, found.state, found.step, stop))])
            == uninterrupted(stop)[stop]
        )
        ck.save(found.state, "after")
        ck.wait()
        clean(directory, {e.path.name for e in folder.listing(directory).entries})
    print(
        "\nlife  dies   at s   last save  found  named      half written                            complete           "
        "    survivor raised"
    )
    for i, victims, clock, asked, step_, name, half, entries, kind in log:
        print(
            f"{i:4}  {str(victims):6} {clock:5.3f}  {asked:9}  {step_:5}  {name:9}  {', '.join(half) or '-':38} "
            f" {', '.join(entries):21}  {kind}"
        )
    lost, found, none = sum(x[3] > x[4] for x in log), sum(0 < x[3] == x[4] for x in log), sum(not x[3] for x in log)
    print(
        f"of {len(log)} lives {lost} lost the save under way, {found} ended with the last one they asked for, {none}"
        " ended before their first"
    )
