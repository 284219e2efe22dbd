"""Checkpoints of somebody who means harm: nothing large is allocated, nothing hangs and nothing is imported on the word
of a file.
"""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from damage import abstract, bits, copied, edit, loss, make, params, read_beside, refused_at_once, restored, soon

import funczero as fz
from funczero import P
from funczero.checkpoint import Checkpointer, CheckpointError, manifest
from funczero.checkpoint.manifest import FILE, SEAL


def arrays(**more):
    """A change of one leaf's entry, and of what the files are said to hold."""

    def change(body):
        name = next(n for n in body["arrays"] if n.endswith("layers/0/w"))
        body["arrays"][name] |= more
        body["files"]["state/manifest.ocdbt"][0] = 1 << 80

    return change


def renamed(where, new):
    def change(body):
        old = next(n for n in body[where] if n.endswith(("embed", "manifest.ocdbt")))
        body[where] = {new if n == old else n: x for n, x in body[where].items()}

    return change


def client(value, **array):
    """Another client state, and an array that it refers to."""

    def change(body):
        body["client"] = value
        if array:
            body["arrays"]["client/seen"] |= array
            body["files"]["state/manifest.ocdbt"][0] = 1 << 80

    return change


def nested(depth, inner="1"):
    return (
        lambda body: json.dumps(body | {"client": "HERE"}).replace('"HERE"', "[" * depth + inner + "]" * depth).encode()
    )


def put(**more):
    return lambda body: body.update(more)


HOSTILE = {
    "leaf ../": renamed("arrays", "params/../../../etc/passwd"),
    "leaf absolute": renamed("arrays", "/etc/passwd"),
    "leaf NUL": renamed("arrays", "params/\x00"),
    "leaf empty": renamed("arrays", ""),
    "file ../": renamed("files", "../1/state/manifest.ocdbt"),
    "file absolute": renamed("files", "/etc/passwd"),
    "file NUL": renamed("files", "state/\x00"),
    "file a device": renamed("files", "../../../../../../../../dev/zero"),
    "shape negative": arrays(shape=[-24, -24]),
    "shape huge": arrays(shape=[1 << 40, 24]),
    "shape beyond 64 bits": arrays(shape=[1 << 70, 1 << 70]),
    "shape of fractions": arrays(shape=[24.0, 24.0]),
    "shape of strings": arrays(shape=["24", "24"]),
    "shape of bools": arrays(shape=[True, True]),
    "shape of a thousand dims": arrays(shape=[1] * 1000, chunk=[1] * 1000),
    "shape missing": arrays(shape=None),
    "chunk huge": arrays(chunk=[1 << 62, 1 << 62]),
    "chunk tiny": arrays(chunk=[1, 1]),
    "chunk zero": arrays(chunk=[0, 24]),
    "chunk missing": arrays(chunk=None),
    "dtype unknown": arrays(dtype="float1024"),
    "dtype no dtype": arrays(dtype="nn"),
    "dtype a list": arrays(dtype=["float32"]),
    "dtype quantized": arrays(dtype="qint8"),
    "dtype object": arrays(dtype="object"),
    "tails none": arrays(tails=None),
    "tails a list": arrays(tails=["x"]),
    "tails empty": arrays(tails={}),
    "arrays a list": put(arrays=[]),
    "arrays null": put(arrays=None),
    "arrays of numbers": put(arrays={"params/embed": 3}),
    "files null": put(files=None),
    "files of strings": put(files={"a": "b"}),
    "format other": put(format=2),
    "format list": put(format=[1]),
    "sequence string": put(sequence="latest"),
    "sequence null": put(sequence=None),
    "step string": put(step="2"),
    "world a list": put(world=[2]),
    "ties to numbers": put(ties={"params/embed": 3}),
    "ties a list": put(ties=[1]),
    "metrics of strings": put(metrics={"loss": "small"}),
    "metrics a list": put(metrics=[1]),
    "about a list": put(about=[1]),
    "window a list": put(window=[1]),
    "window of lists": put(window={"accumulate": [1]}),
    "window without count": put(window={"accumulate": {"partial": []}}),
    "window of numbers": put(window={"accumulate": {"count": 1, "partial": [1]}}),
    "versions a list": put(versions=[1]),
    "client unknown tag": client({"$pickle": "gASVBAAAAAAAAABLAS4="}),
    "client no such array": client({"$array": "client/other", "kind": "tensor"}),
    "client array a list": client({"$array": ["client/seen"], "kind": "tensor"}),
    "client no kind": client({"$array": "client/seen"}),
    "client bad base64": client({"$bytes": "x"}),
    "client bad float": client({"$float": "many"}),
    "client bad complex": client({"$complex": [1, 2, 3]}),
    "client bad dict": client({"$dict": [[[1], 2]]}),
    "client bad pairs": client({"$dict": [1, 2]}),
    "client bad tuple": client({"$tuple": 3}),
    "client array huge": client({"$array": "client/seen", "kind": "tensor"}, shape=[1 << 40], chunk=[1 << 40]),
    "client array of many chunks": client({"$array": "client/seen", "kind": "tensor"}, shape=[1 << 40], chunk=[1]),
    "client array huge dims": client({"$array": "client/seen", "kind": "tensor"}, shape=[1] * 100, chunk=[1] * 100),
    "nested 900": nested(900),
    "nested 100000": nested(100_000),
    "number of 100000 digits": nested(1, "9" * 100_000),
    "not an object": lambda body: b"[1, 2, 3]",
    "not JSON": lambda body: b"{",
    "not UTF-8": lambda body: b'{"name": "\xff"}',
    "nothing": lambda body: b"",
}


TRIED = [
    pytest.param(case, how, marks=() if i % 2 == j else pytest.mark.slow, id=f"{case}-{how.__name__}")
    for i, case in enumerate(HOSTILE)
    for j, how in enumerate((restored, read_beside))
]


@pytest.mark.parametrize(("case", "how"), TRIED)
def test_hostile_manifest(originals, tmp_path, case, how):
    """With a checksum that is right."""
    checkpoint = copied(originals[0]["large"], tmp_path / "run")
    edit(checkpoint, HOSTILE[case])
    refused_at_once(checkpoint, how)


def in_window(directory, saved=None):
    """A streamed accumulate in mid-window, with metrics beside the loss; or the restore of it."""
    grad = fz.value_and_grad(
        lambda p, b: (*loss(p, b), {"rows": torch.ones(()), "by": {"x": torch.zeros(())}}),
        batch=P("data"),
        has_aux=True,
    )
    step = fz.train_step(fz.shard("data", grad, fz.accumulate(2, stream=True), fz.adamw(0.01)))
    ck = Checkpointer(directory, step=step)
    if saved is not None:
        return ck.restore(like=(step, abstract()))
    state, _ = step(step.init(params(), key=3), {"x": torch.arange(4), "y": torch.arange(4)})
    ck.save(state, 2)
    ck.wait()
    return step, state


def test_hostile_window(tmp_path, monkeypatch):
    """The form of an open window's metrics names trees of JSON alone: no module is imported for it.

    Sums that do not fit, or are huge, are refused.
    """
    (tmp_path / "hostile_module.py").write_text("class E:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    step, state = in_window(tmp_path / "original")
    assert bits(in_window(tmp_path / "original", saved=True).state) == bits(state)
    body = json.loads((tmp_path / "original" / "2" / FILE).read_text())
    (name,) = body["window"]
    good = body["window"][name]["partial"][0]
    enum = json.dumps(
        [
            1,
            {
                "type": "builtins.dict",
                "context": json.dumps([{"__enum__": True, "fqn": "hostile_module:E", "name": "x"}]),
                "children_spec": [],
            },
        ]
    )
    factory = {"default_factory_module": "hostile_module", "default_factory_name": "E", "dict_context": []}
    default = json.dumps([1, {"type": "collections.defaultdict", "context": json.dumps(factory), "children_spec": []}])
    hidden = lambda spec: spec.replace("__enum__", "\\\\u005f_enum__").replace("defaultdict", "default\\u0064ict")
    changes = [
        {"spec": x}
        for x in (
            enum,
            default,
            hidden(enum),
            hidden(default),
            "",
            "[" * 5000,
            "[1, 2]",
            "[9, {}]",
            3,
            good["spec"][:-1],
        )
    ]
    changes += [
        {"aux": ["float32", [1 << 40]]},
        {"loss": ["float32", [1 << 62, 1 << 62]]},
        {"loss": ["nn", []]},
        {"loss": 3},
        {"weight": ["float32", [-1]]},
    ]
    changes += [{"grads": []}, {"grads": [["float32", [1 << 40]]]}, {"grads": 3}, {"axes": ["nowhere"]}, {"axes": 3}]
    for change in changes:
        checkpoint = copied(tmp_path / "original", tmp_path / "run")
        edit(checkpoint, lambda body, change=change: body["window"][name]["partial"][0].update(change))
        with soon():
            if change == {
                "spec": ""
            }:  # what a save writes where JSON has no name for the metrics: the update is replayed
                assert "left out" in in_window(tmp_path / "run", saved=True).notes[0]
                continue
            with pytest.raises(CheckpointError) as caught:
                in_window(tmp_path / "run", saved=True)
        assert "window" in str(caught.value) or FILE in str(caught.value) or "leaf" in str(caught.value), (
            change,
            str(caught.value),
        )
        assert "hostile_module" not in sys.modules, change


def test_hostile_files(originals, tmp_path):
    """Metadata of absurd sizes, and what is no file."""
    original = originals[0]["small"]
    for name in (FILE, SEAL, manifest.STAMPED):
        checkpoint = copied(original, tmp_path / "run")
        (checkpoint / name).unlink()
        with (checkpoint / name).open("wb") as f:
            f.truncate(1 << 40)  # a hole
        assert name in refused_at_once(checkpoint)
        for make_it in (os.mkfifo, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink(p, p), os.mkdir):
            checkpoint = copied(original, tmp_path / "run")
            (checkpoint / name).unlink()
            make_it(checkpoint / name)
            assert name in refused_at_once(checkpoint)
    checkpoint = copied(original, tmp_path / "run")
    size = (checkpoint / FILE).stat().st_size
    assert f"{size} bytes" in refused_at_once(checkpoint, max_metadata=size - 1)
    assert Checkpointer(checkpoint.parent, max_metadata=size).restore("2", like=(make(1), abstract())).name == "2"
