"""Checkpoints of an engine: resumed anywhere with the same bits, named as a loop names them, and refused in one
sentence.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from engines import DTYPES, WARM, Net, Norm, a, config, make, rows
from safetensors.torch import load_file

import funczero as fz
import funczero.deepspeed as deepspeed
from funczero.checkpoint import commit
from funczero.deepspeed import comm
from funczero.testing import WorkerPool, tree_hash

K = 2


def micros():
    """Micro-batches of an update on a rank, so that an update is four of the same shape on any world."""
    return 4 // comm.get_world_size()


def built(stage, precision="fp32", k=None, **more):
    return deepspeed.initialize(
        model=Net(), config=config(stage, micros() if k is None else k, precision, **WARM, **more)
    )


def go(engine, first, last, precision="fp32"):
    """Micro-batches [first, last) of this rank."""
    k = engine.gradient_accumulation_steps()
    batches = rows(4 * k * comm.get_world_size(), -(-last // k), k, DTYPES[precision])
    for j in range(first, last):
        micro = zoo.split(engine.train_step.local_rows(batches[j // k]), k)[j % k]
        engine.backward(F.cross_entropy(engine(micro["x"]).float(), micro["y"]))
        engine.step()


def whole(engine):
    return tree_hash(engine.train_step.params(engine.state))


def save_run(directory, stage, updates, mid, end, precision):
    engine, *_ = built(stage, precision)
    k = micros()
    go(engine, 0, updates * k + mid, precision)
    assert engine.save_checkpoint(directory, torch.tensor(1.25).item(), client_sd={"step": updates, "seen": (1, 2)})
    go(engine, updates * k + mid, end * k, precision)
    return whole(engine)


def load_run(directory, stage, updates, mid, end, precision):
    engine, *_ = built(stage, precision)
    k = micros()
    path, client = engine.load_checkpoint(directory, 1.25)
    assert client == {"step": updates, "seen": (1, 2)} and Path(path) == Path(directory, "1.25")
    assert (engine.global_steps, engine.micro_steps) == (updates, updates * k + mid)
    go(engine, engine.micro_steps, end * k, precision)
    return whole(engine)


@pytest.mark.parametrize(
    "one,other,mid,precision",
    [
        ((1, 0), (2, 3), 0, "fp32"),
        ((2, 3), (1, 1), 0, "bf16"),
        ((2, 2), (2, 2), 1, "fp16"),
        ((2, 3), (2, 3), 1, "fp32"),
        ((1, 0), (1, 0), 3, "bf16"),
    ],
)
def test_another_world_and_stage_goes_on_with_the_same_bits(run_world, tmp_path, one, other, mid, precision):
    there = run_world(one[0], save_run, tmp_path, one[1], 2, mid, 5, precision)
    here = run_world(other[0], load_run, tmp_path, other[1], 2, mid, 5, precision)
    assert len({*there, *here}) == 1


def left_out(directory, stage):
    engine, *_ = built(stage)
    engine.load_checkpoint(directory, 1.25)
    assert (engine.global_steps, engine.micro_steps) == (2, 2 * micros()) and not engine.state.chain[
        "accumulate"
    ].partial
    return True


def test_an_open_window_is_left_out_elsewhere(run_world, tmp_path):
    run_world(2, save_run, tmp_path, 2, 2, 1, 3, "fp32")
    assert all(run_world(2, left_out, tmp_path, 3))


def test_latest_as_text_replaced_tags_and_a_fresh_start(tmp_path):
    engine = make(1)
    with pytest.raises(fz.CheckpointError, match="there is no"):
        engine.load_checkpoint(tmp_path / "nothing", "good")
    assert engine.load_checkpoint(None) == engine.load_checkpoint(tmp_path / "nothing") == (None, None)
    assert engine.save_checkpoint(tmp_path)
    go(engine, 0, 1)
    engine.save_checkpoint(tmp_path, "good", client_state=[1])
    first = whole(engine)
    go(engine, 1, 2)
    engine.save_checkpoint(tmp_path, "good", client_state=[2], save_latest=False)
    second = whole(engine)
    assert (tmp_path / "latest").read_text() == "good" and sorted(
        p.name for p in tmp_path.iterdir() if p.name[0] != "."
    ) == ["global_step0", "good", "latest"]
    assert engine.load_checkpoint(tmp_path)[1] == [2] and whole(engine) == second != first
    assert (
        engine.load_checkpoint(tmp_path, "global_step0") == (str(tmp_path / "global_step0"), {})
        and engine.global_steps == 0
    )
    with pytest.raises(fz.CheckpointError, match="there is no checkpoint 'wrong' in .*; found complete: .*good"):
        engine.load_checkpoint(tmp_path, "wrong")
    for wrong, said in (
        (dict(save_dir=""), "save_dir is empty"),
        (dict(save_dir=tmp_path, client_state=1, client_sd=2), "two names of one argument"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            engine.save_checkpoint(**wrong)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_module_alone_or_without_the_optimizers_state(tmp_path, stage):
    engine, *_ = built(1, k=2)
    go(engine, 0, 6)
    engine.save_checkpoint(tmp_path)
    fresh, *_ = built(stage, k=2)
    fresh.load_checkpoint(tmp_path, load_module_only=True)
    assert whole(fresh) == whole(engine) and fresh.global_steps == 0 and fresh.get_lr() == [1e-3]
    fresh.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert fresh.global_steps == 3 and fresh.get_lr() == engine.get_lr() and int(fresh.state.chain["adamw"].count) == 0
    fresh.load_checkpoint(tmp_path)
    assert int(fresh.state.chain["adamw"].count) == 3


@pytest.mark.parametrize("stage", [0, 3])
def test_buffers_a_clients_scheduler_and_an_edited_lr_come_back(tmp_path, stage):
    def build():
        c = config(stage, 1)
        return deepspeed.initialize(
            model=Norm(), config=c, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)
        )

    engine, optimizer, _, scheduler = build()
    for _ in range(3):
        engine.backward(engine(a[0]).square().mean())
        engine.step()
    optimizer.param_groups[0]["lr"] = 0.125
    engine.save_checkpoint(tmp_path)
    other, face, _, mine = build()
    other.load_checkpoint(tmp_path)
    assert face.param_groups[0]["lr"] == 0.125 and mine.last_epoch == scheduler.last_epoch == 3
    assert all(torch.equal(x, y) for x, y in zip(engine.module.buffers(), other.module.buffers(), strict=True))


def test_a_plain_chains_checkpoint_and_deepspeeds_own(tmp_path):
    chain, resolved = fz.from_deepspeed(config(2, K, **WARM), pullback=True, trainable=lambda path: path != "last.bias")
    step = fz.train_step(*chain, **resolved.arguments)
    state = step.init({n: p.detach() for n, p in Net().named_parameters()})
    for x in (1.0, 2.0):
        views = step.view(state)
        loss = sum(p.sum() for p in views.values()) * x
        state, _ = step(step(state, (fz.pull(loss, views), loss, 1.0))[0], None)
    with fz.Checkpointer(tmp_path / "plain", step=step) as ck:
        ck.save(state, 7, client_state={"mine": 1})
    engine, *_ = built(3, k=K)
    assert engine.load_checkpoint(tmp_path / "plain")[1] == {"mine": 1} and whole(engine) == tree_hash(
        step.params(state)
    )
    assert (
        engine.get_lr() == [pytest.approx(float(fz.schedules.warmup_lr(1e-2, 4, 1e-3)(torch.tensor(2))))]
        and engine.micro_steps == 4
    )
    theirs = tmp_path / "ds" / "global_step3"
    theirs.mkdir(parents=True)
    (theirs / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(
        fz.CheckpointError,
        match=r"is DeepSpeed's, .*`python .*zero_to_fp32.py .* OUT --safe_serialization` and `funczero import OUT NEW`",
    ):
        engine.load_checkpoint(tmp_path / "ds")


@pytest.mark.parametrize("stage", [0, 3])
def test_a_16_bit_file_and_a_state_dict_both_ways(tmp_path, stage):
    key = {"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}}
    engine = make(stage, bf16={"enabled": True}, **key)
    assert engine.save_16bit_model(tmp_path, "model.safetensors") and engine.save_16bit_model(tmp_path)
    want = {n: x.bfloat16() for n, x in Net().state_dict().items()}
    for got in (load_file(tmp_path / "model.safetensors"), torch.load(tmp_path / "pytorch_model.bin")):
        assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    other = Net(seed=1).state_dict()
    engine.load_module_state_dict(other)
    assert all(torch.equal(x, other[n]) for n, x in engine.train_step.params(engine.state).items())
    assert all(torch.equal(x, other[n].bfloat16()) for n, x in engine.module.state_dict().items())
    with pytest.raises(KeyError, match="'other' is only in the state_dict"):
        engine.load_module_state_dict({**other, "other": torch.ones(1)})
    with pytest.raises(ValueError, match="save_16bit_model: at stage 3 it gathers"):
        make(3).save_16bit_model(tmp_path)


def tags(directory, validation):
    engine, *_ = built(2, checkpoint={"tag_validation": validation})
    try:
        engine.save_checkpoint(directory, 0.5 + comm.get_rank())
    except ValueError as e:
        return str(e)
    return sorted(p.name for p in Path(directory).iterdir() if p.is_dir())


def test_rank_0s_tag_counts_when_ranks_name_different_ones(run_world, tmp_path):
    assert run_world(2, tags, tmp_path / "warn", "Warn")[0] == ["0.5"]
    for said in run_world(2, tags, tmp_path / "fail", "Fail"):
        assert (
            said
            == "save_checkpoint: the tag is '0.5' on rank 0 and '1.5' on rank 1; name it alike, or write"
            " tag_validation: Warn"
        )


def alone(directory):
    engine, *_ = built(3)
    go(engine, 0, 2)
    commit.orbax()  # a first save imports it before it waits
    start = time.monotonic()
    if comm.get_rank() == 0:
        try:
            engine.save_checkpoint(directory)
        except fz.CheckpointError as e:
            return str(e), time.monotonic() - start
    else:
        time.sleep(11)
    return None


@pytest.mark.slow
def test_a_save_of_rank_0_alone_ends_in_ten_seconds(tmp_path):
    pool = WorkerPool(2)
    said, seconds = pool.run(alone, tmp_path)[0]
    pool.close()
    assert (
        said.startswith("save: rank 1 did not come within 10 s, while rank 0 waits; every rank calls save")
        and seconds < 10.5
    )
