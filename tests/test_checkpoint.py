"""Names on disk, what a client state may hold, who writes which chunk, and what stock readers see."""

from __future__ import annotations

import json
import subprocess
import sys
from math import ceil, prod

import checkpoints
import numpy as np
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

import funczero as fz
from funczero.checkpoint import Checkpointer, client
from funczero.checkpoint.layout import Box, chunk_shape, deal
from funczero.checkpoint.memory import numpy_view
from funczero.checkpoint.names import named
from funczero.layout.lazy import lazy
from funczero.layout.where import Where
from funczero.testing import tree_hash

LEAF_DTYPES = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int8",
    "uint8",
    "uint64",
    "bool",
    "complex64",
]


# names


def test_names_carry_no_stage_and_ties_are_stored_once():
    names = []
    for chain in ("0 grad acc ar", "3 [grad acc"):
        step = checkpoints.make(chain, 1)
        found = named(step.init(zoo.params()))
        names.append(list(found.parts))
        assert found.ties == {"params/head/scale": "params/norm"}
    assert names[0] == names[1]
    assert {
        "step",
        "updates",
        "key",
        "params/blocks/0/w",
        "adamw/mu/blocks/2/b",
        "adamw/nu/gain",
        "adamw/count",
        "scale_loss/scale",
    } <= set(names[0])
    assert "params/head/scale" not in names[0] and "adamw/mu/head/scale" not in names[0]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"a/b": 1, "c%d": 2, "": 3}, {"params/a%2Fb", "params/c%25d", "params/%"}),
        ({"layers.0.weight": 1}, {"params/layers.0.weight"}),
        ({"a": [1, {"b": 2}]}, {"params/a/0", "params/a/1/b"}),
        (1, {"params"}),
    ],
)
def test_users_keys_are_escaped(params, expected, tmp_path):
    step, state = checkpoints.tiny(x=torch.zeros(1))
    params = fz.tree.map(lambda n: torch.full((n,), float(n)), params)
    state = step.init(params)
    assert {n for n in named(state).parts if n.startswith("params")} == expected
    with Checkpointer(tmp_path) as ck:
        ck.save(state, 1)
        assert tree_hash(step.params(ck.restore(like=(step, params)).state)) == tree_hash(params)


@pytest.mark.parametrize(
    "params", [{"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}, {0: torch.zeros(1), "0": torch.zeros(1)}]
)
def test_colliding_names_are_refused(params, tmp_path):
    step, _ = checkpoints.tiny(x=torch.zeros(1))
    with pytest.raises(ValueError, match="two leaves would both be stored as"):
        Checkpointer(tmp_path).save(step.init(params), 1)
    assert not list(tmp_path.iterdir())


def test_a_slash_in_a_key_is_no_separator(tmp_path):
    params = {"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1)}
    step, _ = checkpoints.tiny(x=torch.zeros(1))
    with Checkpointer(tmp_path) as ck:
        ck.save(step.init(params), 1)
        assert tree_hash(step.params(ck.restore(like=(step, params)).state)) == tree_hash(params)


def lifted():
    """A pair whose state mirrors the parameters, with counters of other dtypes."""

    class Pair:
        name = "pair"

        @staticmethod
        def init(params):
            return {
                "trace": fz.tree.map(torch.zeros_like, params),
                "n": torch.zeros((), dtype=torch.int64),
                "on": torch.tensor([True, False]),
            }

        @staticmethod
        def update(grads, state, params):
            trace = fz.tree.map(lambda t, g: 0.9 * t + g, state["trace"], grads)
            return fz.tree.map(lambda t: -0.1 * t, trace), {**state, "trace": trace, "n": state["n"] + 1}

    return fz.lift(Pair, elementwise=True)


def lifted_run(directory, size, save):
    """Stage 3 with a lifted optimizer."""
    step = fz.train_step(fz.shard("data", zoo.source(), lifted()), mesh={"data": size})
    if save:
        state = checkpoints.train(step, step.init(zoo.params()), 0, 2)
        with Checkpointer(directory) as ck:
            ck.save(state, 1)
        return checkpoints.parts(state)
    return checkpoints.parts(Checkpointer(directory).restore(like=(step, checkpoints.abstract())).state)


def test_a_lifted_optimizers_state_is_cut_like_the_parameters(run_world, tmp_path):
    before = checkpoints.joined(run_world(2, lifted_run, tmp_path, 2, True))
    assert "pair/trace/blocks/0/w" in before and before["pair/on"].tolist() == [True, False]
    assert not checkpoints.same(before, checkpoints.joined([lifted_run(tmp_path, 1, False)]))
    assert not checkpoints.same(before, checkpoints.joined(run_world(4, lifted_run, tmp_path, 4, False)))


# client state

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner, max_size=3)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=3) | st.integers() | st.booleans(), inner, max_size=3),
    max_leaves=12,
)


@given(plain)
def test_a_client_state_comes_back_as_it_was(value):
    encoded, arrays = client.encode(value)
    again = client.decode(json.loads(json.dumps(encoded)), arrays.__getitem__)
    assert repr(again) == repr(value)


@pytest.mark.parametrize("dtype", LEAF_DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 3), (1,)])
def test_arrays_of_a_client_state(dtype, shape, tmp_path):
    x = (torch.arange(prod(shape)).reshape(shape) % 3).to(getattr(torch, dtype))
    given_ = {"tensor": x, "turned": x.T if x.dim() == 2 else x}
    if dtype not in ("bfloat16",) and not dtype.startswith("float8"):
        given_ |= {"numpy": x.numpy(), "scalar": x.numpy().reshape(-1)[:1].sum().astype(dtype)}
    step, state = checkpoints.tiny(w=torch.ones(2))
    with Checkpointer(tmp_path) as ck:
        ck.save(state, 1, client_state=given_)
        got = ck.restore(like=state).client_state
    assert {k: (type(v), v.dtype, v.shape) for k, v in got.items()} == {
        k: (type(v), v.dtype, v.shape) for k, v in given_.items()
    }
    assert all(bits(got[k]) == bits(given_[k]) for k in given_)


def bits(x):
    """The bytes of an array of any kind."""
    return numpy_view(x.contiguous()).tobytes() if torch.is_tensor(x) else x.tobytes()


@pytest.mark.parametrize(
    "bad", [object(), {1, 2}, lambda: 0, np.array(["a"]), torch.empty(2, device="meta"), {(1, 2): 3}]
)
def test_other_objects_are_refused_by_path_before_anything_is_written(bad, tmp_path):
    step, state = checkpoints.tiny(w=torch.ones(2))
    with pytest.raises(TypeError, match="client/outer/1"):
        Checkpointer(tmp_path).save(state, 1, client_state={"outer": [0, bad]})
    assert not list(tmp_path.iterdir())
    loop: list = []
    loop.append(loop)
    with pytest.raises(TypeError, match="contains itself"):
        client.encode(loop)


# who writes what


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(8, 600))
def test_every_value_is_written_once_and_chunks_keep_to_the_cap(rows, columns, outer, inner, cap):
    structure = lazy({"w": torch.zeros(rows, columns)}, (), {}, lambda p: False, torch.device("cpu")).structure
    ranks = [{"a": (outer, i), "b": (inner, j)} for i in range(outer) for j in range(inner)]
    from funczero.checkpoint.names import Part

    written = torch.zeros(rows, columns, dtype=torch.int64)
    for rank, c in enumerate(ranks):
        where = Where(structure, tuple((n, *c[n]) for n in ("a", "b")))
        part = Part(torch.zeros(where.slots[0].shape), (rows, columns), where.slots[0].start, where, 0)
        own = deal({"w": part}, ranks, rank)
        for piece in own.pieces:
            if piece.holder == rank:
                written[piece.box.slices()] += 1
                assert Box(part.start, tuple(part.value.shape)).meet(piece.box) == piece.box
    assert (written == 1).all()
    chunk = chunk_shape((ceil(ceil(rows / outer) / inner), columns), (rows, columns), 4, cap)
    assert prod(chunk) * 4 <= max(cap, 4)


def test_replicas_share_the_writing():
    state = checkpoints.make("0 grad acc ar", 1).init(zoo.params())
    ranks = [{}] * 4
    loads = []
    for rank in range(4):
        own = deal(named(state).parts, ranks, rank)
        loads.append(sum(prod(p.box.shape) * 4 for p in own.pieces))
    assert max(loads) < 2 * min(loads)


# what others see


def test_stock_readers_and_tensorstore_read_it_and_their_trees_are_imported(tmp_path):
    """In a process without torch and funczero."""
    step, state = checkpoints.tiny(a=torch.arange(6.0).view(2, 3), b={"c": torch.ones(4, dtype=torch.bfloat16)})
    with Checkpointer(tmp_path / "ck") as ck:
        ck.save(state, "x", client_state={"n": torch.arange(3)})
    script = f"""
import sys, json, numpy as np, jax, tensorstore as ts, orbax.checkpoint as ocp
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
ck = ocp.StandardCheckpointer()
got = ck.restore("{tmp_path}/ck/x/state")
here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
assert got["params"]["a"].tolist() == [[0, 1, 2], [3, 4, 5]], got
assert str(got["params"]["b"]["c"].dtype) == "float32" and got["client"]["n"].tolist() == [0, 1, 2], got
like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), got)
assert isinstance(ck.restore("{tmp_path}/ck/x/state", like)["params"]["a"], jax.Array)
store = {{"driver": "ocdbt", "base": "file://{tmp_path}/ck/x/state/", "path": "adamw.mu.a/"}}
t = ts.open({{"driver": "zarr3", "kvstore": store}}, open=True).result()
assert t.shape == (2, 3) and (t.read().result() == 0).all()
params = {{"a": np.arange(6, dtype=np.float32).reshape(2, 3) + 1, "b": {{"c": np.full(4, 7, np.float32)}}}}
ck.save("{tmp_path}/stock", {{"params": params, "opt": np.zeros(3)}})
ck.wait_until_finished()
assert not {{"torch", "funczero"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from funczero.checkpoint.importing import import_weights

    import_weights(tmp_path / "stock", tmp_path / "imported")
    got = Checkpointer(tmp_path / "imported").restore(like=state)
    assert (
        step.params(got.state)["a"].tolist() == [[1, 2, 3], [4, 5, 6]]
        and step.params(got.state)["b"]["c"].tolist() == [7] * 4
    )
    *fresh, rates = got.notes
    assert fresh == [
        f"the checkpoint holds nothing of {h!r}, which starts fresh" for h in ("step", "updates", "key", "adamw")
    ]
    assert rates.startswith("the checkpoint says nothing of these rates, which come from the script: adamw/rates/lr = ")


def test_jax_comes_with_the_first_save_alone(tmp_path):
    """One process imports, a child of it saves, and it restores."""
    script = f"""
import os, sys, logging, torch, funczero as fz
here = lambda: [m for m in ("jax", "orbax", "tensorstore") if m in sys.modules]
assert not here()
saves = not os.fork()
if not saves:
    assert not os.wait()[1]
handlers = list(logging.getLogger().handlers)
step = fz.train_step(fz.value_and_grad(lambda p, b: ((p["w"] * b).sum(), b.sum())), fz.adamw(0.1))
state = step.init({{"w": torch.ones(3)}})
ck = fz.Checkpointer({str(tmp_path)!r})
if saves:
    ck.save(state, 1); ck.close()
    import jax
    assert here() and jax.config.jax_platforms == "cpu" and logging.getLogger().handlers == handlers
else:
    ck.restore(like=state)
    assert here() == ["tensorstore"]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
