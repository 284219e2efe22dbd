"""Bytes per mesh axis of every nest, counted in a run, are a closed form of the spec's buffer lengths, to the byte."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
import zoo
from cover import params

import funczero as fz
from funczero import P
from funczero.comm.norm import BINS
from funczero.layout.where import GRAIN, Where

MESH, K = {"node": 2, "local": 2}, 4
# Moves by name: what happens for every micro-batch, then once an update. F: gather parameters for a forward (as often
# as a unit is opened), S: scatter a gradient, R: gather a summed gradient, G: gather new parameters; over an axis, at
# the place where its outer side is.
MOVES = {
    "DDP": ("", "S local, R local, S node, R node"),
    "ZeRO-1": ("", "S local, S node @local, G node @local, G local"),
    "HSDP-1": ("", "S node, R node, S local, G local"),
    "ZeRO-2": ("S local, S node @local", "G node @local, G local"),
    "MiCS": ("F local, S local", "S node @local, R node @local"),
    "ZeRO-3": ("F node @local, F local, S local, S node @local", ""),
    "hpZ": ("F local, S local, S node @local", "G node @local"),
    "hpZ once": ("F local, S local", "S node @local, G node @local"),
    "hpZ outwards": ("F node, S node", "S local @node, G local @node"),
}
# What the papers say, in units of the parameters' bytes: sent across nodes, within them; at rest: parameters, moments.
TABLE = {
    "DDP": (1.0, 1.0, 1.0, 1.0),
    "ZeRO-1": (0.5, 1.0, 1.0, 0.25),
    "HSDP-1": (1.0, 1.0, 1.0, 0.5),
    "ZeRO-2": (1.25, 2.5, 1.0, 0.25),
    "MiCS": (0.5, 4.0, 0.5, 0.5),
    "ZeRO-3": (2.0, 4.0, 0.25, 0.25),
    "hpZ": (1.25, 4.0, 0.5, 0.25),
    "hpZ once": (0.5, 4.0, 0.5, 0.25),
    "hpZ outwards": (4.0, 0.5, 0.5, 0.25),
}


def clean_params():
    """Leaves that every mesh of four divides into full slots."""
    g = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(64, 64, generator=g),
        "blocks": [{"w": torch.randn(64, 64, generator=g) / 8} for _ in range(3)],
    }


def clean_loss(p, b):
    h = fz.layers(lambda q, x: torch.tanh(x @ q["w"]), p["blocks"], b["x"].to(p["embed"].dtype) @ p["embed"])
    return (h * h).sum(), torch.full((), float(len(h)))


def clean_batch(n):
    return {"x": torch.randn(n, 64, generator=torch.Generator().manual_seed(1))}


MODELS = {
    "clean": (
        clean_params,
        clean_loss,
        lambda: clean_batch(4 * K),
        {"": 1, "blocks/0": 2, "blocks/1": 2, "blocks/2": 1},
    ),
    "odd": (
        zoo.params,
        zoo.loss_plain,
        lambda: zoo.batch(0, micros=4 * K),
        {"": 1, "blocks/0": 2, "blocks/1": 3, "blocks/2": 2},
    ),
}


def measured(model, units, policy, names=None):
    """By chain, or of some: bytes sent in an update by (axis, verb, dtype); elements of parameters and moments at rest,
    whole, and by the closed form.
    """
    make, loss_fn, batch, opens = MODELS[model]
    g, out = fz.value_and_grad(loss_fn, batch=P(tuple(MESH)), units=units), {}
    for name, (parts, _) in zoo.nested_chains(g, K, zoo.tx()).items():
        if names is not None and name not in names:
            continue
        step = fz.train_step(*parts, mesh=MESH, policy=policy, link=fz.Link(latency=0.0))  # each unit by itself
        state = step.init(make())
        with fz.count_bytes(step) as sent:
            state, _ = step(state, step.local_rows(batch()))
        held = [sum(b.numel() for b in x.buffers) for x in (state.views or state.params, state.chain["adamw"].mu)]
        structure = state.params.where.structure
        out[name] = (
            dict(sent),
            held,
            sum(Where.whole(structure).lengths),
            expected(structure, MOVES[name], step.grad.env.policy, opens if units else {}),
        )
    return out


def expected(structure, moves, policy, opens):
    """The closed form: what travels is what an axis cuts, or whole slots where it scatters; sums travel in the dtype
    they were born in.
    """
    out = Counter()
    for many, line in zip((True, False), moves, strict=True):
        born = policy.compute if many else policy.accumulate
        for move in filter(None, line.split(", ")):
            verb, axis, *at = move.replace("@", "").split()
            inner = Where(structure, tuple((a, MESH[a], 0) for a in (*at, axis)))
            dtype = {"F": policy.compute, "G": policy.compute, "S": born, "R": policy.accumulate}[verb]
            if verb == "S":
                elements, born = sum(inner.lengths), policy.accumulate
            else:
                times = [
                    opens.get(structure.units[leaf.unit].name, 1) if verb == "F" else 1 for leaf in structure.leaves
                ]
                elements = sum(
                    s.length * n
                    for s, n, leaf in zip(inner.slots, times, structure.leaves, strict=True)
                    if not leaf.cut(axis).replicated
                )
            key = axis, "reduce_scatter" if verb == "S" else "all_gather", str(dtype).removeprefix("torch.")
            out[key] += elements * dtype.itemsize * (K if many else 1) * (MESH[axis] - 1)
    rows = K * 4
    out["node+local", "all_reduce", "int64"] += (
        (rows * 2 + 1 + BINS + 4) * 8 * 3
    )  # losses and weights by micro-batch, the norm's bins and all checksums, to three others
    return dict(out)


TABLE_OF_RUNS = product(MODELS, [(), ("blocks",)], ["float32", "compute=bfloat16"])


@pytest.mark.parametrize(
    ("model", "units", "policy"),
    params(TABLE_OF_RUNS, by=1, ids=lambda row: f"{row[0]}-{'blocks' if row[1] else 'whole'}-{row[2]}"),
)
def test_bytes_are_the_closed_form(run_world, model, units, policy):
    for by_chain in run_world(4, measured, model, units, policy):
        assert {n: sent for n, (sent, *_) in by_chain.items()} == {n: want for n, (*_, want) in by_chain.items()}


def test_bytes_and_memory_are_the_papers(run_world):
    by_chain = zoo.everywhere(run_world, 4, measured, "clean", (), "float32")
    share = lambda sent, axis, whole: sum(n for (a, *_), n in sent.items() if a == axis) / (4 * whole)
    assert {
        n: (share(sent, "node", w), share(sent, "local", w), rest / w, moments / w)
        for n, (sent, (rest, moments), w, _) in by_chain.items()
    } == TABLE


def test_bf16_halves_what_is_gathered_and_what_is_scattered_as_it_is_born(run_world):
    wide, narrow = (
        zoo.everywhere(run_world, 4, measured, "odd", ("blocks",), p, ["ZeRO-3"])["ZeRO-3"][0]
        for p in ("float32", "compute=bfloat16")
    )
    for axis, verb, factor in (("local", "all_gather", 2), ("node", "all_gather", 2), ("local", "reduce_scatter", 2)):
        assert wide[axis, verb, "float32"] == factor * narrow[axis, verb, "bfloat16"]
    assert (
        wide["node", "reduce_scatter", "float32"] == narrow["node", "reduce_scatter", "float32"]
    )  # already summed once


def resting(stage):
    """Elements held on this rank by parameters, masters and each moment; whole; and their number of slots."""
    step = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=stage, accumulate=2), mesh={"data": 4})
    state = step.init(zoo.params())
    held = [
        sum(b.numel() for b in x.buffers)
        for x in (state.views or state.params, state.params, state.chain["adamw"].mu, state.chain["adamw"].nu)
    ]
    return held, sum(Where.whole(state.params.where.structure).lengths), len(state.params.where.structure.leaves)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_rests_on_four_ranks_is_a_quarter_and_padding(run_world, stage):
    (params, *own), whole, leaves = zoo.everywhere(run_world, 4, resting, stage)
    quarter = whole / 4 + leaves * GRAIN
    assert params <= quarter if stage == 3 else params == whole
    assert all(n <= quarter for n in own) if stage else own == [whole] * 3
