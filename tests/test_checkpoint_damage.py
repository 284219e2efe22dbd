"""Injured and hostile checkpoints: every injury is named, none is silent, nothing hangs, and nothing large is allocated on the word of a file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tracemalloc
from contextlib import contextmanager

import pytest
import torch

import funczero as fz
from funczero import P
from funczero.checkpoint import Checkpointer, CheckpointError, folder, manifest
from funczero.checkpoint.manifest import FILE, SEAL
from funczero.checkpoint.names import named
from funczero.testing import tree_hash

CLIENT = {
    "seen": torch.arange(300),
    "at": (3, 0.5),
    7: "seven",
    "nan": float("nan"),
    "deep": {"x": [1, {"y": torch.ones(2, 3)}]},
}


def params():
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=g) * 0.3
    layers = [{"w": draw(24, 24), "b": draw(24)} for _ in range(3)]
    return {"embed": draw(31, 24), "layers": layers, "head": draw(9, 24), "gain": draw(), "none": draw(0, 3)}


def loss(p, b):
    h = p["embed"][b["x"]]
    for layer in p["layers"]:
        h = torch.tanh(h @ layer["w"] + layer["b"]) + h
    return torch.nn.functional.cross_entropy(h @ p["head"].T * p["gain"], b["y"], reduction="sum"), torch.tensor(
        float(len(b["y"]))
    )


def make(size):
    grad = fz.value_and_grad(loss, batch=P("data"))
    return fz.train_step(fz.shard("data", grad, fz.adamw(0.01)), mesh={"data": size})


def abstract():
    return fz.tree.map(lambda x: x.to("meta"), params())


def bits(state):
    return tree_hash({n: p.value for n, p in named(state).parts.items()})


def written(directory, small):
    """Saves 1 and 2 of a world of two. With small=0 only chunks are checked, as they are in large checkpoints."""
    manifest.SMALL, kept = small, manifest.SMALL
    try:
        step, g = make(2), torch.Generator().manual_seed(2)
        state = step.init(params(), key=3)
        with Checkpointer(directory, step=step) as ck:
            for t in (1, 2):
                rows = {"x": torch.randint(31, (8,), generator=g), "y": torch.randint(9, (8,), generator=g)}
                state, _ = step(state, step.local_rows(rows))
                ck.save(state, t, client_state=CLIENT, metrics={"loss": 1.0 / t})
    finally:
        manifest.SMALL = kept


@pytest.fixture(scope="module")
def originals(run_world, tmp_path_factory):
    """Two folders of two checkpoints, files checked whole or by their chunks alone, and the bits of both saves."""
    out = {}
    for kind, small in (("small", manifest.SMALL), ("large", 0)):
        directory = tmp_path_factory.mktemp(kind) / "run"
        run_world(2, written, directory, small)
        out[kind] = directory
    found = {name: Checkpointer(out["small"]).restore(name, like=(make(1), abstract())) for name in ("1", "2")}
    assert sum(p.stat().st_size for p in files(out["small"] / "2")) > 30_000
    return out, {name: bits(r.state) for name, r in found.items()}, tree_hash(found["2"].client_state)


def files(checkpoint):
    return sorted(p for p in checkpoint.rglob("*") if p.is_file())


def copied(original, to):
    """A copy of links; `fresh` unlinks one that is to be changed."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(original, to, copy_function=os.link)
    return to / "2"


def fresh(path, content):
    path.unlink()
    path.write_bytes(content)


@contextmanager
def soon(seconds=20):
    """No hanging."""

    def late(*_):
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def anywhere(rng, checkpoint):
    """A file, by size, and a place in it."""
    all_files = files(checkpoint)
    path = rng.choices(all_files, [p.stat().st_size for p in all_files])[0]
    return path, rng.randrange(path.stat().st_size)


def flip(rng, checkpoint):
    path, at = anywhere(rng, checkpoint)
    content, bit = bytearray(path.read_bytes()), rng.randrange(8)
    content[at] ^= 1 << bit
    fresh(path, bytes(content))
    return f"{path.relative_to(checkpoint)}: bit {bit} of byte {at}"


def truncate(rng, checkpoint):
    path = rng.choice([p for p in files(checkpoint) if p.stat().st_size])
    n = rng.randrange(path.stat().st_size)
    fresh(path, path.read_bytes()[:n])
    return f"{path.relative_to(checkpoint)}: cut to {n} bytes"


def lengthen(rng, checkpoint):
    path = rng.choice(files(checkpoint))
    fresh(path, path.read_bytes() + rng.randbytes(rng.randrange(1, 9)))
    return f"{path.relative_to(checkpoint)}: longer"


def delete(rng, checkpoint):
    path = rng.choice(files(checkpoint))
    path.unlink()
    return f"{path.relative_to(checkpoint)}: deleted"


def swap(rng, checkpoint):
    a, b = rng.sample(files(checkpoint), 2)
    x, y = a.read_bytes(), b.read_bytes()
    fresh(a, y)
    fresh(b, x)
    return f"{a.relative_to(checkpoint)} and {b.relative_to(checkpoint)} swapped", x == y


def chunks(checkpoint):
    """(leaf, file, place, length) of the chunks that stand in files as they are, found by their values."""
    found = manifest.load(checkpoint)
    out = []
    for name, a in found.arrays.items():
        for key, tail in a.tails.items():
            for path in files(checkpoint):
                at, n = path.read_bytes().find(bytes.fromhex(tail)), 4 * 24 * 12
                if at >= n and a.shape in ((24, 24), (31, 24)) and path.parent.name == "d":
                    out.append((f"{name} {key}", path, at + 4 - n, n + 4))
                    break
    return out


def swap_chunks(rng, checkpoint):
    """Two chunks of one length, each with its own valid checksum, in one checkpoint or across the two."""
    across = rng.random() < 0.5
    mine = chunks(checkpoint)
    name, path, at, n = rng.choice([c for c in mine if "embed" not in c[0]])
    if across:
        other, source, there, _ = next(c for c in chunks(checkpoint.parent / "1") if c[0] == name)
    else:
        other, source, there, _ = rng.choice([c for c in mine if c[0] != name and "embed" not in c[0]])
    content, more = path.read_bytes(), source.read_bytes()[there : there + n]
    fresh(path, content[:at] + more + content[at + n :])
    return f"{name} holds {other}{' of checkpoint 1' if across else ''}", content[at : at + n] == more


def swap_arrays(rng, checkpoint):
    """A file of the other checkpoint."""
    d = [p for p in files(checkpoint) if p.parent.name == "d"]
    path = rng.choice(d)
    content = rng.choice([p for p in files(checkpoint.parent / "1") if p.parent.name == "d"]).read_bytes()
    same = content == path.read_bytes()
    fresh(path, content)
    return f"{path.relative_to(checkpoint)} of checkpoint 1", same


def edit(checkpoint, change, seal=True):
    """funczero.json changed, with a checksum that is right again."""
    body = json.loads((checkpoint / FILE).read_text())
    body = body if (new := change(body)) is None else new
    text = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    fresh(checkpoint / FILE, text)
    if seal:
        fresh(checkpoint / SEAL, f"{hashlib.sha256(text).hexdigest()}  {FILE}\n".encode())


def edited(rng, checkpoint):
    """One value of the JSON file: without the checksum any, with it what the arrays are compared with."""
    leaves = [n for n in json.loads((checkpoint / FILE).read_text())["arrays"] if n.startswith(("params/", "adamw/"))]
    name, what = rng.choice([n for n in leaves if n.endswith(("/w", "embed", "head"))]), rng.choice(
        ["shape", "dtype", "name", "tails", "client", "chunk", "step", "gone"]
    )
    seal = what not in ("client", "step") and rng.random() < 0.7

    def change(body):
        a = body["arrays"][name]
        if what == "shape":
            a["shape"] = a["shape"][::-1] if a["shape"][0] != a["shape"][1] else [a["shape"][0] - 1, a["shape"][1]]
        elif what == "dtype":
            a["dtype"] = rng.choice(["int32", "float16", "float64"])
        elif what == "chunk":
            a["chunk"] = [n * 2 for n in a["chunk"]]
        elif what == "tails":
            a["tails"] = {k: rng.randbytes(4).hex() for k in a["tails"]}
        elif what == "client":
            body["client"]["$dict"][1][1]["$tuple"][0] += 1
        elif what == "step":
            body["step"] += 1
        elif what == "gone":
            del body["arrays"][name]
        else:
            other = rng.choice(
                [n for n in leaves if n != name and body["arrays"][n]["shape"] == a["shape"]] or [name + "x"]
            )
            body["arrays"] = {{name: other, other: name}.get(n, n): a for n, a in body["arrays"].items()}

    edit(checkpoint, change, seal)
    return f"{what} of {name if what not in ('client', 'step') else 'the manifest'}{', sealed anew' * seal}"


KINDS = (
    [flip] * 80
    + [truncate] * 25
    + [lengthen] * 10
    + [delete] * 20
    + [swap] * 15
    + [swap_chunks] * 20
    + [swap_arrays] * 10
    + [edited] * 20
)
LATE = (folder.manifest.LAST, manifest.STAMPED)  # written by orbax after the seal; nobody reads what they say


@pytest.mark.parametrize("part", range(4))
def test_200_injuries(originals, tmp_path, part):
    """Either restore names a leaf or a file, or the bits are the saved ones and the full check of the files names it."""
    originals, right, client = originals
    step, meta, counts = make(1), abstract(), {}
    for i, injure in list(enumerate(KINDS))[part::4]:
        kind = "large" if i % 8 < 4 else "small"
        checkpoint = copied(originals[kind], tmp_path / "run")
        told = injure(random.Random(i), checkpoint)
        told, none = told if isinstance(told, tuple) else (told, False)
        ck = Checkpointer(checkpoint.parent)
        with soon():
            try:
                found = ck.restore("2", like=(step, meta))
            except CheckpointError as e:
                assert names(str(e), checkpoint, originals[kind] / "2"), (i, told, str(e))
                counts["refused"] = counts.get("refused", 0) + 1
                if i % 3 == 0:
                    falls_back(ck, (step, meta), right["1"], i, told)
                continue
        assert bits(found.state) == right["2"] and tree_hash(found.client_state) == client, (i, told)
        problems = manifest.check_files(checkpoint, manifest.load(checkpoint), strangers=True)
        assert problems or none or kind == "large" or told.startswith(LATE), (i, told)
        counts["harmless"] = counts.get("harmless", 0) + 1

    assert counts["refused"] >= 40


def names(text, checkpoint, original):
    """Does a message name a leaf or a file?"""
    leaves = [repr(n) for n in manifest.load(original).arrays]
    return text.count("\n") == 0 and any(
        n in text for n in [*leaves, FILE, SEAL, *(p.relative_to(original).as_posix() for p in files(original))]
    )


def falls_back(ck, like, right, i, told):
    """The last good one, with one line."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("absl")
    log.addHandler(handler)
    try:
        found = ck.restore(like=like, fallback=True)
    finally:
        log.removeHandler(handler)
    assert found.name == "1" and bits(found.state) == right, (i, told)
    assert len(lines) == 1 and "passed over" in lines[0], (i, told, lines)


def test_every_byte_of_the_seals(originals, tmp_path):
    """A flipped bit in the checksum's file, or in what orbax says of the checkpoint, is named; but for the digits of the time of the commit."""
    checkpoint = copied(originals[0]["small"], tmp_path / "run")
    silent = []
    for name in (SEAL, manifest.STAMPED):
        content = (checkpoint / name).read_bytes()
        for at in range(len(content)):
            fresh(checkpoint / name, content[:at] + bytes([content[at] ^ 1 << at % 7]) + content[at + 1 :])
            try:
                if not manifest.check_files(checkpoint, manifest.load(checkpoint)):
                    silent.append((name, chr(content[at])))
            except CheckpointError as e:
                assert SEAL in str(e)
        fresh(checkpoint / name, content)
    assert len(silent) < 20 and all(name == manifest.STAMPED and c.isdigit() for name, c in silent), silent


def both(directory):
    """What a rank of two says."""
    try:
        Checkpointer(directory).restore(like=(make(2), abstract()))
    except CheckpointError as e:
        return str(e)


def test_all_ranks_say_the_same(originals, tmp_path, run_world):
    """Damage that one rank alone reads, or that rank 0 alone looks for."""
    for i, kind in enumerate(("small", "large")):
        checkpoint = copied(originals[0][kind], tmp_path / kind)
        name, path, at, _ = [c for c in chunks(checkpoint) if "layers/1/w c/1" in c[0]][i]
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        fresh(path, bytes(content))
        first, second = run_world(2, both, checkpoint.parent)
        assert first == second and (path.name if kind == "small" else name.split()[0]) in first and f"rank {i}" in first


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


@pytest.mark.parametrize("sealed_files", [False, True])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifest(originals, tmp_path, case, sealed_files, monkeypatch):
    """With a checksum that is right. Also where the sizes of files are not looked at first, as by ranks other than 0."""
    checkpoint = copied(originals[0]["large"], tmp_path / "run")
    edit(checkpoint, HOSTILE[case])
    if sealed_files:
        monkeypatch.setattr(manifest, "check_files", lambda *_: [])
    refused_at_once(checkpoint)


def refused_at_once(checkpoint, **kw):
    """A CheckpointError of one line that names the checkpoint, without memory."""
    before, limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 200 << 20
    tracemalloc.start()
    try:
        with soon(), pytest.raises(CheckpointError) as caught:
            Checkpointer(checkpoint.parent, **kw).restore("2", like=(make(1), abstract()))
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < limit
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    return str(caught.value)


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
    """The form of an open window's metrics names trees of JSON alone: no module is imported for it. Sums that do not fit, or are huge, are refused."""
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
