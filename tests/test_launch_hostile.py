"""A short form of the campaign: every hostile hostfile, config and message to a store, judged as the campaign judges
them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "campaign" / "hostile.py"


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.slow) for part in ("config", "hostfile", "store")]
)
def test_no_hostile_input_does_harm(part):
    done = subprocess.run([sys.executable, str(SCRIPT), f"--only={part}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_harness_sees_what_it_looks_for(monkeypatch):
    """A case that writes elsewhere, starts something, is accepted, raises what is not ours, or dies without a word is
    not "told".
    """
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import hostile

    def raising(error):
        def attempt(_):
            raise error

        return attempt

    def writing(folder):
        (folder.parent / "beside" / "x").write_text("x")

    def starting(_):
        subprocess.run(["true"])

    import os

    run = lambda attempt: hostile.run(hostile.Case("x", attempt, (ValueError,)), 5.0, 64.0).verdict
    assert run(raising(ValueError("one line"))) == "told"
    assert (
        run(raising(KeyError("x"))) == "KeyError is no error of ours"
        and run(raising(ValueError("a\nb"))) == "its message is not one short line"
    )
    assert "it writes" in run(writing) and "it left its folder" in run(writing)
    assert run(starting).startswith("it runs subprocess.Popen") and run(lambda _: None) == "it was accepted"
    assert run(lambda _: os._exit(3)).startswith("ended without a word") and " MB" in run(lambda _: bytearray(1 << 28))
