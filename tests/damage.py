"""Checkpoints to be damaged: two saves of a world of two, copies of them, and files that are changed."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import funczero as fz
from funczero import P
from funczero.checkpoint import Checkpointer, CheckpointError, manifest
from funczero.checkpoint.manifest import FILE, SEAL
from funczero.checkpoint.names import named
from funczero.checkpoint.preparing import chain_of, coords_of
from funczero.checkpoint.reading import read
from funczero.checkpoint.target import Restorer, Want, template
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


def written(directory):
    """Saves 1 and 2 of a world of two."""
    step, g = make(2), torch.Generator().manual_seed(2)
    state = step.init(params(), key=3)
    with Checkpointer(directory, step=step) as ck:
        for t in (1, 2):
            rows = {"x": torch.randint(31, (8,), generator=g), "y": torch.randint(9, (8,), generator=g)}
            state, _ = step(state, step.local_rows(rows))
            ck.save(state, t, client_state=CLIENT, metrics={"loss": 1.0 / t})


def by_chunks(body):
    """A manifest under which files of chunks are checked chunk by chunk alone, as in large checkpoints."""
    for path, about in body["files"].items():
        if Path(path).parent.name == "d":
            about[1] = None


def written_both(run_world, tmp_path_factory):
    """Two folders of two checkpoints, files checked whole or by their chunks alone, and the bits of both saves."""
    out = {kind: tmp_path_factory.mktemp(kind) / "run" for kind in ("small", "large")}
    run_world(2, written, out["small"])
    shutil.copytree(out["small"], out["large"])
    for name in ("1", "2"):
        edit(out["large"] / name, by_chunks)
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


def edit(checkpoint, change, seal=True):
    """funczero.json changed, with a checksum that is right again."""
    body = json.loads((checkpoint / FILE).read_text())
    body = body if (new := change(body)) is None else new
    text = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    fresh(checkpoint / FILE, text)
    if seal:
        fresh(checkpoint / SEAL, f"{hashlib.sha256(text).hexdigest()}  {FILE}\n".encode())


def restored(checkpoint, **kw):
    """As a user reads it."""
    return Checkpointer(checkpoint.parent, **kw).restore("2", like=(make(1), abstract()))


def read_beside(checkpoint):
    """As a rank other than 0 reads it, which does not look at the files first."""
    step = make(1)
    target, fresh = template(step, abstract())
    restorer = Restorer(1, 2, [coords_of(target)] * 2, chain_of(step), torch.device("cpu"), False)
    return read(checkpoint, manifest.LIMIT, target, fresh, Want(True, (), ()), restorer)


def refused_at_once(checkpoint, how=restored, **kw):
    """A CheckpointError of one line that names the checkpoint, without memory."""
    before, limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 200 << 20
    tracemalloc.start()
    try:
        with soon(), pytest.raises(CheckpointError) as caught:
            how(checkpoint, **kw)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < limit
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    return str(caught.value)
