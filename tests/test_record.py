"""What a run says of itself in its folder: enough to be read without its script, nothing secret, and never its end."""

from __future__ import annotations

import json

import pytest
import torch
from absl import flags
from test_script import asked, lived
from test_script import begin as linear

import funczero as fz
from funczero.report.kept import Kept
from funczero.report.page import page
from funczero.script.experiment import planned
from funczero.script.loop import train
from funczero.script.run import Run
from funczero.writers import records


def lines(out):
    return [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]


def of(kind, out):
    return [line for line in lines(out) if line["kind"] == kind]


def test_a_folder_says_what_was_run_and_how_it_ended(alone, tmp_path, capsys):
    lived(tmp_path, "--save_every=2", "--keep=1")
    kinds = [line["kind"] for line in lines(tmp_path)]
    assert kinds[:2] == ["begin", "state"] and kinds[-1] == "end" and kinds.count("checkpoint") == 3
    begin, end = lines(tmp_path)[0], lines(tmp_path)[-1]
    assert begin["script"] == "tiny" and begin["steps"] == 6 and begin["amount"] == 24 and begin["parameters"] == 3
    assert "adamw" in begin["chain"] and begin["mesh"] == {"data": 1} and begin["policy"].startswith("params=float32")
    assert begin["flags"]["lr"] == [0.1, False] and begin["flags"]["save_every"] == [2, True]
    assert begin["environment"]["torch"] == torch.__version__ and begin["environment"]["hosts"] == 1
    assert (end["how"], end["update"]) == ("finished", 6)
    lived(tmp_path, "--save_every=2", "--resume=auto", "--steps=8")
    starts = of("begin", tmp_path)
    assert [(b["update"], b["before"]) for b in starts] == [(0, ""), (6, "6")] and len(of("end", tmp_path)) == 2
    kept = Kept(tmp_path, "run")
    assert kept.on_disk == ["6", "8"] and list(kept.events.checkpoints) == ["2", "4", "6", "8"] and not kept.troubles()
    assert "not planned: there is no plan.json" in page([kept]) and kept.events.resumes == [6]
    lived(tmp_path, "--steps=2")  # not resumed: the story begins anew
    assert [b["update"] for b in of("begin", tmp_path)] == [0]


def test_bytes_are_counted_as_they_were_planned(run_world, tmp_path):
    run_world(2, _planned, tmp_path, timeout=120.0)
    counted, plan = of("sent", tmp_path), json.loads((tmp_path / "plan.json").read_text())
    assert [line["update"] for line in counted] == [1] and counted[0]["bytes"] == plan["sent"] != []
    assert plan["memory"]["masters"] == of("state", tmp_path)[0]["bytes"]["masters"]
    text = page([Kept(tmp_path, "run")])
    assert "planned at the peak" in text and "not planned" not in text


def _planned(out):
    run = asked(f"--out={out}", "--nproc=2", "--steps=3")
    train(run, planned(linear, run), plans=True)


def odd_at(update):
    """Rows of one update that overflow."""

    def begin(run):
        own = linear(run)
        assert own.batch is not None
        batch = own.batch
        broken = lambda n: {"x": batch(n)["x"] * (torch.inf if n == update else 1)}
        return own._replace(batch=broken)

    return begin


@pytest.mark.parametrize("debug", [True, False], ids=["debug", "plain"])
def test_a_skip_is_recorded_with_leaf_and_rank(alone, tmp_path, debug):
    run = asked(f"--out={tmp_path}", "--nproc=1", "--steps=4", f"--debug={debug}")
    train(run, planned(odd_at(2), run))
    (skip,), said = of("skip", tmp_path), of("said", tmp_path)
    assert (skip["update"], skip["leaf"], skip["rank"], skip["searching"]) == (3, "w", 0, False)
    assert len(said) == 1 and "the gradient of 'w' is not finite on rank 0" in said[0]["text"]
    kept = Kept(tmp_path, "run")
    assert kept.numbers.skips == [3] and "the gradient of &#x27;w&#x27; is not finite on rank 0" in page([kept])


def test_a_run_that_fails_says_so(alone, tmp_path):
    with pytest.raises(RuntimeError):
        lived(tmp_path, form="few")
    end = lines(tmp_path)[-1]
    assert end["how"] == "failed" and end["words"].startswith("RuntimeError: tiny: its batches end after update 4")


def test_a_record_that_cannot_be_written_ends_no_run(alone, tmp_path, capsys, monkeypatch):
    (tmp_path / "run.jsonl").mkdir()
    lived(tmp_path)
    said = capsys.readouterr().out
    assert said.count("run.jsonl is not written any more (") == 1 and "the run goes on without it" in said
    assert Kept(tmp_path, "run").numbers.last == 6


def test_a_plan_that_is_refused_is_said_in_its_place(alone, tmp_path):
    def refuses(run):
        loss_fn = lambda p, b: ((b["x"] @ p["w"]).square().sum() * (1 + 0 * p["w"][0].item()), torch.tensor(1.0))
        step = run.train_step(fz.value_and_grad(loss_fn, batch=fz.P(run.axis)), fz.adamw(run.lr))
        return fz.Experiment(step, {"w": torch.ones(3)}, batch=lambda n: {"x": torch.ones(run.batch, 3)})

    run = asked(f"--out={tmp_path}", "--nproc=1", "--steps=1")
    train(run, planned(refuses, run), plans=True)
    why = json.loads((tmp_path / "plan.json").read_text())["why"]
    assert why.startswith("TypeError: plan: the loss (") and "not planned" in page([Kept(tmp_path, "run")])


def test_no_secret_is_written(alone):
    values = flags.FlagValues()
    from funczero.script.flags import define

    define("tiny", "rows", {}, values)
    for name in ("hub_token", "api_key", "password", "tokens", "keyboard"):
        flags.DEFINE_string(name, "", "Words.", flag_values=values)
    values(
        ["tiny", "--hub_token=abc", "--api_key=abc", "--password=abc", "--tokens=abc", "--keyboard=abc", "--nproc=1"]
    )
    told = Run("tiny", "rows", values).told()
    assert [n for n, (x, _) in told.items() if x == "abc"] == ["tokens", "keyboard"]
    assert told["hub_token"] == ["(a secret is not written)", True] and "helpfull" not in told


def test_a_start_whose_world_sends_nothing_says_so(alone, tmp_path):
    """Otherwise the page would go on to show what an earlier, larger world sent."""
    lived(tmp_path, "--steps=2")
    assert [line["bytes"] for line in of("sent", tmp_path)] == [[]]


def test_a_plan_takes_no_draw_from_the_run(alone, tmp_path):
    def drawing(run):
        own = linear(run)
        return own._replace(batch=lambda n: {"x": torch.randn(run.batch, 3)})

    found = []
    for plans in (False, True):
        run = asked(f"--out={tmp_path}/{plans}", "--nproc=1", "--steps=2")
        train(run, planned(drawing, run), plans=plans)
        found.append([r["loss"] for r in records(tmp_path / str(plans) / "metrics.jsonl") if "loss" in r])
    assert found[0] == found[1] and "sent" in json.loads((tmp_path / "True" / "plan.json").read_text())
