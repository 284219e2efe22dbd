"""Injured checkpoints: every injury is named, none is silent, nothing hangs."""

from __future__ import annotations

import json
import logging
import random

import pytest
from damage import abstract, bits, copied, edit, files, fresh, make, soon

from funczero.checkpoint import Checkpointer, CheckpointError, folder, manifest
from funczero.checkpoint.manifest import FILE, SEAL
from funczero.testing import tree_hash


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


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_200_injuries(originals, tmp_path, part):
    """Either restore names a leaf or a file, or the bits are the saved ones and the full check of files names it."""
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
    """A flipped bit in the checksum's file, or in what orbax says of the checkpoint, is named; but for the digits of
    the time of the commit.
    """
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
    """Damage that one rank alone reads, in small files and in large ones, or that rank 0 alone looks for."""
    for kind, rank in (("small", 1), ("large", 1), ("small", 0)):
        checkpoint = copied(originals[0][kind], tmp_path / f"{kind}{rank}")
        name, path, at, _ = [c for c in chunks(checkpoint) if "layers/1/w c/1" in c[0]][rank]
        if rank:
            content = bytearray(path.read_bytes())
            content[at] ^= 1
            fresh(path, bytes(content))
        else:
            name, path = "state/_METADATA", checkpoint / "state" / "_METADATA"
            fresh(path, path.read_bytes()[:-1])
        first, second = run_world(2, both, checkpoint.parent)
        assert first == second and name.split()[0] in first and f"rank {rank}" in first, (first, second)
