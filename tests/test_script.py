"""An experiment's command line: what is asked is done or refused by name, and a run that was ended goes on as if it had
not been.
"""

from __future__ import annotations

import itertools
import os
import signal

import pytest
import torch
from absl import flags

import funczero as fz
from funczero.script.experiment import planned
from funczero.script.flags import define
from funczero.script.loop import train
from funczero.script.run import Run, sizes
from funczero.writers import records


def asked(*words, **defaults):
    """The command line of a script called tiny, which has a flag of its own."""
    values = flags.FlagValues()
    define("tiny", "rows", {"batch": 8, "steps": 6, "eval_every": 2, **defaults}, values)
    flags.DEFINE_float("lr", 0.1, "Rate.", flag_values=values)
    values(["tiny", *words])
    return Run("tiny", "rows", values)


def rows(run, n):
    g = torch.Generator().manual_seed(100 * run.seed + n)
    return {"x": torch.randn(run.batch, 3, generator=g)}


def begin(run, told_at=None, form="batch", name="held"):
    """A linear model; rank 0 is told to end while it makes the batch of an update."""
    loss_fn = lambda p, b: ((b["x"] @ p["w"]).square().sum(), torch.tensor(float(len(b["x"]))))
    step = run.train_step(fz.value_and_grad(loss_fn, batch=fz.P(run.axis)), fz.adamw(run.lr))
    held, ask = {"x": torch.ones(8, 3)}, step.eval(loss_fn)

    def batch(n):
        if n == told_at and run.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return rows(run, n)

    def evaluate(state):
        return {name: ask(state, step.local_rows(held)).loss}

    form = {
        "batch": {"batch": batch},
        "batches": {"batches": lambda start: (step.local_rows(rows(run, n)) for n in itertools.count(start))},
        "few": {"batches": lambda start: [step.local_rows(rows(run, n)) for n in range(start, 4)]},
    }[form]
    params = {"w": torch.arange(3.0)}
    numbers = lambda m: {"twice": 2 * m.loss.item()}
    return fz.Experiment(step, params, **form, evaluate=evaluate, numbers=numbers, unit="numbers", per_row=3)


def lived(out, *words, **how):
    """A run to its end, in the world there is."""
    run = asked(f"--out={out}", f"--nproc={os.environ.get('WORLD_SIZE', '1')}", *words)
    train(run, planned(lambda run: begin(run, **how), run))


def numbers(out):
    """What a log says that does not depend on time and stage."""
    kept = ("step", "loss", "held", "lr", "grad_norm", "ok", "twice")
    return [{name: x for name, x in r.items() if name in kept} for r in records(out / "metrics.jsonl")]


def test_a_log_has_every_update_and_every_evaluation(alone, tmp_path, capsys):
    lived(tmp_path / "one", "--write=csv")
    found = numbers(tmp_path / "one")
    assert [r["step"] for r in found] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert [i for i, r in enumerate(found) if "held" in r] == [0, 3, 6, 9]
    updates = [r for r in records(tmp_path / "one" / "metrics.jsonl") if "loss" in r]
    names = ["step", "loss", "twice", "numbers_per_second", "bytes_sent", "lr", "grad_norm", "ok", "scale"]
    assert all(list(r) == names and r["twice"] == 2 * r["loss"] and r["ok"] for r in updates)
    assert (tmp_path / "one" / "csv" / "held.csv").read_text().startswith("step,held\n0,")
    assert (tmp_path / "one" / "loss.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert said.count("  held ") == 4 and "numbers/s  norm " in said and "3 parameters, results in" in said
    lived(tmp_path / "two", form="batches", told_at=None)
    assert numbers(tmp_path / "two") == found


def test_a_run_that_is_ended_and_resumed_tells_one_story(run_world, tmp_path):
    """A signal to one rank ends all at one boundary; another stage goes on, and every evaluation stands there once."""
    flags = ["--save_every=100", "--write=csv"]
    run_world(2, lived, tmp_path / "whole", "--write=csv")
    with pytest.raises(Exception, match="holds no checkpoint|there is no checkpoint"):
        run_world(2, lived, tmp_path / "run", *flags, "--resume=3")
    run_world(2, _ended, tmp_path / "run", *flags, "--resume=auto")
    ended = numbers(tmp_path / "run")
    assert 3 <= ended[-1]["step"] < 6
    run_world(2, lived, tmp_path / "run", *flags, "--resume=auto", "--stage=1")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    for name in ("loss", "held", "grad_norm"):
        assert (tmp_path / "run/csv" / f"{name}.csv").read_text() == (
            tmp_path / "whole/csv" / f"{name}.csv"
        ).read_text()
    with pytest.raises(ValueError, match="holds checkpoints of another run; go on with it by --resume=auto"):
        planned(begin, asked(f"--out={tmp_path / 'run'}", "--save_every=5"))


def _ended(out, *words):
    lived(out, *words, told_at=2)


WRONG = {
    (
        "--batch=9",
        "--mesh=data=2",
    ): "--batch=9 rows do not divide into 2 micro-batches (processes x --accumulate=1); write --batch=10",
    ("--batch=9", "--micro_batch=2"): "--batch=9 rows are no multiple of --micro_batch=2; write --batch=10",
    ("--accumulate=2", "--micro_batch=2"): "--accumulate=2 and --micro_batch say it twice; leave one of them out",
    ("--mesh=data",): "--mesh=data does not name axes and their sizes; write --mesh=data=2 or --mesh=node=2,local=2",
    ("--mesh=data=2", "--nproc=3"): "--mesh=data=2 does not lay out 3 processes; name each axis once",
    ("--resume=last",): "--resume=last is neither auto, never nor a number of updates; write --resume=auto",
    ("--write=xml",): "--write=xml is no writer; write some of csv, tensorboard",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_command_line_is_one_sentence(alone, words, tmp_path):
    with pytest.raises(ValueError) as caught:
        planned(begin, asked(*words, f"--out={tmp_path}"))
    assert str(caught.value).startswith(WRONG[words]) and "\n" not in str(caught.value)


def test_a_flag_that_nobody_reads_is_refused(alone, tmp_path):
    """Not passed over in silence: a script that builds its own step says which flags count."""

    def own(run):
        loss_fn = lambda p, b: ((b @ p).sum(), b.sum())
        step = fz.train_step(fz.value_and_grad(loss_fn, batch=fz.P("data")), fz.all_reduce("data"), fz.sgd(0.1))
        return fz.Experiment(step, torch.ones(3), batch=lambda n: torch.ones(4, 3))

    planned(own, asked(f"--out={tmp_path}"))
    for word in ("--stage=2", "--policy=float64", "--mesh=data=1", "--batch=4", "--sums=exact", "--micro_batch=1"):
        name = word[2:].partition("=")[0]
        with pytest.raises(ValueError, match=f"^--{name} is given, and the script's begin does not read run.{name}; "):
            planned(own, asked(word, f"--out={tmp_path}"))
    with pytest.raises(ValueError, match="^--eval_every is given, and this script has nothing to evaluate"):
        planned(own, asked("--eval_every=2", f"--out={tmp_path}"))


def test_a_file_speaks_in_place_of_flags(alone):
    run = asked("--stage=2")
    with pytest.raises(ValueError, match="^--stage=2 and --out=runs/tiny say it twice; write it in the file alone"):
        run.instead("out", batch=4, stage=1)
    run.instead("out", batch=4, accumulate=2, micro_batch=None)
    assert run.batch == 4 and run.accumulate == 2 and run.said()["batch"] == 4 and run.stage == 2
    with pytest.raises(AttributeError, match="^run.depth: the script has no such flag"):
        run.depth  # noqa: B018
    with pytest.raises(
        TypeError, match="^experiment: step= is the default of no flag; those of an experiment are stage"
    ):
        asked(step=3)


def test_what_an_experiment_must_be(alone, tmp_path):
    run = asked(f"--out={tmp_path}")
    whole = begin(run)
    for odd, why in (
        (lambda run: 3, "the script's begin returned a int; return fz.Experiment"),
        (lambda run: whole._replace(batch=None), "an Experiment has batch= or batches=, one of them"),
        (lambda run: whole._replace(batches=lambda n: []), "an Experiment has batch= or batches=, one of them"),
    ):
        with pytest.raises(ValueError, match=why):
            planned(odd, run)
    acc = fz.accumulate(2, stream=True)
    streamed = fz.train_step(fz.value_and_grad(lambda p, b: (p.sum(), b.sum())), acc, fz.sgd(0.1))
    with pytest.raises(ValueError, match="the step streams its micro-batches"):
        planned(lambda run: whole._replace(step=streamed), run)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is no folder to write to .*; name another one"):
        planned(begin, asked(f"--out={tmp_path}/file/x"))


def test_batches_that_end_too_soon_and_runs_that_are_over(alone, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="^tiny: its batches end after update 4 of --steps=6; give more, or write"):
        lived(tmp_path / "few", form="few")
    lived(tmp_path / "run", "--save_every=10")
    with pytest.raises(SystemExit):
        lived(tmp_path / "run", "--save_every=10", "--resume=auto", "--steps=4")
    assert "6 updates are made, more than --steps=4" in capsys.readouterr().err
    before = numbers(tmp_path / "run")
    lived(tmp_path / "run", "--save_every=10", "--resume=auto")  # nothing is left to do, and nothing is told twice
    assert numbers(tmp_path / "run") == before and not capsys.readouterr().err
    lived(tmp_path / "run", "--save_every=10", "--resume=auto", "--seed=1")
    assert "checkpoint 6 was saved with --seed=0; from here on batches are others" in capsys.readouterr().err
    with pytest.raises(ValueError, match="^evaluate: 'loss' is the name of an update's own number; write another, as"):
        lived(tmp_path / "named", name="loss")


def test_meshes_are_for_the_processes_there_are(alone, monkeypatch):
    assert sizes("data=4", None) == {"data": 4} and sizes("node=2,local=-1", 6) == {"node": 2, "local": 3}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert sizes("", 8) == {"data": 3}
    for wrong in ("data=2", "data=0", "data=-1,data=3", "a=-1,b=-1", "=3"):
        with pytest.raises(ValueError, match="^--mesh="):
            sizes(wrong, None)
