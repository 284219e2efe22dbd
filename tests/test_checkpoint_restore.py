"""Restoring something else: another chain, a part, another dtype, names that are none, and an open window."""

from __future__ import annotations

import checkpoints
import pytest
import torch
import zoo

import funczero as fz
from funczero.checkpoint import Checkpointer, CheckpointError
from funczero.testing import tree_hash


def test_a_transform_the_checkpoint_does_not_know_starts_fresh_and_half_of_one_is_an_error(tmp_path):
    grad = fz.value_and_grad(lambda p, b: ((p["w"] * b).sum(), b.sum()))
    plain_step, scaled = fz.train_step(grad, fz.sgd(0.1)), fz.train_step(
        grad, fz.scale_loss(8.0, weight=2), fz.sgd(0.1)
    )
    params = {"w": torch.arange(3.0)}
    with Checkpointer(tmp_path) as ck:
        ck.save(plain_step.init(params, key=5), 1)
        got = ck.restore(like=(scaled, params))
        assert got.notes == ("the checkpoint holds nothing of 'scale_loss', which starts fresh",)
        assert got.state.chain["scale_loss"].scale == 8 and got.state.key == 5
        ck.save(scaled.init(params), 2)
        assert ck.restore(2, like=(plain_step, params)).notes == (
            "'scale_loss' of the checkpoint is not in this chain and was left out",
        )
        more = {"w": torch.zeros(3), "v": torch.zeros(2)}
        with pytest.raises(CheckpointError, match="has no 'params/v'"):
            ck.restore(like=(scaled, more))
        kept = ck.restore(like=(scaled, more), strict=False)
        assert "stay as they were" in kept.notes[0]
        ck.save(plain_step.init(more), 3)
        with pytest.raises(CheckpointError, match=r"also holds 'params/w'.*strict=False"):
            ck.restore(3, like=(plain_step, {"v": torch.zeros(2)}))
        with pytest.raises(CheckpointError, match=r"shape \[4\] in the state and \[3\] in the checkpoint"):
            ck.restore(2, like=(scaled, {"w": torch.zeros(4)}))
        renamed = ck.restore(2, like=(scaled, {"new": torch.zeros(3)}), rename=[("new", "w")])
        assert scaled.params(renamed.state)["new"].tolist() == [0, 1, 2]
        with pytest.raises(CheckpointError, match="no leaf's name matches"):
            ck.restore(like=(scaled, params), only="^nothing")


def test_partial_restore_leaves_the_rest_as_it_was(tmp_path):
    step, state = checkpoints.tiny(w=torch.arange(3.0), v=torch.ones(2))
    with Checkpointer(tmp_path) as ck:
        ck.save(state, 1)
        other = step.init({"w": torch.zeros(3), "v": torch.zeros(2)}, key=9)
        got = ck.restore(like=other, only=["^params/w$"])
    assert (
        step.params(got.state)["w"].tolist() == [0, 1, 2]
        and step.params(got.state)["v"].tolist() == [0, 0]
        and int(got.state.key) == 9
    )
    assert step.params(other)["w"].tolist() == [0, 0, 0]  # like is left as it is


def test_dtypes_are_cast_between_floats_with_a_note_and_never_to_or_from_others(tmp_path):
    grad = fz.value_and_grad(lambda p, b: ((p["w"] * b).sum(), b.sum()))
    wide, narrow = (
        fz.train_step(grad, fz.sgd(0.1, momentum=0.9), policy=f"params={d},compute={d}")
        for d in ("float32", "bfloat16")
    )
    params = {"w": torch.tensor([1.0, 1 + 2**-10])}
    with Checkpointer(tmp_path) as ck:
        ck.save(wide.init(params), 1)
        got = ck.restore(like=(narrow, fz.tree.map(lambda x: x.bfloat16(), params)))
        assert "were cast from float32 to bfloat16" in got.notes[0]
        assert torch.equal(narrow.params(got.state)["w"], params["w"].bfloat16())
        state = wide.init(params)
        with pytest.raises(
            CheckpointError,
            match="'step' is float32 in the state and int64 in the checkpoint; only floating dtypes are cast",
        ):
            ck.restore(like=state._replace(step=torch.zeros(())))


def test_names_of_checkpoints(tmp_path):
    step, state = checkpoints.tiny(w=torch.ones(1))
    ck = Checkpointer(tmp_path)
    for name in (3, "global_step100", 0.6931471824645996, "ä b"):
        ck.save(state, name)
        assert ck.wait() == str(name) and ck.restore(name, like=state).name == str(name) == ck.restore(like=state).name
    for bad in (
        "",
        "../x",
        "a/b",
        "/abs",
        ".hidden",
        "a\x00b",
        "a\nb",
        "latest",
        "best",
        " x",
        "x.funczero-new",
        True,
        None,
        "x" * 300,
        b"x",
    ):
        with pytest.raises(ValueError, match="cannot name a checkpoint"):
            ck.save(state, bad)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ck.save(state, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ['.funczero-lock', '3', 'global_step100', '0.6931471824645996', 'ä b']
    )


@pytest.mark.parametrize("bad", [dict(keep=0), dict(keep_period=0), dict(best=("a", "most")), dict(config=object())])
def test_wrong_arguments(bad, tmp_path):
    with pytest.raises((ValueError, TypeError)):
        Checkpointer(tmp_path, **bad)


def test_nothing_there_says_what_was_found(tmp_path):
    step, state = checkpoints.tiny(w=torch.ones(1))
    ck = Checkpointer(tmp_path / "none")
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        ck.restore(like=state)
    (tmp_path / "none" / "40").mkdir(parents=True)
    (tmp_path / "none" / "20.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(CheckpointError, match=r"half written: \['20.orbax-checkpoint-tmp'\], no checkpoints: \['40'\]"):
        ck.restore(like=state)
    with pytest.raises(CheckpointError, match="there is no checkpoint '7'"):
        ck.restore(7, like=state)


# streams


def stream_run(directory, save, stage, size):
    """A window of four, saved after three; what the rest of it gives."""
    acc = fz.accumulate(4, stream=True)
    g = zoo.source()
    parts = (
        (fz.shard("data", g, acc, *zoo.tx(scale=True)),)
        if stage == 3
        else (g, acc, fz.shard("data", *zoo.tx(scale=True)))
    )
    step = fz.train_step(*parts, mesh={"data": size})
    ck = Checkpointer(directory, step=step)
    if save:
        state = step.init(zoo.params())
        pieces = [zoo.split(step.local_rows(zoo.batch(t)), 4) for t in range(2)]
        for b in (*pieces[0], None, *pieces[1][:3]):
            state, _ = step(state, b)
        ck.save(state, 1)
        ck.wait()
        state, _ = step(step(state, pieces[1][3])[0], None)
        return checkpoints.parts(state), ()
    got = ck.restore(like=(step, checkpoints.abstract()))
    state, done = got.state, int(got.state.chain["accumulate"].count)
    assert done == (3 if not got.notes else 0) and int(state.step) == 1
    for b in (*zoo.split(step.local_rows(zoo.batch(1)), 4)[done:], None):
        state, _ = step(state, b)
    return checkpoints.parts(state), got.notes


@pytest.mark.parametrize("stage", [1, 3])
def test_an_open_window_goes_on_in_the_same_world_and_is_replayed_elsewhere(run_world, tmp_path, stage):
    before = run_world(2, stream_run, tmp_path, True, stage, 2)
    for size, other in ((2, stage), (2, 4 - stage)):
        got = run_world(2, stream_run, tmp_path, False, other, size)
        assert bool(got[0][1]) == (other != stage)
        if other == stage:
            assert all(tree_hash(a[0]) == tree_hash(b[0]) for a, b in zip(before, got, strict=True))
        else:
            assert "3 micro-batches of an open window were left out" in got[0][1][0]
            assert not checkpoints.same(
                checkpoints.joined([b[0] for b in before]), checkpoints.joined([g[0] for g in got])
            )
