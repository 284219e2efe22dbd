"""A store that is written once, without tensorstore's help, is the one that tensorstore writes."""

from __future__ import annotations

import random

import pytest
import tensorstore as ts

from funczero.checkpoint import ocdbt
from funczero.checkpoint.ocdbt import CONFIG, INLINE, Span


def some(keys):
    """Values by their keys: short ones, long ones, short and long names, beyond ASCII, one inside another."""
    draw = random.Random(keys)
    many = (f"params.{draw.randrange(keys)}.{'w' * draw.randrange(200)}" for _ in range(keys))
    names = ["p", "p/c", "params.\u00e4", *many]
    sizes = (0, 4, 127, 128, INLINE, INLINE + 1, 70_000)
    return {name: draw.randbytes(draw.choice(sizes)) for name in names[:keys]}


SHARED = ts.Context()  # stores of one context alone take over each other's values


def opened(folder, **more):
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/", **more}, context=SHARED).result()


@pytest.mark.parametrize("keys", [1, 2, 300])
def test_a_node_is_tensorstores_byte_for_byte(tmp_path, keys):
    values, transaction = some(keys), ts.Transaction()
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
