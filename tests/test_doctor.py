"""`funczero doctor`: what is there is named, two processes train, and what is missing is an exit code."""

from __future__ import annotations

from funczero.cli import main
from funczero.doctor import findings, trial


def test_a_machine_that_trains_is_well(alone, capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    rooms = ["packages", "collectives", "devices", "kernels", "launchers", "memory", "self-test"]
    assert [line for line in said.splitlines() if line in rooms] == rooms
    assert "ok two processes     the bits of one process, in " in said and said.endswith("\nall is well\n")


def test_half_a_world_is_an_exit_code(alone, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert main(["doctor", "--no_trial"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("this process: init_distributed: the environment names ['RANK'] but not ")


def test_a_self_test_that_fails_says_why(alone, monkeypatch):
    for broken, why in ((len, "TypeError: object of type 'int' has no len()"), (int, "are not those of one process")):
        monkeypatch.setattr(trial, "trained", broken)
        found = trial.trial()
        assert found.mark == findings.WRONG and why in found.what
