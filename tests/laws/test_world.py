"""Weights, moments, metrics and scale are bitwise the same on any world, at every stage, in any nest, streamed or not,
in place or pure.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
import zoo
from cover import EACH, cover

import funczero as fz
from funczero.layout.processes import world_size

POLICIES = {
    "fp32": "float32",
    "bf16": "params=float32,compute=bfloat16,accumulate=float32",
    "fp16": "params=float32,compute=float16,accumulate=float32",
}  # fmt: skip
LOSSES = {"keep": dict(), "remat": dict(loss_fn=zoo.loss_random_remat), "whole": dict(units=())}


def source(axes, form="keep"):
    return zoo.source(tuple(axes), rng=True, **{"loss_fn": zoo.loss_random, **LOSSES[form]})


@cache
def truth(policy):
    """One rank, nothing sharded, nothing in place, no units: the bits that all others have."""
    parts, _ = zoo.flat_chains(source(["data"], "whole"), zoo.MICROS, zoo.tx(scale=True))["0 grad acc ar"]
    return zoo.bits(zoo.train(parts, {"data": 1}, policy=POLICIES[policy]))


def hashes(policy, axes, form, donated, names=None):
    """The bits of every chain on a mesh, or of those of some names, in every rank; `donated` says whether in place:
    always, never, or every other chain.
    """
    k, table = zoo.MICROS // world_size(), zoo.flat_chains if len(axes) == 1 else zoo.nested_chains
    chains = table(source(axes, form), k, zoo.tx(scale=True)).items()
    return {
        n: zoo.bits(zoo.train(parts, axes, s, policy=POLICIES[policy], donate=(i + donated) % 2 == 1))
        for i, (n, (parts, s)) in enumerate(chains)
        if names is None or n in names
    }


def rows(worlds):
    """A table of runs on one axis: (policy, world, form, chain, donated)."""
    chains = zoo.flat_chains(source(["data"]), zoo.MICROS, zoo.tx())
    return list(product(POLICIES, worlds, LOSSES, chains, (False, True)))


def hashes_of(some):
    """The bits of runs of the table that are this world's."""
    out, k = {}, zoo.MICROS // world_size()
    for policy, world, form, chain, donated in some:
        parts, stream = zoo.flat_chains(source(["data"], form), k, zoo.tx(scale=True))[chain]
        run = zoo.train(parts, {"data": world}, stream, policy=POLICIES[policy], donate=donated)
        out[policy, world, form, chain, donated] = zoo.bits(run)
    return out


def others(found, policy):
    return {name: h for name, h in found.items() if h != truth(policy)}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("world", [1, 2, 4])
def test_one_hash_in_a_cover_of_all_worlds_stages_dtypes_and_forms(run_world, world):
    """Every stage on every world, every form in every dtype; the tables below are whole, and slow."""
    staged = {(chain[0], *row): row for row in rows([1, 2, 4]) for chain in [row[3]]}
    some = [staged[row] for row in cover(staged, pairs=[(0, 2), (1, 3), (0, 5), (2, 5)]) if row[2] == world]
    found = zoo.everywhere(run_world, world, hashes_of, some)
    assert {row: h for row, h in found.items() if h != truth(row[0])} == {} and len(found) == len(some) > 3


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "world"), [*product(["fp32", "bf16"], [1, 2, 4])])
def test_one_hash_on_every_world_and_at_every_stage(run_world, world, policy):
    assert others(zoo.everywhere(run_world, world, hashes, policy, {"data": world}, "keep", 0), policy) == {}


@EACH
@pytest.mark.parametrize("policy", ["fp32", pytest.param("bf16", marks=SLOW)])
@pytest.mark.parametrize("sizes", [{"node": 2, "local": 2}], ids=str)
def test_one_hash_in_every_nest(run_world, sizes, policy, whole):
    """Without `whole` those that the reference is not asked of (test_reference.py)."""
    names = None if whole else ("DDP", "ZeRO-1", "ZeRO-3", "hpZ", "hpZ outwards")
    assert others(zoo.everywhere(run_world, 4, hashes, policy, sizes, "keep", 0, names), policy) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "form"), [("fp32", "remat"), ("fp16", "keep"), ("bf16", "whole")])
def test_one_hash_however_blocks_run_and_whatever_is_donated(run_world, policy, form):
    assert others(zoo.everywhere(run_world, 2, hashes, policy, {"data": 2}, form, 1), policy) == {}


def odd_nests(k):
    """Streams in nests, a frozen part, axes named in another order, and an axis that no batch is split over: name ->
    (parts, stream, mesh).
    """
    g, acc, sh, tx = source(("node", "local")), fz.accumulate, fz.shard, zoo.tx(scale=True)
    alike = zoo.source(("data",), rng=True, loss_fn=zoo.loss_random, replicated=("aside",))
    nest, aside = {"node": 2, "local": 2}, {"data": 2, "aside": 2}
    return {
        "hpZ stream": ((sh("local", g, sh("node", acc(k, stream=True), *tx)),), k, nest),
        "hpZ once stream": ((sh("local", g, acc(k, stream=True), sh("node", *tx)),), k, nest),
        "ZeRO-3 loop, stream": ((sh("local", sh("node", g, acc(2), acc(k // 2, stream=True), *tx)),), k // 2, nest),
        "batch the other way": ((sh("node", sh("local", source(("local", "node")), acc(k), *tx)),), 0, nest),
        "aside 1": ((alike, acc(2 * k), sh("data", *tx)), 0, aside),
        "aside 3": ((sh("data", alike, acc(2 * k), *tx),), 0, aside),
    }


def odd_hashes(names=None):
    chains = odd_nests(zoo.MICROS // 4).items()
    return {
        n: zoo.bits(zoo.train(parts, mesh, s, policy="float32", donate=i % 2 == 1))
        for i, (n, (parts, s, mesh)) in enumerate(chains)
        if names is None or n in names
    }


@EACH
def test_one_hash_in_odd_nests(run_world, whole):
    names = None if whole else ("hpZ once stream", "batch the other way", "aside 3")
    assert others(zoo.everywhere(run_world, 4, odd_hashes, names), "fp32") == {}


def deep():
    """Three brackets, in every way they may stand around the gradient."""
    axes = ("pod", "node", "local")
    g, acc, sh, tx, out = source(axes), fz.accumulate, fz.shard, zoo.tx(scale=True), {}
    chains = {
        "ZeRO-3": (sh("local", sh("node", sh("pod", g, *tx))),),
        "hpZ": (sh("local", g, sh("node", sh("pod", *tx))),),
        "hpZ of two": (sh("local", sh("node", g, sh("pod", *tx))),),
        "MiCS": (sh("local", sh("node", g, fz.all_reduce("pod"), *tx)),),
        "ZeRO-1": (g, acc(1), sh("pod", sh("node", sh("local", *tx)))),
        "ZeRO-2 and a sum": (g, fz.all_reduce("node"), sh("local", sh("pod", *tx))),
    }
    for name, parts in chains.items():
        out[name] = zoo.bits(zoo.train(parts, dict.fromkeys(axes, 2)))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"node": 2, "local": 4}, {"node": 4, "local": 2}, {"data": 8}], ids=str)
@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_one_hash_on_eight_ranks(run_world, sizes, policy):
    found = run_world(8, hashes, policy, sizes, "keep", 0, timeout=300)
    assert others(found[0], policy) == {} and all(f == found[0] for f in found)


@pytest.mark.slow
def test_one_hash_in_three_brackets(run_world):
    found = run_world(8, deep, timeout=300)
    assert others(found[0], "fp32") == {} and all(f == found[0] for f in found)


def dealt(places):
    """ZeRO-3 with each rank's micro-batches chosen by hand: the masters after three updates."""
    step = fz.train_step(fz.shard("data", zoo.source(), fz.accumulate(4), *zoo.tx()), mesh={"data": 2})
    state, rank = step.init(zoo.params()), step.running().env.mesh.index("data")
    for t in range(3):
        micros = zoo.split(zoo.batch(t), zoo.MICROS)
        state, _ = step(state, {n: torch.cat([micros[i][n] for i in places[rank]]) for n in micros[0]})
    return torch.cat([x.flatten() for x in torch.utils._pytree.tree_leaves(step.params(state))]).tolist()


def test_rows_dealt_otherwise_agree_to_rounding_and_not_in_bits(run_world):
    """The negative control: with another tree of sums the same loss gives other bits, so the hashes above can fail."""
    ours, theirs = (
        torch.tensor(zoo.everywhere(run_world, 2, dealt, p))
        for p in ([[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]])
    )
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
