"""Inputs that somebody wrote who means harm: checkpoints with a seal that is right, trees of orbax, safetensors.
`INPUTS[name](folder)` makes one and returns its path.

`python injuries.py` reads {"place", "names"} as a line of JSON and tries each in turn in one process; a line of JSON
for each: seconds, memory, and what was raised.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import time
from pathlib import Path

import torch

import funczero as fz
from funczero.checkpoint import Checkpointer, CheckpointError, arrays, export, importing, manifest, tools

BIG = 1 << 15  # squared, in float32: 4 GiB


def step_of():
    """A step and its parameters."""
    loss = lambda p, b: ((p["w"] * b).sum() + p["v"].sum(), b.sum())
    return fz.train_step(fz.value_and_grad(loss), fz.adamw(0.1)), {"w": torch.ones(24, 24), "v": torch.arange(5.0)}


def checkpoint(folder):
    """A good one."""
    step, params = step_of()
    with Checkpointer(folder, step=step) as ck:
        ck.save(step.init(params), 1, client_state={"seen": torch.arange(30), "at": (1, 2)})
    return folder / "1"


def resealed(path, change):
    """Its manifest changed as a text or as a body, with a seal that is right."""
    body = json.loads((path / manifest.FILE).read_text())
    new = change(body)
    text = new if isinstance(new, bytes) else json.dumps(body if new is None else new, separators=(",", ":")).encode()
    (path / manifest.FILE).write_bytes(text)
    (path / manifest.SEAL).write_bytes(f"{hashlib.sha256(text).hexdigest()}  {manifest.FILE}\n".encode())
    return path


def store_of(path):
    """Its store of arrays, to write into."""
    import tensorstore as ts

    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path / manifest.ARRAYS}/"}).result()


def stored(path, **values):
    """Values in its store, and all files listed anew."""
    kv = store_of(path)
    for key, value in values.items():
        kv.write(key.replace("__", "/"), value).result()
    return stored_anew(path)


def zarr(leaf="params.w", entry=None, tail=None, **change):
    """A leaf's zarr.json changed; `entry` also changes what the manifest says of it."""

    def make(folder):
        path = checkpoint(folder)
        said = json.loads(store_of(path).read(f"{leaf}/zarr.json").result().value)
        said.update(change)
        path = stored(
            path,
            **{f"{leaf}__zarr.json": json.dumps(said).encode()},
            **({f"{leaf}__c__0__0": tail} if tail is not None else {}),
        )
        if entry:

            def more(body):
                body["arrays"][leaf.replace(".", "/")] |= entry
                body["files"]["state/manifest.ocdbt"][0] = (
                    1 << 60 if entry.get("shape") else body["files"]["state/manifest.ocdbt"][0]
                )

            resealed(path, more)
        return path

    return make


def grid(*chunk):
    return {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}


def edit(change):
    return lambda folder: resealed(checkpoint(folder), change)


def put(**more):
    return lambda body: body.update(more)


def text(template):
    """A manifest whose client state is this text."""
    return lambda body: json.dumps(body | {"client": "HERE"}).replace('"HERE"', template).encode()


def strangers(n):
    return lambda body: body["arrays"].update(
        {f"t{i}/x": {"shape": [], "dtype": "float32", "chunk": [], "tails": {"c": "00000000"}} for i in range(n)}
    )


GZIP = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "gzip", "configuration": {"level": 9}},
    {"name": "crc32c"},
]
SHARD = [
    {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [24, 24],
            "codecs": GZIP[:2],
            "index_codecs": [GZIP[0], GZIP[2]],
            "index_location": "end",
        },
    }
]
MANIFESTS = {
    "zarr: chunk of 4 GiB": zarr(chunk_grid=grid(BIG, BIG)),
    "zarr and manifest: chunk of 4 GiB": zarr(entry={"chunk": [BIG, BIG]}, chunk_grid=grid(BIG, BIG)),
    "zarr: codec gzip": zarr(codecs=GZIP),
    "zarr: codec sharding": zarr(codecs=SHARD),
    "zarr: no checksum": zarr(codecs=GZIP[:1]),
    "zarr: transpose": zarr(codecs=[{"name": "transpose", "configuration": {"order": [1, 0]}}, GZIP[0], GZIP[2]]),
    "zarr: shape": zarr(shape=[BIG, BIG]),
    "zarr: dtype": zarr(data_type="float64"),
    "zarr: keys": zarr(chunk_key_encoding={"name": "v2", "configuration": {"separator": "/"}}),
    "zarr: storage transformers": zarr(storage_transformers=[{"name": "x"}]),
    "zarr: a list": lambda folder: stored(checkpoint(folder), **{"params.w__zarr.json": b"[]"}),
    "zarr: deep": lambda folder: stored(checkpoint(folder), **{"params.w__zarr.json": b"[" * 60_000 + b"]" * 60_000}),
    "zarr: 10 MB": lambda folder: stored(checkpoint(folder), **{"params.w__zarr.json": b" " * 10_000_000 + b"{}"}),
    "zarr: a chunk of its checksum alone": lambda folder: short_chunk(folder),
    "client array of 1 TiB, its chunk of 4 bytes": lambda folder: huge_client(folder),
    "store: no ocdbt": lambda folder: broken_store(folder, b"not ocdbt"),
    "store: zeros": lambda folder: broken_store(folder, bytes(200)),
    "manifest: 6 MB of lists": edit(text("[" + "[]," * 2_000_000 + "1]")),
    "manifest: 6 MB of dicts": edit(text("[" + "{}," * 2_000_000 + "1]")),
    "manifest: 60 MB of lists": edit(text("[" + "[]," * 20_000_000 + "1]")),
    "manifest: a string of 100 MB": edit(text('"' + "x" * 100_000_000 + '"')),
    "manifest: deep": edit(text("[" * 100_000 + "]" * 100_000)),
    "manifest: deep dicts": edit(text('{"a":' * 20_000 + "1" + "}" * 20_000)),
    "manifest: client 900 deep": edit(text("[" * 900 + "7" + "]" * 900)),
    "manifest: 30,000 strangers": edit(strangers(30_000)),
    "manifest: metric of 10^400": edit(put(metrics={"loss": 10**400})),
    "manifest: step of 10^400": edit(put(step=10**400)),
    "manifest: negative step": edit(put(step=-1)),
    "manifest: sequence of 10^400": edit(put(sequence=10**400)),
    "manifest: tie to nothing": edit(put(ties={"params/x": "params/nowhere"})),
    "manifest: tie of a moment": edit(put(ties={"adamw/mu/x": "params/w"})),
    "manifest: chain a list": edit(lambda body: body["about"].update(chain=[1])),
    "manifest: specs a list": edit(lambda body: body["about"].update(specs=[1])),
    "manifest: not finite of numbers": edit(lambda body: body["about"].update({"not finite": [1]})),
    "manifest: a name of 1 MB": edit(
        lambda body: body["arrays"].update({"params/" + "x" * 1_000_000: body["arrays"]["params/v"]})
    ),
    "manifest: bytes no base64": edit(put(client={"$bytes": "%%%"})),
    "manifest: int no hexadecimal": edit(put(client={"$int": "zz"})),
    "manifest: array of bytes no such": edit(put(client={"$array": "params/none", "kind": "bytes"})),
    "manifest: kind no such": edit(put(client={"$array": "params/v", "kind": "pickle"})),
}


def short_chunk(folder):
    """A chunk that consists of its checksum."""
    path = checkpoint(folder)
    tail = bytes.fromhex(manifest.load(path).arrays["params/w"].tails["c/0/0"])
    return stored(path, **{"params.w__c__0__0": tail})


def huge_client(folder):
    """An array of the client's that no template bounds."""
    path = checkpoint(folder)
    n = 1 << 38
    zarr_json = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [n],
        "data_type": "float32",
        "chunk_grid": grid(n),
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0.0,
        "codecs": arrays.CODECS,
    }
    stored(path, **{"client.seen__zarr.json": json.dumps(zarr_json).encode(), "client.seen__c__0": b"\0\0\0\0"})
    huge = path / "state" / "d" / "huge"
    with huge.open("wb") as f:
        f.truncate(1 << 41)  # a hole, so that there are as many bytes

    def more(body):
        body["arrays"]["client/seen"] = {"shape": [n], "dtype": "float32", "chunk": [n], "tails": {"c/0": "00000000"}}
        body["files"]["state/d/huge"] = [1 << 41, None]

    return resealed(path, more)


def broken_store(folder, content):
    path = checkpoint(folder)
    (path / "state" / "manifest.ocdbt").write_bytes(content)
    return stored_anew(path)


def stored_anew(path):
    """All files listed anew, whatever they hold."""
    files = {
        f.relative_to(path).as_posix(): [f.stat().st_size if f.name != manifest.STAMPED else -1, manifest._crc(f)]
        for f in manifest._files(path)
        if f.name != manifest.LAST
    }
    return resealed(path, lambda body: body.update(files=files))


def orbax_tree(change=lambda root: None, **arrays_):
    """A tree of zarr3 files as stock orbax lays it out."""

    def make(folder):
        import numpy as np
        import tensorstore as ts

        folder.mkdir(parents=True)
        (folder / "_METADATA").write_text(
            json.dumps(
                {
                    "use_zarr3": True,
                    "store_array_data_equal_to_fill_value": True,
                    "tree_metadata": {
                        f"('params', '{n}')": {
                            "key_metadata": [{"key": "params", "key_type": 2}, {"key": n, "key_type": 2}]
                        }
                        for n in ("a", "b")
                    },
                }
            )
        )
        for n, shape in {"a": (6, 4), "b": (3,)}.items():
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{folder}/params.{n}/"},
                "metadata": {"shape": shape, "data_type": "float32", "chunk_grid": grid(*[3] * len(shape))},
            }
            ts.open(spec | {"store_data_equal_to_fill_value": True}, create=True).result().write(
                np.ones(shape, np.float32)
            ).result()
        change(folder)
        return folder

    return make


def in_zarr(**change):
    def apply(root):
        file = root / "params.a" / "zarr.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return apply


def meta(content):
    return lambda root: (root / "_METADATA").write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode()
    )


TREES = {
    "tree: a chunk is missing": orbax_tree(lambda root: (root / "params.a" / "c" / "1" / "1").unlink()),
    "tree: an array is missing": orbax_tree(lambda root: (root / "params.b" / "zarr.json").unlink()),
    "tree: shape of 4 GiB": orbax_tree(in_zarr(shape=[BIG, BIG])),
    "tree: chunks of 4 GiB": orbax_tree(in_zarr(chunk_grid=grid(BIG, BIG))),
    "tree: shape beyond 64 bits": orbax_tree(in_zarr(shape=[1 << 70, 1])),
    "tree: zarr.json no JSON": orbax_tree(lambda root: (root / "params.a" / "zarr.json").write_text("{")),
    "tree: dtype of strings": orbax_tree(in_zarr(data_type="string")),
    "tree: _METADATA deep": orbax_tree(meta(b"[" * 100_000)),
    "tree: _METADATA a list": orbax_tree(meta([1])),
    "tree: _METADATA of numbers": orbax_tree(meta({"tree_metadata": {"a": 3}})),
    "tree: _METADATA leads outside": orbax_tree(
        meta({"use_zarr3": True, "tree_metadata": {"a": {"key_metadata": [{"key": "../outside"}]}}})
    ),
    "tree: _METADATA a hole of 1 TiB": orbax_tree(lambda root: os.truncate(root / "_METADATA", 1 << 40)),
    "tree: _METADATA a device": orbax_tree(
        lambda root: ((root / "_METADATA").unlink(), os.symlink("/dev/zero", root / "_METADATA"))
    ),
}


def tensors_file(header, values=b"", name="x.safetensors", length=None):
    """A safetensors file by hand."""

    def make(folder):
        folder.mkdir(parents=True)
        said = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(said) if length is None else length) + said + values)
        return folder / name

    return make


def index(content):
    def make(folder):
        folder.mkdir(parents=True)
        (folder / "m.safetensors.index.json").write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode()
        )
        return folder / "m.safetensors.index.json"

    return make


def special(make_it):
    def make(folder):
        folder.mkdir(parents=True)
        make_it(folder / "x.safetensors")
        return folder / "x.safetensors"

    return make


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
TENSORS = {
    "safetensors: header of 2^62 bytes": tensors_file({"a": ONE}, bytes(4), length=1 << 62),
    "safetensors: header longer than the file": tensors_file({"a": ONE}, bytes(4), length=10_000),
    "safetensors: shape of 4 GiB": tensors_file({"a": ONE | {"shape": [BIG, BIG]}}, bytes(4)),
    "safetensors: offsets outside": tensors_file(
        {"a": ONE | {"data_offsets": [0, 1 << 40], "shape": [1 << 38]}}, bytes(4)
    ),
    "safetensors: offsets negative": tensors_file({"a": ONE | {"data_offsets": [-4, 0]}}, bytes(4)),
    "safetensors: offsets overlap": tensors_file({"a": ONE, "b": ONE}, bytes(4)),
    "safetensors: dtype no such": tensors_file({"a": ONE | {"dtype": "F1024"}}, bytes(4)),
    "safetensors: deep": tensors_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", bytes(4)),
    "safetensors: a list": tensors_file([1]),
    "safetensors: no JSON": tensors_file(b"\xff\xfe"),
    "safetensors: empty": lambda folder: (
        folder.mkdir(parents=True),
        (folder / "x.safetensors").write_bytes(b""),
        folder / "x.safetensors",
    )[-1],
    "safetensors: shape overflows": tensors_file({"a": ONE | {"shape": [1 << 33, 1 << 33, 4]}}, bytes(4)),
    "safetensors: a pipe": special(os.mkfifo),
    "safetensors: a device": special(lambda p: os.symlink("/dev/zero", p)),
    "safetensors: a folder": special(os.mkdir),
    "safetensors: a link to itself": special(lambda p: os.symlink(p, p)),
    "index: no JSON": index(b"{"),
    "index: a list": index([1]),
    "index: no weight_map": index({"metadata": {}}),
    "index: weight_map a list": index({"weight_map": ["a"]}),
    "index: of numbers": index({"weight_map": {"a": 3}}),
    "index: deep": index(b"[" * 100_000),
    "index: leads outside": index({"weight_map": {"a": "../../../../../../etc/passwd"}}),
    "index: of absent files": index({"weight_map": {"a": "none.safetensors"}}),
    "index: of lists": index({"weight_map": {"a": [1]}}),
}
INPUTS = MANIFESTS | TREES | TENSORS


def tried(name, path, place):
    """How each use of an input ends: restore, inspect, verify and export of a checkpoint, import of anything else."""
    step, params = step_of()
    out = place / "out"
    if name in MANIFESTS:
        uses = {
            "restore": lambda: Checkpointer(path.parent).restore("1", like=(step, params)),
            "export": lambda: export.export(path, out / "x.safetensors", overwrite=True),
        }
    else:
        uses = {"import": lambda: importing.import_weights(path, out / "run", name.replace("/", "-"))}
    said = {}
    for use, call in uses.items():
        before, start = memory(), time.perf_counter()
        try:
            call()
            said[use] = {"kind": ""}
        except BaseException as e:
            said[use] = {
                "kind": "CheckpointError" if isinstance(e, CheckpointError) else type(e).__name__,
                "text": str(e),
            }
        said[use] |= {"seconds": time.perf_counter() - start, "bytes": memory(peak=True) - before}
    if name in MANIFESTS:
        problems = tools.verify(path)
        said["verify"] = {
            "kind": "CheckpointError" if problems else "",
            "text": problems[0] if problems else "",
            "seconds": 0,
            "bytes": 0,
        }
    return said


def memory(peak=False):
    """Resident bytes now, from which the peak is then counted; or that peak."""
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) << 10


def main():
    """Make and try each."""
    asked = json.loads(sys.stdin.readline())
    place = Path(asked["place"])
    (place / "out").mkdir()
    for i, name in enumerate(asked["names"]):
        path = INPUTS[name](place / str(i))
        print(json.dumps({"name": name, **tried(name, path, place)}), flush=True)


if __name__ == "__main__":
    main()
