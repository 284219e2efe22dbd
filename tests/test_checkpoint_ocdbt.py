"""A store that is written once, without tensorstore's help, is the one that tensorstore writes."""

from __future__ import annotations

import random

import pytest
import tensorstore as ts
import torch

from funczero.checkpoint import ocdbt, writer
from funczero.checkpoint.arrays import Array
from funczero.checkpoint.layout import Box, touched
from funczero.checkpoint.ocdbt import CONFIG, INLINE, Span
from funczero.checkpoint.writing import Filled
from funczero.core.number import dtype_name


def some(keys, sizes=(0, 4, 127, 128, INLINE, INLINE + 1, 70_000)):
    """Values by their keys: short ones, long ones, short and long names, beyond ASCII, one inside another."""
    draw = random.Random(keys)
    many = (f"params.{draw.randrange(keys)}.{'w' * draw.randrange(200)}" for _ in range(keys))
    names = ["p", "p/c", "params.\u00e4", *many]
    return {name: draw.randbytes(draw.choice(sizes)) for name in names[:keys]}


SHARED = ts.Context()  # stores of one context alone take over each other's values


def opened(folder, **more):
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/", **more}, context=SHARED).result()


@pytest.mark.parametrize("keys, sizes", [(1, (70_000,)), (2, (4, 70_000)), (9, (0, 4)), (300, (0, 4, 127, 128, 1025))])
def test_a_node_is_tensorstores_byte_for_byte(tmp_path, keys, sizes):
    values, transaction = some(keys, sizes), ts.Transaction()
    store = opened(tmp_path, config=CONFIG | {"compression": None})
    for key, value in values.items():
        store.with_transaction(transaction)[key] = value
    transaction.commit_sync()
    base = ts.KvStore.open(f"file://{tmp_path}/").result()
    root = ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]
    file, start, size = root.removeprefix("btreenode::").rsplit(":", 2)
    there = {}
    for entry in ts.ocdbt.dump(base, root).result()["entries"]:
        place = entry.get("indirect_value", "").removeprefix("value::").rsplit(":", 2)
        there[entry["key"].decode()] = Span(int(place[1]), int(place[2])) if place[0] else entry["inline_value"]
        assert place[0] in ("", file)
    written = (tmp_path / file).read_bytes()[int(start) :][: int(size)]
    assert ocdbt.node(file, dict(sorted(there.items(), reverse=True))) == written


@pytest.mark.parametrize("keys", [1, 2, 300])
def test_tensorstore_reads_and_merges_what_is_there(tmp_path, keys):
    values, there, text = some(keys), {}, b""
    for key, value in values.items():
        there[key] = value if len(value) <= INLINE else Span(len(text), len(value))
        text += value if len(value) > INLINE else b""
    node = ocdbt.node("d/ab", there)
    (tmp_path / "one" / "d").mkdir(parents=True)
    (tmp_path / "one" / "d" / "ab").write_bytes(text + node)
    (tmp_path / "one" / "manifest.ocdbt").write_bytes(ocdbt.manifest("d/ab", Span(len(text), len(node)), there))
    transaction = ts.Transaction(atomic=True)
    opened(tmp_path / "one").experimental_copy_range_to(opened(tmp_path).with_transaction(transaction)).result()
    transaction.commit_sync()
    for folder in (tmp_path / "one", tmp_path):
        store = opened(folder)
        assert {key.decode(): bytes(store[key]) for key in store.list().result()} == values


LEAVES = {  # name -> (values, chunk): chunks that reach over an end, are small, one value, none
    "params/a": (torch.randn(70, 50), (32, 50)),
    "params/line": (torch.randn(70_000).bfloat16(), (30_000,)),
    "params/z": (torch.randn(6, 3, dtype=torch.complex64).conj(), (4, 3)),
    "one": (torch.tensor(2.5), ()),
    "none": (torch.zeros(0, 4), (1, 4)),
    "bits": (torch.tensor([True, False, True]), (3,)),
}


def halves():
    """Every chunk in two parts, from the last to the first; some of one part."""
    for name, (x, chunk) in reversed(LEAVES.items()):
        for key in touched(Box((0,) * x.dim(), tuple(x.shape)), chunk):
            start = tuple(k * c for k, c in zip(key, chunk, strict=True))
            inside = Box(start, chunk).meet(Box((0,) * x.dim(), tuple(x.shape)))
            rows = inside.shape[0] // 2 if x.dim() else 0
            low = Box(start, (rows, *inside.shape[1:]))
            high = Box((start[0] + rows, *start[1:]), (inside.shape[0] - rows, *inside.shape[1:])) if rows else inside
            yield from (Filled(name, key, box, x[box.slices()]) for box in ([low, high] if rows else [inside]))


def test_both_ways_write_the_same_keys_and_values(tmp_path, monkeypatch):
    """Straight, and, where a node would not take all keys, through tensorstore."""
    arrays = {name: Array(tuple(x.shape), dtype_name(x.dtype), chunk) for name, (x, chunk) in LEAVES.items()}
    tails = writer.write(tmp_path / "straight", arrays, halves())
    monkeypatch.setattr(writer, "MOST", 3)
    resolved = (c._replace(values=c.values.resolve_conj()) for c in halves())
    assert writer.write(tmp_path / "coded", arrays, resolved) == tails
    one, other = (
        {key: bytes(store[key]) for key in store.list().result()}
        for store in (opened(tmp_path / folder) for folder in ("straight", "coded"))
    )
    assert one == other and len(one) == sum(map(len, tails.values())) + len(arrays)
