"""Writers: what a run logs is there, also after it was resumed; TensorBoard's own reader finds DeepSpeed's tags."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import funczero.deepspeed as deepspeed
from funczero.writers import END, Csv, JsonLines, TensorBoard, Tracker, records

GOLDEN = json.loads((Path(__file__).parent / "golden" / "monitor_tags.json").read_text())


def shown(folder):
    """{tag: [(step, value)]} as TensorBoard's own reader has it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def read(kind, where):
    """{name: [(step, value)]} of what was written."""
    if kind is TensorBoard:
        return shown(where)
    if kind is Csv:
        lines = {f.stem: f.read_text().splitlines()[1:] for f in sorted(where.glob("*.csv"))}
        return {stem: [(int(a), float(b)) for a, b in (x.split(",") for x in own)] for stem, own in lines.items()}
    found = records(where)
    return {n: [(r["step"], r[n]) for r in found if n in r] for n in ("loss", "held")}


@pytest.mark.parametrize("kind", [JsonLines, Csv, TensorBoard], ids=lambda k: k.__name__)
def test_a_resumed_run_reads_as_one_that_nobody_ended(kind, tmp_path):
    """Lines after the checkpoint go, whatever was logged at it stays; a new run shows nothing of an old one, and END
    appends."""
    whole = {"loss": [(n, 1 / n) for n in (1, 2, 4, 8)], "held": [(2, 0.5), (4, 0.25)]}

    def run(writer, numbers, scale=1.0):
        for n in numbers:
            writer.log(n, {"loss": torch.tensor(scale / n)})
            if n in (2, 4):
                writer.log(n, {"held": 1.0 / n})
        writer.close()

    run(kind(tmp_path / "run"), (1, 2, 4), scale=1.0)
    run(kind(tmp_path / "run", after=2), (4, 8))
    assert read(kind, tmp_path / "run") == whole
    run(kind(tmp_path / "run", after=END), (16, 32))
    assert read(kind, tmp_path / "run")["loss"] == [*whole["loss"], (16, 1 / 16), (32, 1 / 32)]
    run(kind(tmp_path / "run"), (2, 4))
    assert read(kind, tmp_path / "run") == {"loss": whole["loss"][1:3], "held": whole["held"]}


def test_a_line_that_a_killed_process_left_unfinished_is_passed_over(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    JsonLines(file, after=5).close()
    assert file.read_text() == '{"step": 1, "loss": 2.0}\n'
    Csv(tmp_path / "csv").log(1, {"loss": 2.0})
    with (tmp_path / "csv" / "loss.csv").open("a") as rest:
        rest.write("2,0.")
    Csv(tmp_path / "csv", after=5).log(2, {"loss": 0.5})
    assert (tmp_path / "csv" / "loss.csv").read_text().splitlines() == ["step,loss", "1,2.0", "2,0.5"]


@pytest.mark.parametrize("line", ['{"loss": 1.0}', "not json", "[1]", '{"step": true}'])
def test_what_is_no_log_is_not_cut(line, tmp_path):
    file, table = tmp_path / "notes.jsonl", tmp_path / "loss.csv"
    file.write_text(f"{line}\n")
    table.write_text(f"{line}\n")
    with pytest.raises(ValueError, match="notes.jsonl:1: this is no line of JsonLines; move the file away"):
        JsonLines(file, after=1)
    with pytest.raises(ValueError, match="loss.csv:1: this is no line of Csv; move the file away"):
        Csv(tmp_path, after=1).log(2, {"loss": 1.0})
    assert file.read_text() == table.read_text() == f"{line}\n"


def test_what_is_no_number_is_refused_by_name(tmp_path):
    class Run:
        def log(self, values, step): ...

    for writer in (JsonLines(tmp_path / "a"), Csv(tmp_path / "b"), TensorBoard(tmp_path / "c"), Tracker(Run())):
        for odd in (torch.ones(2), "high", None):
            with pytest.raises(TypeError, match="^log: 'x' is a .*, not one number; write "):
                writer.log(1, {"x": odd})
    with pytest.raises(ValueError, match="a value is called 'step'"):
        JsonLines(tmp_path / "a").log(1, {"step": 1})
    with pytest.raises(ValueError, match="'a/b' and 'a_b' would both be a_b.csv; rename one"):
        Csv(tmp_path / "b").log(1, {"a/b": 1, "a_b": 2})
    with pytest.raises(TypeError, match="Tracker: a int has no log"):
        Tracker(3)


def test_without_tensorboard_one_sentence_says_so(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "tensorboard" or n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="^TensorBoard: the package tensorboard is missing, .*; write pip"):
        TensorBoard(tmp_path)
    config = {"train_batch_size": 4, "tensorboard": {"enabled": True, "output_path": str(tmp_path)}}
    with pytest.raises(deepspeed.ConfigError, match="^config: tensorboard.enabled: TensorBoard: the package") as caught:
        deepspeed.initialize(model=nn.Linear(4, 3), config=config)
    assert str(caught.value).count("\n") == 0


# --- DeepSpeed's keys -------------------------------------------------------------------------------------------------
def trained(folder, precision, **blocks):
    """Three updates of eight rows, as the golden file says."""
    half = {"fp16": {"enabled": True, "initial_scale_power": 8}} if precision == "fp16" else {}
    blocks = blocks or {
        name: {"enabled": True, "output_path": str(folder), "job_name": job}
        for name, job in (("tensorboard", "tb"), ("csv_monitor", "csv"))
    }
    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}
    net = nn.Linear(4, 3)
    config = {**batch, "gradient_clipping": 1.0, **half, **blocks}
    engine, *_ = deepspeed.initialize(model=net, config=config, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    losses = []
    for _ in range(6):
        loss = engine(torch.randn(4, 4, dtype=torch.float16 if half else None)).float().square().mean()
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    return engine, [sum(pair) / 2 for pair in zip(losses[::2], losses[1::2], strict=True)]


def table(text):
    """(header, rows) of a file; there a scale of 256 is written without a point."""
    head, *rest = text.split("\r\n")
    return head, [[float(x) for x in line.split(",")] for line in rest if line]


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_config_gives_deepspeeds_tags_and_files(precision, tmp_path):
    """The golden ones, and train_loss, which all engines of earlier versions wrote."""
    engine, losses = trained(tmp_path, precision)
    found, want = shown(tmp_path / "tb"), GOLDEN[precision]
    assert [x for _, x in found.pop("Train/Samples/train_loss")] == pytest.approx(losses, rel=1e-6)
    assert {tag: [x for x, _ in points] for tag, points in found.items()} == want["tags"]
    files = {f.name: f.read_bytes().decode() for f in (tmp_path / "csv").iterdir()}
    assert files.pop("Train_Samples_train_loss.csv").startswith("step,train_loss\r\n8,")
    assert {name: table(text) for name, text in files.items()} == {n: table(x) for n, x in want["files"].items()}
    engine.monitor.write_events([("Eval/acc", torch.tensor(0.5), engine.global_samples)])
    assert shown(tmp_path / "tb")["Eval/acc"] == [(24, 0.5)] and engine.monitor.enabled
    trained(tmp_path, precision)  # another process of the same job appends, under one header
    assert (tmp_path / "csv" / "Train_Samples_lr.csv").read_text().count("step,lr") == 1


def lacking(folder):
    """What each rank is told where rank 0 alone lacks the package; and then an update of both."""
    before = sys.modules.pop("wandb", None)
    sys.modules["wandb"] = None if torch.distributed.get_rank() == 0 else types.SimpleNamespace()
    try:
        trained(folder, "fp32", wandb={"enabled": True})
    except deepspeed.ConfigError as e:
        said = str(e)
    finally:
        sys.modules.pop("wandb")
        if before is not None:
            sys.modules["wandb"] = before
    csv = {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "csv"}}
    return said, len(trained(folder, "fp32", **csv)[0].monitor.writers)


def test_rank_0_writes_and_what_it_lacks_is_told_on_all_ranks(run_world, tmp_path):
    told = run_world(2, lacking, tmp_path)
    assert [n for _, n in told] == [1, 0] and len({said for said, _ in told}) == 1
    assert told[1][0].startswith("config: wandb.enabled: the package wandb is not installed; write pip install wandb")
    lines = (tmp_path / "csv" / "Train_Samples_train_loss.csv").read_text().split()
    assert [line.partition(",")[0] for line in lines] == ["step", "8", "16", "24", "32", "40", "48"]


def test_wandb_is_imported_where_a_config_names_it(monkeypatch, tmp_path):
    block = {"wandb": {"enabled": True, "project": "mine", "team": "us"}}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(deepspeed.ConfigError, match="wandb.enabled: the package wandb is not installed; write pip"):
        trained(tmp_path, "fp32", **block)
    said = []
    own = types.SimpleNamespace(log=lambda values, step: said.append((step, values)))
    wandb = types.SimpleNamespace(init=lambda **how: said.append(how) or own)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trained(tmp_path, "fp32", **block)
    assert said[0] == {"project": "mine", "group": None, "entity": "us"}
    assert [(step, *x) for step, x in said[1:3]] == [(8, "Train/Samples/train_loss"), (8, "Train/Samples/lr")]


def test_without_its_keys_an_engine_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine, _ = trained(tmp_path, "fp32", steps_per_print=None)
    assert not engine.monitor.enabled and not list(tmp_path.iterdir())
    engine.monitor.write_events([("Eval/acc", 0.5, 1)])


def test_a_loops_moments_and_bytes_are_printed_where_a_config_asks(tmp_path, capsys):
    more = {"wall_clock_breakdown": True, "comms_logger": {"enabled": True}, "steps_per_print": 2}
    csv = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"}}
    engine, _ = trained(tmp_path, "fp32", **more, **csv)
    said = capsys.readouterr().err.splitlines()
    micro = [line for line in said if "time (ms) | fwd_microstep: " in line]
    whole = [line.partition("time (ms) | ")[2] for line in said if "time (ms) | fwd: " in line]
    assert len(micro) == 6 and len(whole) == 3 and engine.wall_clock_breakdown()
    names = [[x.partition(":")[0] for x in line.split(" | ")] for line in whole]
    assert names == [["fwd", "bwd", "step"]] * 3
    written = (tmp_path / "csv" / "Train_Samples_elapsed_time_ms_backward.csv").read_text().split()[1:]
    assert [line.partition(",")[0] for line in written] == ["8", "16", "24"]
    assert sum("sent by rank 0 in the last 2 updates, up to 2:" in line for line in said) == 1
