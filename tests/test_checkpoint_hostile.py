"""Inputs of somebody who means harm, checkpoints with a right seal among them: each is refused in one sentence, without
memory, without time, without code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from injuries import INPUTS, MANIFESTS, checkpoint, resealed

import funczero.deepspeed as deepspeed
from funczero.checkpoint import CheckpointError
from funczero.cli import main

HARMLESS_TO_SOME = {  # a use that does not look at what was changed, and says nothing wrong
    "export": (
        "client",
        "manifest: bytes",
        "manifest: int",
        "manifest: array of bytes",
        "manifest: kind",
        "manifest: 30,000",
        "manifest: a name",
        "store:",
        "manifest: client",
    ),
    "verify": ("manifest: bytes", "manifest: int", "manifest: array of bytes", "manifest: kind", "manifest: client"),
}


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """All of them in one process; what it said of each."""
    place = tmp_path_factory.mktemp("hostile")
    env = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parent.parent}{os.pathsep}{Path(__file__).parent}",
        "OMP_NUM_THREADS": "1",
    }
    asked = json.dumps({"place": str(place), "names": list(INPUTS)})
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("injuries.py"))],
        input=asked,
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
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


def test_a_missing_chunk_of_an_imported_tree_is_named(tried):
    text = tried["tree: a chunk is missing"]["import"]["text"]
    assert "'params.a'" in text and "{1, 1}" in text and "missing" in text, text


@pytest.mark.parametrize(
    "change, named",
    [
        ({"counts": {"train_step": 3}}, "train_step"),
        ({"counts": {"__class__": 1}}, "__class__"),
        ({"counts": {"micro_steps": "3"}}, "micro_steps"),
        ({"counts": {"micro_steps": -1}}, "micro_steps"),
        ({"counts": [1]}, "counts"),
        ({"buffers": {"running": 3}}, "running"),
        ({"buffers": [1]}, "buffers"),
        ({"k": "2"}, "k"),
        ({"taken": None}, "taken"),
        (None, "its form"),
        ([1], "its form"),
    ],
)
def test_load_checkpoint_sets_what_an_engine_knows_alone(tmp_path, change, named):
    engine, *_ = deepspeed.initialize(
        model=torch.nn.Linear(3, 2),
        config={"train_batch_size": 2, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}},
    )
    engine.save_checkpoint(tmp_path, "a")
    before = dict(vars(engine))

    def forge(body):
        own = body["client"]["engine"]
        body["client"]["engine"] = (
            {**own, **{k: {**own[k], **x} if isinstance(x, dict) else x for k, x in change.items()}}
            if isinstance(change, dict)
            else change
        )

    resealed(tmp_path / "a", forge)
    with pytest.raises(
        CheckpointError,
        match=f"load_checkpoint: '{named}' in the engine's part of the checkpoint is nothing that an engine writes",
    ):
        engine.load_checkpoint(tmp_path, "a")
    assert vars(engine).keys() == before.keys() and type(engine.train_step) is type(before["train_step"])


def test_no_order_to_a_terminal_comes_from_a_checkpoint(tmp_path, capsys):
    order = "\x1b]0;owned\x07\x1b[2J"
    path = checkpoint(tmp_path / "run")

    def forge(body):
        body["arrays"][f"params/{order}"] = body["arrays"].pop("params/v")
        body["metrics"], body["versions"], body["ties"] = {order: 1.0}, {order: order}, {f"params/{order}2": "params/w"}
        body["about"] = {
            "chain": f"a{order}\n{order}",
            "config": order,
            "specs": {"params/w": order},
            "not finite": [order],
        }

    resealed(path, forge)
    for command in (
        ["inspect", path],
        ["verify", path],
        ["diff", path, checkpoint(tmp_path / "other")],
        ["export", path, tmp_path / f"x{order}.bin"],
        ["inspect", tmp_path / order],
    ):
        main(list(map(str, command)))
        out = "".join(capsys.readouterr())
        assert out and all(c.isprintable() or c == "\n" for c in out), (command[0], out)
