"""`funczero watch`: a frame says what the folder holds, follows a file that grows or begins anew, and ends cleanly."""

from __future__ import annotations

import io
import json
import os
import time

import pytest
from recorded import BEGIN, folder, update
from rich.console import Console
from test_report import END, SKIP

from funczero.cli import main
from funczero.report import watch as watching
from funczero.report.frame import frame, state
from funczero.report.kept import Kept


def shown(kept, width=100, height=40):
    lines = [line.plain for line in frame(kept, width, height)]
    assert all(len(line) <= width for line in lines)
    return "\n".join(lines)


def grow(path, *lines):
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def test_a_frame_follows_a_run_that_grows_is_killed_and_resumed(tmp_path):
    run = folder(tmp_path / "run", updates=0)
    kept = Kept(run, "run")
    assert "no update has been made yet" in shown(kept)
    saved = {"kind": "checkpoint", "time": time.time(), "name": "20", "update": 20}
    grow(run / "metrics.jsonl", *(update(n, ok=n != 7, loss=float("nan") if n == 7 else 4 / n) for n in range(1, 31)))
    grow(run / "run.jsonl", SKIP, saved)
    kept.read()
    said = shown(kept)
    for there in (
        "30 of 40 updates   about 1 s left",
        "▼",
        "×",
        "1 skipped; the last: update 7 skipped: the gradient",
        "loss               0.1333",
        "sent                120 B",
        "last checkpoint: 20, ",
        "under way",
    ):
        assert there in said, (there, said)
    os.utime(run / "metrics.jsonl", (0, time.time() - 3000))
    assert state(kept)[0] == "silent" and "silent: last line 50 min ago" in shown(kept)
    lines = (run / "metrics.jsonl").read_text().splitlines(True)[:21]  # as JsonLines does it
    (run / "part").write_text("".join(lines))
    os.replace(run / "part", run / "metrics.jsonl")
    grow(run / "run.jsonl", BEGIN | {"update": 20, "before": "20"})
    grow(run / "metrics.jsonl", update(21, loss=0.5))
    kept.read()
    assert kept.numbers.last == 21 and kept.numbers.updates["loss"].count == 20
    assert "21 of 40 updates" in shown(kept) and "resumed after update 20" in shown(kept)
    grow(run / "run.jsonl", END | {"how": "stopped", "words": "by SIGTERM"})
    kept.read()
    assert shown(kept).startswith("run  stopped by SIGTERM") and not kept.troubles()


@pytest.mark.parametrize("size", [(20, 5), (60, 12), (200, 90)], ids=str)
def test_a_frame_fits_its_terminal(tmp_path, size):
    kept = Kept(folder(tmp_path, events=[SKIP], odd={3: {"loss": 1e300, "ok": False}, 4: {"lr": float("nan")}}), "run")
    said = shown(kept, *size)
    assert size[1] < 20 or len(said.splitlines()) <= size[1]


def test_once_is_plain_lines(tmp_path, capsys):
    run = folder(tmp_path / "run", events=[SKIP, END])
    assert main(["watch", str(run), "--once"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("run  finished\n") and "\x1b" not in said and "40 of 40 updates" in said


def test_without_a_terminal_it_is_a_line_whenever_there_is_news_and_ends_with_the_run(tmp_path, capsys, monkeypatch):
    run = folder(tmp_path / "run", updates=3)
    later = iter([lambda: None, lambda: grow(run / "metrics.jsonl", update(4)), lambda: grow(run / "run.jsonl", END)])
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: next(later)())
    assert main(["watch", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in said] == [f"update {n} of 40" for n in (3, 4, 4)]
    assert said[-1].endswith("finished") and "about 3 s left  under way" in said[0]


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_ctrl_c_ends_it(tmp_path, monkeypatch, terminal):
    def pressed(seconds):
        raise KeyboardInterrupt

    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, height=24)
    monkeypatch.setattr(watching, "Console", lambda **how: console)
    monkeypatch.setattr(watching.time, "sleep", pressed)
    assert watching.watch(folder(tmp_path / "run")) == 0
    assert ("\x1b[?25h" in out.getvalue()) == terminal  # the cursor is there again
    assert "under way" in out.getvalue()


def test_what_a_terminal_would_obey_is_escaped(tmp_path, capsys):
    said = {"kind": "said", "time": 1.7e9, "update": 2, "text": "red \x1b[31m and [bold]more[/bold]"}
    run = folder(tmp_path / "run", events=[said], odd={2: {"\x1b[2J": 1.0}})
    assert main(["watch", str(run), "--once"]) == 0
    assert "\x1b" not in (text := capsys.readouterr().out) and "[bold]more[/bold]" in text
