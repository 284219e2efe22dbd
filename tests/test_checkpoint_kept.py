"""What a folder of checkpoints keeps, and in which order: names that are taken, latest, best, and a rollback."""

from __future__ import annotations

import math
import os

import checkpoints
import pytest
from attempts import CHAIN, bits, no_space, saves, started, steps, whole

from funczero.checkpoint import Checkpointer, CheckpointError, folder

# names that are taken


def taken(directory):
    step, state = started(2)
    out, full = [], no_space(1, "write")
    full.on = False
    with Checkpointer(directory, step=step, passing=full) as ck:
        assert saves(ck, state, "a", "b") is None
        out.append(saves(ck, state, "a"))
        later = checkpoints.train(step, state, 1, 2)
        assert saves(ck, later, "a", overwrite=True) is None
        assert saves(ck, later, "new", overwrite=True) is None
        out += [
            bits(ck.restore("a", like=state).state) == bits(later),
            bits(ck.restore("b", like=state).state) == bits(state),
        ]
        out.append([e.path.name for e in folder.listing(directory).entries])
        full.on = True
        out.append(saves(ck, state, "a", overwrite=True))
        full.on = False
        out.append(bits(ck.restore("a", like=state).state) == bits(later))
        assert saves(ck, state, "c") is None
    return out


def test_a_name_that_is_there(run_world, tmp_path):
    """It is refused, or with overwrite replaced: a failed replacement leaves the old one."""
    for refused, replaced, untouched, order, failed, still in run_world(2, taken, tmp_path):
        assert refused[0] == "FileExistsError" and "overwrite=True" in refused[1]
        assert (
            replaced
            and untouched
            and order == ["b", "a", "new"]
            and failed[0] in ("CheckpointError", "OSError")
            and still
        )
    whole(tmp_path, "b", "a", "new", "c")


def test_an_empty_folder_of_that_name_is_a_name_that_is_there(tmp_path):
    _, state = started(1)
    (tmp_path / "7").mkdir()
    ck = Checkpointer(tmp_path)
    assert saves(ck, state, 7)[0] == "FileExistsError"
    assert saves(ck, state, 7, overwrite=True) is None
    whole(tmp_path, "7")


# what stays, and in which order


def kept(directory, losses, name=lambda t: t, **how):
    """The names that stay after saves at steps 1, 2, ... with these losses."""
    _, states = steps(len(losses))
    with Checkpointer(directory, **how) as ck:
        for t, loss in enumerate(losses, 1):
            ck.save(states[t - 1], name(t), metrics=None if loss is None else {"loss": loss})
        ck.wait()
    return [e.path.name for e in folder.listing(directory).entries]


NAN = math.nan


@pytest.mark.parametrize(
    "how, losses, stay",
    [
        ({}, [1, 2, 3], ["1", "2", "3"]),
        ({"keep": 1}, [1, 2, 3], ["3"]),
        ({"keep": 2}, [1, 2, 3], ["2", "3"]),
        ({"keep": 1, "keep_period": 2}, [0] * 5, ["2", "4", "5"]),
        ({"keep_period": 2}, [0] * 3, ["1", "2", "3"]),
        ({"keep": 1, "best": ("loss", "min")}, [3, 1, 2, 4], ["2", "4"]),
        ({"keep": 1, "best": ("loss", "max")}, [3, 5, 2, 4], ["2", "4"]),
        ({"keep": 1, "best": ("loss", "min")}, [NAN, 3, NAN, 4], ["2", "4"]),
        ({"keep": 1, "best": ("loss", "max")}, [NAN, 3, NAN, 1], ["2", "4"]),
        ({"keep": 1, "best": ("loss", "min")}, [NAN, NAN, NAN], ["3"]),
        ({"keep": 1, "best": ("loss", "min")}, [None, 2, None], ["2", "3"]),
        ({"keep": 1, "best": ("loss", "min")}, [math.inf, -math.inf, 1], ["2", "3"]),
        ({"keep": 1, "best": ("loss", "min")}, [2, 2, 2], ["1", "3"]),
        ({"keep": 1, "best": ("other", "min")}, [2, 2, 2], ["3"]),
    ],
    ids=str,
)
def test_what_stays(tmp_path, how, losses, stay):
    assert kept(tmp_path, losses, **how) == stay
    whole(tmp_path, *stay)


def test_best_and_its_ties_and_nan(tmp_path):
    kept(tmp_path, [2, NAN, 1, 1, NAN], best=("loss", "min"))
    like = (checkpoints.make(CHAIN, 1), checkpoints.abstract())
    assert Checkpointer(tmp_path, best=("loss", "min")).restore("best", like=like).name == "3"
    assert Checkpointer(tmp_path, best=("loss", "max")).restore("best", like=like).name == "1"
    with pytest.raises(CheckpointError, match="has a number for the metric 'bpb'"):
        Checkpointer(tmp_path, best=("bpb", "max")).restore("best", like=like)
    with pytest.raises(ValueError, match="best"):
        Checkpointer(tmp_path).restore("best", like=like)


def test_latest_is_the_last_commit_not_the_largest_name(tmp_path):
    names = {1: 1000, 2: "zz", 3: 9, 4: 10, 5: "aa", 6: 0.693}
    assert kept(tmp_path, [0] * 6, name=names.get) == [str(x) for x in names.values()]
    like = (checkpoints.make(CHAIN, 1), checkpoints.abstract())
    assert Checkpointer(tmp_path).restore(like=like).name == "0.693"
    found = folder.listing(tmp_path).entries
    os.utime(found[0].path)  # nor the youngest folder
    assert Checkpointer(tmp_path).restore(like=like).name == "0.693"


def test_a_rollback_and_saves_anew(tmp_path):
    """Back to step 2, other data, the same names: keep counts commits, latest is the new one, nothing of the left
    branch comes back.
    """
    step, states = steps(4)
    like = (step, checkpoints.abstract())
    with Checkpointer(tmp_path, keep=3, best=("loss", "min")) as ck:
        for t in (1, 2, 3, 4):
            ck.save(states[t - 1], t, metrics={"loss": 5 - t})
        found = ck.restore(2, like=like)
        assert bits(found.state) == bits(states[1])
        state = checkpoints.train(step, found.state, 5, 6)
        assert int(state.step) == 3
        assert saves(ck, state, 3)[0] == "FileExistsError"
        assert saves(ck, state, 3, overwrite=True, metrics={"loss": NAN}) is None
        latest = ck.restore(like=like)
        assert latest.name == "3" and bits(latest.state) == bits(state) != bits(states[2])
        assert ck.restore("best", like=like).name == "4"
        whole(tmp_path, "2", "4", "3")
        ck.save(checkpoints.train(step, state, 6, 7), 4, overwrite=True)
        ck.wait()
        assert ck.restore(like=like).name == "4" and ck.restore("best", like=like).name == "2"
    whole(tmp_path, "2", "3", "4")


def test_overwriting_the_only_one_keeps_it(tmp_path):
    step, states = steps(2)
    with Checkpointer(tmp_path, keep=1) as ck:
        for state in states:
            ck.save(state, "last", overwrite=True)
    whole(tmp_path, "last")
    found = Checkpointer(tmp_path).restore(like=(step, checkpoints.abstract()))
    assert found.step == 2 and bits(found.state) == bits(states[1])
