"""What `funczero` says of itself, and what a shell completes."""

from __future__ import annotations

import platform
import re
import sys

import pytest
import torch

from funczero.cli import main


def said(capsys, *words):
    """The exit status, and both outputs."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code, *capsys.readouterr()


def test_a_version_is_that_of_all_it_stands_on(capsys):
    code, out, _ = said(capsys, "--version")
    assert code == 0 and re.match(r"funczero \S+", out)
    assert out.strip().endswith(f", torch {torch.__version__}, Python {platform.python_version()}")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_every_command(shell, capsys):
    code, out, _ = said(capsys, "--print-completion", shell)
    assert code == 0
    for word in ("doctor", "launch", "plan", "report", "watch", "verify", "--search"):
        assert word in out, word


def test_completion_without_its_package_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, _, error = said(capsys, "--print-completion", "bash")
    assert (
        code == 2
        and error == "funczero: --print-completion needs shtab, which is not installed; write pip install shtab\n"
    )


def test_a_shell_that_is_not_known_is_refused(capsys):
    code, _, error = said(capsys, "--print-completion", "fish")
    assert code == 2 and "choose from" in error
