"""What `import funczero` brings with it."""

from __future__ import annotations

import subprocess
import sys

import funczero as fz

ASK = """
import os, sys
import funczero as fz
face = lambda: [m for m in sys.modules if m.startswith("funczero.deepspeed")]
assert not face(), face()
assert not {"rich", "jax", "tensorboard", "matplotlib", "funczero.script"} & set(sys.modules)
assert {"deepspeed", "from_deepspeed", "experiment", "Experiment", "Run", "writers"} <= set(dir(fz))
assert not face(), face()
assert not hasattr(fz, "nothing_of_that_name")
assert not face(), face()
for use in ("fz.from_deepspeed", "from funczero import deepspeed"):
    if not os.fork():
        exec(use)
        os._exit(not face() or "lightning" in sys.modules)
    assert not os.wait()[1], use
"""


def test_the_face_is_imported_at_its_first_use():
    subprocess.run([sys.executable, "-c", ASK], check=True, timeout=120)


def test_scripts_are_imported_at_their_first_use():
    from funczero.script.experiment import Experiment, experiment
    from funczero.script.run import Run

    assert (fz.experiment, fz.Experiment, fz.Run) == (experiment, Experiment, Run)


def test_both_names_are_the_faces_own():
    assert fz.from_deepspeed is fz.deepspeed.from_deepspeed
