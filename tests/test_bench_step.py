"""The table of step times at its smallest: who runs, that all compute the same, and what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import bench_contenders
    import bench_report

    return bench_contenders, bench_report


def bench(folder, *flags):
    least = ["--sizes=tiny", "--rounds=2", "--steps=1", f"--out={folder}"]
    words = [sys.executable, EXPERIMENTS / "bench_step.py", *least]
    paths = {"PYTHONPATH": os.pathsep.join([str(EXPERIMENTS.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, *flags], env=os.environ | paths, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "found.json").read_text())
    return {(x["name"], x["ranks"], x["policy"]): x for x in found}, done.stdout


@pytest.mark.slow
def test_a_heat_of_two_computes_the_same_and_is_written_down(tmp_path):
    rows, out = bench(tmp_path, "--ranks=2", "--policies=fp32", "--contenders=stage3", "--lives=0")
    assert {name for name, *_ in rows} >= {"ddp", "stage3"} and "furthest apart from DDP's loss" in out
    ours, ddp = rows["stage3", 2, "fp32"], rows["ddp", 2, "fp32"]
    assert ddp["ratio"] == [1, 1] and len(ours["wall"]) == 2 and ours["counted"] <= ours["sent"] < 1.2 * ours["counted"]
    table = (tmp_path / "bench_step.md").read_text()
    assert "## tiny: 21,472 parameters, 2 ranks, fp32" in table and "| stage3 | 2 x 1 |" in table


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_everybody_runs_on_two_and_four_ranks_in_both_policies(tmp_path, ranks, policy):
    """Some twenty contenders, each of which starts anew to have its memory measured: minutes a table."""
    rows, out = bench(tmp_path, "--heat=4", f"--ranks={ranks}", f"--policies={policy}")
    assert {(ranks, policy)} == {key[1:] for key in rows}
    for name in ("plain", "fsdp", "stage0", "stage1", "stage2", "stage3", "engine0", "engine3"):
        assert rows[name, ranks, policy]["over"] > 0 and rows[name, ranks, policy]["start"] > 0
    assert (("hpz", ranks, policy) in rows) == (ranks == 4)
    assert ("not run: hpz on 2 ranks: two nodes of two ranks are the least" in out) == (ranks == 2)


@pytest.mark.slow
def test_by_itself_it_writes_a_table_for_two_and_four_ranks_in_both_policies(tmp_path):
    rows, _ = bench(tmp_path, "--contenders=stage3", "--lives=0")
    assert {(2, "fp32"), (2, "bf16"), (4, "fp32"), (4, "bf16")} == {key[1:] for key in rows}
    assert (tmp_path / "bench_step.md").read_text().count("\n## ") == 4


def test_who_cannot_run_is_told_why(modules, monkeypatch):
    contenders, _ = modules
    monkeypatch.setattr(contenders, "find_spec", lambda package: None)
    assert contenders.absent("deepspeed3", 2) == "deepspeed is not installed" and "jax" in contenders.absent("jax", 2)
    assert contenders.absent("hpz", 2) and not contenders.absent("hpz", 4) and not contenders.absent("stage3", 2)
    with pytest.raises(ValueError, match="there is no contender 'stage4'; write some of plain"):
        contenders.absent("stage4", 2)


def test_ddp_has_the_rounds_of_all_heats_and_tables_are_by_size_ranks_and_policy(modules, tmp_path):
    _, report = modules
    row = lambda name, wall, ranks=2: report.Row("tiny", ranks, "fp32", name, 100, wall, wall, wall, wall, 400.0)
    rows = report.pooled([row("ddp", [1.0, 2.0]), row("stage3", [3.0, 4.0]), row("ddp", [5.0]), row("jax", [6.0])])
    assert [r.name for r in rows] == ["ddp", "stage3", "jax"] and rows[0].wall == [1, 2, 5]
    assert report.cells(rows[1])[:7] == ["stage3", "2 x 1", "3.50", "3.00", "43%", "3.50", "3.00-4.00"]
    assert report.cells(rows[2])[:2] == ["jax", "1 x 2"] and report.cells(rows[2])[9] == "4.00"
    text = report.markdown([*rows, row("ddp", [1.0], 4)], {"hpz on 2 ranks": "too few"})
    assert text.count("\n## ") == 2 and "- not run: hpz on 2 ranks: too few" in text
    pytest.importorskip("matplotlib")
    report.picture(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
