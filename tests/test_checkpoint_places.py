"""Where the values of a store lie, and who reads how much of them."""

from __future__ import annotations

import os
from concurrent.futures import Future
from math import prod
from pathlib import Path
from unittest import mock

import pytest
import tensorstore as ts
import torch
from attempts import saves

import funczero as fz
from funczero.checkpoint import Checkpointer, CheckpointError, manifest
from funczero.checkpoint.decoded import Decoded
from funczero.checkpoint.direct import Direct
from funczero.checkpoint.layout import Box
from funczero.checkpoint.places import Places
from funczero.checkpoint.reader import opened
from funczero.checkpoint.restore import ask_whole
from funczero.testing import tree_hash


def found(place):
    return place if place is None or isinstance(place, bytes) else place.file.read_bytes()[place.start :][: place.size]


@pytest.mark.parametrize("node", [300, 10**8], ids=["many levels", "one node"])
def test_every_key_of_a_tree_is_where_tensorstore_finds_it(tmp_path, node):
    config = {"max_inline_value_bytes": 4, "max_decoded_node_bytes": node}
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/", "config": config}).result()
    values = {f"pre{i % 3}/x{i:03d}/c": bytes([i]) * (i % 9) for i in range(60)}
    for some in (list(values)[:40], list(values)[20:]):  # the second commit refers to nodes of the first
        transaction = ts.Transaction()
        for key in some:
            store.with_transaction(transaction)[key] = values[key]
        transaction.commit_async().result()
    places = Places(tmp_path, len(values))
    assert {key: found(places.of(key)) for key in values} == values
    assert [places.of(key) for key in ("", "pre0/x000", "pre1/x000/c", "pre9", "a", "pre0/x000/c/")] == [None] * 6
    with pytest.raises(CheckpointError, match="holds 60 values instead of 59"):
        Places(tmp_path, 59)


def told(entry, **root):
    """A store of which tensorstore tells one node."""

    def dump(base, node=None):
        said = Future()
        newest = {"root": {"statistics": {"num_keys": 1}, "location": "node", **root}}
        said.set_result({"entries": [{"key": b"k", **entry}]} if node else {"versions": [newest]})
        return said

    return mock.patch.object(ts.ocdbt, "dump", dump)


@pytest.mark.parametrize(
    "entry, why",
    [
        ({"indirect_value": "value:../other/:d/ab:0:4"}, "which is no value inside it"),
        ({"indirect_value": "value:/etc/:passwd:0:4"}, "which is no value inside it"),
        ({"indirect_value": "btreenode::d/ab:0:4"}, "which is no value inside it"),
        ({"location": "node", "subtree_common_prefix": b""}, "a tree without an end"),
    ],
    ids=["beside", "elsewhere", "a node", "a ring"],
)
def test_what_leads_nowhere_is_refused(tmp_path, entry, why):
    with told(entry), pytest.raises(CheckpointError, match=why):
        Places(tmp_path, 1).of("k")


def leaves():
    g = torch.Generator().manual_seed(0)
    sizes = {"odd": (1026, 513), "wide": (64, 3, 4096), "line": (70_002,), "small": (7, 3), "none": (0, 4)}
    values = {name: torch.randn(shape, generator=g) for name, shape in sizes.items()}
    return values | {"bf": torch.randn(700, 301, generator=g).bfloat16(), "one": torch.tensor(2.5)}


def step_of(size):
    loss = lambda p, b: (sum(x.float().sum() for x in p.values()) * b.sum(), b.sum())
    chain = fz.shard("data", fz.value_and_grad(loss, batch=fz.P("data")), fz.adamw(0.1))
    return fz.train_step(chain, mesh={"data": size}, check=0)


def read_so_far():
    return int(next(x for x in Path("/proc/self/io").read_text().splitlines() if x.startswith("rchar")).split()[1])


def shares(directory, how):
    """Bytes that this rank read in a restore, and bytes of its part of the state."""
    with mock.patch.dict(os.environ, FUNCZERO_KERNELS=how):
        step = step_of(2)
        state = step.init(leaves())
        ck = Checkpointer(directory, step=step)
        assert saves(ck, state, how) is None
        there = fz.tree.map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state)
        ck.restore(how, like=there, donate=True)  # imports, the first time
        before = read_so_far()
        got = ck.restore(how, like=there, donate=True).state
        return read_so_far() - before, sum(x.nbytes for x in fz.tree.tensors(state)), tree_hash(got) == tree_hash(state)


@pytest.mark.parametrize("how", ["auto", "reference"])
def test_each_rank_reads_its_own_share_once(run_world, tmp_path, how):
    """Beside it what the checkpoint says of itself: less than 64 KiB here."""
    for read, share, same in run_world(2, shares, tmp_path, how):
        assert same and share > 4 << 20 and share * 0.99 < read < share + (64 << 10), (read, share)


def test_both_ways_of_saving_and_reading_have_the_same_bytes(tmp_path, monkeypatch):
    step = step_of(1)
    state = step.init(leaves())
    for how in ("auto", "reference"):
        monkeypatch.setenv("FUNCZERO_KERNELS", how)
        with Checkpointer(tmp_path) as ck:
            ck.save(state, how)
    wrote = [manifest.load(tmp_path / how) for how in ("auto", "reference")]
    assert wrote[0].arrays == wrote[1].arrays
    for how, kind in (("auto", Direct), ("reference", Decoded)):
        monkeypatch.setenv("FUNCZERO_KERNELS", how)
        for name in ("auto", "reference"):
            reader, made = opened(tmp_path / name / manifest.ARRAYS, wrote[0].arrays), {}
            assert type(reader) is kind
            for leaf in wrote[0].arrays:
                ask_whole(reader, leaf, wrote[0].arrays[leaf], made)
            part: list[torch.Tensor] = []  # of two chunks, whole of none
            reader.ask("params/odd", Box((500, 7), (300, 100)), lambda: torch.empty(300, 100), part.append)
            reader.finish()
            assert torch.equal(part[0], leaves()["odd"][500:800, 7:107])
            assert all(torch.equal(made[f"params/{n}"], x.to(made[f"params/{n}"])) for n, x in leaves().items())


@pytest.mark.parametrize("how", ["auto", "reference"])
def test_a_checksum_that_is_wrong_beside_right_values_is_found(tmp_path, monkeypatch, how):
    """Stock readers would refuse the chunk."""
    monkeypatch.setenv("FUNCZERO_KERNELS", how)
    step = step_of(1)
    with Checkpointer(tmp_path) as ck:
        ck.save(step.init(leaves()), 1)
    array = manifest.load(tmp_path / "1").arrays["params/wide"]
    tail = bytes.fromhex(array.tails["c/0/0/0"])
    for path in (tmp_path / "1").rglob("d/*"):
        path.write_bytes(path.read_bytes().replace(tail, bytes(4)))
    assert prod(array.chunk) * 4 > 1 << 16
    with pytest.raises(CheckpointError, match="leaf 'params/wide' is damaged: chunk c/0/0/0 is another one"):
        Checkpointer(tmp_path).restore(like=(step, leaves()))
