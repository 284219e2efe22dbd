"""Batches as people have them: opened, cut, joined; the same meaning on any number of ranks and micro-batches."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cover import EACH
from torch import ones
from torch.nn.utils.rnn import pack_sequence

import funczero as fz
from funczero import P
from funczero.core import rows
from funczero.core.rows import WHOLE
from funczero.testing import simulate, tree_hash
from funczero.world.ledger import DivergenceError

Pair = namedtuple("Pair", "x table")


@dataclass
class Data:
    """A batch with a field that follows from the others."""

    x: Any
    table: Any
    n: int = field(init=False)

    def __post_init__(self):
        self.n = len(self.x)


class Encoded(UserDict):
    """As transformers' BatchEncoding: keys as attributes, and something beside the leaves that knows of all rows."""

    def __init__(self, data=None, encodings=None):
        super().__init__(data)
        self.encodings = encodings


# --- cut and joined ---------------------------------------------------------------------------------------------------
def test_rows_split_in_order_and_share_memory():
    batch = {"x": torch.arange(6).view(6, 1), "y": [torch.arange(6)]}
    parts = rows.split(batch, 3, "here")
    assert [p["y"][0].tolist() for p in parts] == [[0, 1], [2, 3], [4, 5]]
    assert parts[1]["x"].data_ptr() == batch["x"][2:].data_ptr()
    assert rows.split(batch, 1, "here")[0] is batch


def test_no_rows_split_into_parts_of_none():
    assert [p["x"].shape for p in rows.split({"x": ones(0, 3)}, 2, "here")] == [(0, 3)] * 2


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("odd", [None, "text", b"raw", 3, 0.5, True, ones(())], ids=repr)
def test_what_has_no_rows_is_whole_in_every_part(n, odd):
    parts = rows.split({"x": ones(4, 2), "odd": odd, "deep": [odd, ones(4)]}, n, "here")
    assert len(parts) == n and all(
        p["odd"] is odd and p["deep"][0] is odd and len(p["x"]) == len(p["deep"][1]) == 4 // n for p in parts
    )


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "odd",
    [ones(3), ["a", "b", "c", "d"], (1, 2, 3, 4), object(), pack_sequence([ones(3), ones(2)]), ones(4, 2).to_sparse()],
    ids=["other rows", "words", "numbers", "an object", "packed", "sparse"],
)
def test_what_has_rows_that_cannot_be_cut_is_refused_for_one_part_as_for_two(n, odd):
    batch = {"x": ones(4, 2), "t": {"odd": odd}}
    with pytest.raises((TypeError, ValueError), match=r"^here: .*'t/odd'.* P\(\)"):
        rows.split(batch, n, "here")
    for part in rows.split(batch, n, "here", {"x": 0, "t": WHOLE}):
        assert part["t"]["odd"] is odd and len(part["x"]) == 4 // n


@pytest.mark.parametrize(
    ("make", "cut"),
    [
        (lambda x, t: {"x": x, "table": t}, {"x": 0, "table": WHOLE}),
        (lambda x, t: Pair(x, t), Pair(0, WHOLE)),
        (lambda x, t: (x, [t]), (0, [WHOLE])),
        (Data, {"x": 0, "table": WHOLE}),
        (lambda x, t: Encoded({"x": x, "table": t}, "of all rows"), {"x": 0, "table": WHOLE}),
    ],
    ids=["dict", "namedtuple", "list", "dataclass", "UserDict"],
)
def test_a_container_stays_what_it_is_and_knows_its_own_rows(make, cut):
    batch = make(torch.arange(6), ones(5, 2))
    parts = rows.split(batch, 2, "here", cut)
    assert all(type(p) is type(batch) for p in parts) and rows.count(batch, "here", cut) == 6
    for p, want in zip(parts, ([0, 1, 2], [3, 4, 5]), strict=True):
        x, table = (leaf.value for leaf in rows.opened(p, cut)[0])
        assert x.tolist() == want and table.shape == (5, 2)
    if isinstance(batch, Data):
        assert [p.n for p in parts] == [3, 3]
    if isinstance(batch, Encoded):
        assert [p.encodings for p in parts] == [None, None]  # never those of all rows
    again = rows.joined(parts, cut)
    assert type(again) is type(batch) and rows.opened(again, cut)[0][0].value.tolist() == list(range(6))


def test_a_batch_of_a_tokenizer_is_cut():
    t = pytest.importorskip("transformers")
    batch = t.BatchEncoding({"input_ids": torch.arange(8).view(4, 2), "labels": torch.arange(4)}, encoding=None)
    first, second = rows.split(batch, 2, "here")
    assert type(first) is t.BatchEncoding and second.input_ids.tolist() == [[4, 5], [6, 7]]
    assert first["labels"].tolist() == [0, 1]


def test_a_cut_that_is_no_prefix_of_the_batch_is_refused_by_path():
    batch = {"x": ones(4), "t": {"a": ones(2)}}
    for cut, words in (
        ({"x": 0}, r"here: batch= says nothing of 't', and the batch does have it; write one spec for each of"),
        ({"x": 0, "t": {"a": WHOLE, "b": 0}}, r"here: batch= names 't/b', and the batch does not have it"),
        ({"x": {"y": 0}, "t": WHOLE}, r"here: batch= has a tree of specs for 'x', which is a Tensor; write one spec"),
    ):
        with pytest.raises(ValueError, match=words):
            rows.split(batch, 1, "here", cut)
    with pytest.raises(TypeError, match=r"'x' of the batch has shape \(4,\), so no rows in dim 1"):
        rows.split(batch, 1, "here", {"x": 1, "t": WHOLE})
    with pytest.raises(ValueError, match="no leaf of the batch has rows, so that every part would be the whole batch"):
        rows.split(batch, 2, "here", {"x": WHOLE, "t": WHOLE})


# --- the same numbers everywhere --------------------------------------------------------------------------------------
F64 = "params=float64,compute=float64,accumulate=float64"
N, T = 8, 3


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graph(params, b):
    """One graph of which every node is seen, and the loss's nodes are the rows."""
    hidden = torch.tanh(b["adjacency"] @ b["features"] @ params["w"])
    return (hidden[b["nodes"]] @ params["v"] - b["y"]).square().sum(), torch.tensor(float(len(b["nodes"])))


def sequences(params, b):
    """Time-major tokens, and labels by row."""
    hidden = torch.tanh(b["tokens"] @ params["w"]).mean(0)
    return (hidden @ params["v"] - b["y"]).square().sum(), torch.tensor(float(b["tokens"].shape[1]))


def distilled(params, b):
    """Another network's parameters, a temperature, a name and nothing."""
    teacher = torch.tanh(b["x"] @ b["teacher"]["w"]) @ b["teacher"]["v"]
    out = torch.tanh(b["x"] @ params["w"]) @ params["v"]
    assert b["name"] == "row" and b["mask"] is None
    return ((out - teacher) / b["t"] / b["scale"]).square().sum(), torch.tensor(float(len(b["x"])))


def of_fields(params, b):
    """Of a dataclass."""
    return (torch.tanh(b.x @ params["w"]) @ params["v"] - b.table.sum()).square().sum(), torch.tensor(float(b.n))


def of_keys(params, b):
    """Of a mapping of its own kind."""
    return of_fields(params, Data(b["x"], b["table"]))


def of_names(params, b):
    """Of a NamedTuple."""
    return of_fields(params, Data(b.x, b.table))


NODES = {"adjacency": draw(9, 9), "features": draw(9, 4, seed=1), "nodes": torch.arange(N), "y": draw(N, 2, seed=2)}
TEACHER = {"w": draw(4, 5, seed=5), "v": draw(5, 2, seed=6)}
MORE = {"teacher": TEACHER, "t": 2.0, "scale": torch.tensor(0.5, dtype=torch.float64), "name": "row", "mask": None}
X, TABLE, ROWS, FREE = draw(N, 4, seed=3), draw(7, seed=4), P("data"), P()
TWO = {"x": ROWS, "table": FREE}
KINDS = {
    "a graph": (graph, {"adjacency": FREE, "features": FREE, "nodes": ROWS, "y": ROWS}, NODES),
    "time-major": (sequences, {"tokens": P(None, "data"), "y": ROWS}, {"tokens": draw(T, N, 4), "y": draw(N, 2)}),
    "a teacher": (
        distilled,
        {"x": ROWS, "teacher": FREE, "t": FREE, "scale": FREE, "name": FREE, "mask": FREE},
        {"x": X, **MORE},
    ),
    "a dataclass": (of_fields, TWO, Data(X, TABLE)),
    "a UserDict": (of_keys, TWO, Encoded({"x": X, "table": TABLE})),
    "a NamedTuple": (of_names, Pair(ROWS, FREE), Pair(X, TABLE)),
}


def params():
    return {"w": draw(4, 5, seed=7), "v": draw(5, 2, seed=8)}


def plain(loss_fn, batch, updates=3):
    """The same in torch, at once."""
    p = {k: x.clone().requires_grad_() for k, x in params().items()}
    opt, losses = torch.optim.AdamW(list(p.values()), 1e-2, weight_decay=0.01), []
    for _ in range(updates):
        opt.zero_grad()
        loss, weight = loss_fn(p, batch)
        (loss / weight).backward()
        opt.step()
        losses.append((loss / weight).item())
    return {k: x.detach() for k, x in p.items()}, losses


def run(loss_fn, spec, batch, stage, world, k, stream=False, updates=3):
    """Trained; and what eval and grads say of the last state, with no update between."""

    def rank():
        parts = [*([fz.accumulate(k, stream=stream)] if k > 1 or stream else []), fz.adamw(1e-2, weight_decay=0.01)]
        step = fz.train_step(
            *fz.zero(fz.value_and_grad(loss_fn, batch=spec), *parts, stage=stage), mesh={"data": world}, policy=F64
        )
        state, losses = step.init(params()), []
        mine = step.local_rows(batch)
        for _ in range(updates):
            if stream:
                for micro in rows.split(mine, k, "test", step.grad.layout.cut):
                    state, _ = step(state, micro)
            state, m = step(state, None if stream else mine)
            losses.append(m.loss.item())
        looked = {} if stream else step.grads(state, mine)
        return step.params(state), losses, step.eval(loss_fn)(state, mine), looked

    (first, losses, seen, looked), *others = simulate({"data": world})(rank)
    assert all(tree_hash(o[0]) == tree_hash(first) for o in others)
    return first, losses, seen, looked


@EACH
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_means_the_same_at_every_stage_world_and_number_of_micro_batches(kind, whole):
    """Without `whole` one stage on each world, the next kind the other one."""
    loss_fn, spec, batch = KINDS[kind]
    want, losses = plain(loss_fn, batch)
    p = {k: x.clone().requires_grad_() for k, x in want.items()}
    loss, weight = loss_fn(p, batch)
    grads = dict(zip(p, torch.autograd.grad(loss / weight, list(p.values())), strict=True))
    hashes = {}
    for stage in (0, 3):
        for world in (1, 2):
            if not whole and (stage == 0) == (list(KINDS).index(kind) + world) % 2:
                continue
            for k in (1, 2, 4 // world):
                got, seen_losses, seen, looked = run(loss_fn, spec, batch, stage, world, k)
                hashes.setdefault(world * k, set()).add(tree_hash(got))
                for name, x in want.items():
                    assert (got[name] - x).abs().max() <= 1e-10 * x.abs().max(), (stage, world, k, name)
                    assert (looked[name] - grads[name]).abs().max() <= 1e-10 * grads[name].abs().max()
                assert seen_losses == pytest.approx(losses, rel=1e-10)
                assert seen.loss.item() == pytest.approx((loss / weight).item(), rel=1e-10)
                assert seen.weight.item() == weight.item()
    assert {micros: len(found) for micros, found in hashes.items()} == {1: 1, 2: 1, 4: 1}


@pytest.mark.parametrize("kind", ["a graph", "time-major", "a dataclass"])
def test_a_stream_is_the_loop(kind):
    loss_fn, spec, batch = KINDS[kind]
    loop, stream = (run(loss_fn, spec, batch, 2, 2, 2, stream=s)[0] for s in (False, True))
    assert tree_hash(loop) == tree_hash(stream)


@pytest.mark.parametrize("k", [1, 2])
def test_a_differentiable_step_cuts_alike(k):
    loss_fn, spec, batch = KINDS["a graph"]

    def rank():
        parts = [*([fz.accumulate(k)] if k > 1 else []), fz.adamw(1e-2)]
        step = fz.train_step(
            *fz.zero(fz.value_and_grad(loss_fn, batch=spec), *parts, stage=3), mesh={"data": 2}, policy=F64
        )
        state, mine = step.init(params()), step.local_rows(batch)
        return step.params(step(state, mine)[0]), step.params(fz.differentiable(step)(state, mine)[0])

    for a, b in simulate({"data": 2})(rank):
        assert tree_hash(a) == tree_hash(b)


@pytest.mark.parametrize("wrap", [fz.per_row, fz.mean_loss])
def test_a_mean_over_rows_counts_those_of_its_chain(wrap):
    mean = lambda p, b: sequences(p, b)[0] / b["tokens"].shape[1]
    _, spec, batch = KINDS["time-major"]
    got, losses, seen, _ = run(wrap(mean), spec, batch, 3, 2, 2)
    want, plainly = plain(sequences, batch)
    assert seen.weight.item() == N and losses == pytest.approx(plainly, rel=1e-10)
    assert all((got[name] - x).abs().max() <= 1e-10 for name, x in want.items())


def test_a_graph_that_all_ranks_see_alike_counts_once():
    loss_fn, _, batch = KINDS["a graph"]
    want, losses = plain(loss_fn, batch)

    def rank():
        step = fz.train_step(
            fz.value_and_grad(loss_fn, replicated=("data",)),
            fz.adamw(1e-2, weight_decay=0.01),
            mesh={"data": 2},
            policy=F64,
        )
        state = step.init(params())
        for loss in losses:
            state, m = step(state, batch)
            assert m.loss.item() == pytest.approx(loss, rel=1e-10) and m.weight.item() == N
        return step.params(state)

    for got in simulate({"data": 2})(rank):
        assert all((got[name] - x).abs().max() <= 1e-10 * x.abs().max() for name, x in want.items())


# --- what is whole is the same on all ranks ---------------------------------------------------------------------------
def test_a_step_says_how_its_batch_is_cut():
    step = fz.train_step(fz.value_and_grad(graph, batch=TWO), fz.all_reduce("data"), fz.sgd(0.1), mesh={"data": 2})
    assert "value_and_grad(batch={'x': P('data'), 'table': P()})  -> sum, unreduced over ['data']" in str(step)


@pytest.mark.parametrize(
    "odd", [{"t": 3.0}, {"name": "other"}, {"teacher": {**TEACHER, "w": TEACHER["w"] + 1}}], ids=str
)
@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_that_are_given_other_wholes_are_told(odd, stage):
    _, spec, batch = KINDS["a teacher"]
    loss_fn = lambda p, b: distilled(p, {**b, "name": "row"})

    def rank():
        step = fz.train_step(
            *fz.zero(fz.value_and_grad(loss_fn, batch=spec), fz.sgd(0.1), stage=stage), mesh={"data": 2}, policy=F64
        )
        state, mine = step.init(params()), step.local_rows(batch)
        step(state, {**mine, **(odd if step.mesh.index("data") else {})})

    path = "teacher/w" if "teacher" in odd else next(iter(odd))
    with pytest.raises(
        DivergenceError, match=f"rank . was given another value of '{path}' of the batch than rank . at"
    ):
        simulate({"data": 2})(rank)


def test_a_batch_that_is_not_as_said_is_refused_without_any_cut():
    step = fz.train_step(
        fz.value_and_grad(graph, batch=TWO), fz.all_reduce("data"), fz.sgd(0.1), mesh={"data": 1}, policy=F64
    )
    with pytest.raises(ValueError, match="value_and_grad: batch= says nothing of 'y'"):
        step(step.init(params()), {"x": X, "table": TABLE, "y": X})
