"""Inputs of somebody who means harm, checkpoints with a right seal among them: each is refused in one sentence, without memory, without time, without code."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import INPUTS, MANIFESTS

HARMLESS_TO_SOME = {  # a use that does not look at what was changed, and says nothing wrong
    "export": ("client", "manifest: bytes", "manifest: int", "manifest: array of bytes", "manifest: kind", "manifest: 30,000", "manifest: a name", "store:", "manifest: client"),
    "verify": ("manifest: bytes", "manifest: int", "manifest: array of bytes", "manifest: kind", "manifest: client"),
}


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """All of them in one process; what it said of each."""
    place = tmp_path_factory.mktemp("hostile")
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent.parent}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    asked = json.dumps({"place": str(place), "names": list(INPUTS)})
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("hostile.py"))], input=asked, capture_output=True, text=True, timeout=300, env=env)
    out = {x["name"]: x for x in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0 and list(out) == list(INPUTS), (done.returncode, list(out)[-1:], done.stderr[-3000:])
    return out


@pytest.mark.parametrize("name", INPUTS)
def test_it_is_refused_by_name(tried, name):
    for use, said in tried[name].items():
        if use == "name":
            continue
        if name in MANIFESTS and use != "restore" and not said["kind"]:
            assert name.startswith(HARMLESS_TO_SOME.get(use, ())), (use, said)
            continue
        assert said["kind"] == "CheckpointError", (use, said)
        assert "\n" not in said["text"] and len(said["text"]) < 1500 and said["text"].isprintable(), (use, said)
        assert said["seconds"] < 5 and said["bytes"] < 256 << 20, (use, said)
