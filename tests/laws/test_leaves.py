"""Odd leaves: frozen, tied, unused, empty, 0-d, used twice, cut along other dims or not at all.

The reference's values, and one hash.
"""

from __future__ import annotations

import pytest
import torch
import zoo
from cover import EACH, cover

import funczero as fz
from funczero import P, tree
from funczero.layout.processes import world_size
from funczero.layout.where import Where

FROZEN = r"embed|blocks/1|blocks/\d/b"  # loose, a whole block, and a leaf inside each block
RULES = [("embed", P(None, "data")), ("conv", P(None, None, "data")), (r"/v$", P(None, "data")), ("unused", P())]


def frozen(path):
    return tree.matcher(FROZEN)(path)


def kinds(k):
    """Stages with and without units, streamed, in place or pure, and what freezes."""
    ice = fz.freeze(FROZEN)
    for units in ((), ("blocks",)):
        for stage in range(4):
            yield f"{stage} {units}", fz.zero(zoo.source(units=units), ice, *zoo.tx(), stage=stage, accumulate=k), 0
    yield "3 remat", fz.zero(zoo.source(loss_fn=zoo.loss_remat), *zoo.tx(), ice, stage=3, accumulate=k), 0
    yield (
        "3 trainable",
        fz.zero(zoo.source(trainable=lambda path: not frozen(path)), *zoo.tx(), stage=3, accumulate=k),
        0,
    )
    yield "3 stream", (fz.shard("data", zoo.source(), fz.accumulate(k, stream=True), *zoo.tx(), ice),), k


def freezing():
    """By chain: the masters, whether frozen bits stayed, moments and gradients held for frozen leaves, and elements
    scattered a micro-batch.
    """
    k, out = zoo.MICROS // world_size(), {}
    for i, (name, parts, stream) in enumerate(kinds(k)):
        masters, log, state, step = zoo.train(
            parts, {"data": -1}, stream, updates=3, dtype=torch.float64, policy="float64", donate=i % 2 == 1
        )
        start, held = dict(tree.paths(zoo.params(torch.float64))), dict(tree.paths(masters))
        kept = all(torch.equal(start[n], x) for n, x in held.items() if frozen(n))
        moved = [
            n for n, x in held.items() if not frozen(n) and n != "unused" and x.numel() and torch.equal(start[n], x)
        ]
        mu = state.chain["adamw"].mu
        ghosts = [
            leaf.path
            for leaf, x in zip(mu.where.structure.leaves, mu.leaves(), strict=True)
            if frozen(leaf.path) != (x is None)
        ]
        out[name] = (
            torch.cat([x.flatten() for x in held.values()]).tolist(),
            kept,
            moved,
            ghosts,
            zoo.tree_hash([masters, log]),
        )
    return out


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_frozen_keeps_its_bits_and_costs_nothing(run_world, world):
    found = zoo.everywhere(run_world, world, freezing)
    masters, _, _ = zoo.reference(updates=3, frozen=frozen)
    want = torch.cat([x.flatten() for x in tree.leaves(masters)])
    for name, (values, kept, moved, ghosts, _) in found.items():
        assert kept and not moved and not ghosts, (name, moved, ghosts)
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), want, rtol=0, atol=1e-12)
    assert len({h for *_, h in found.values()}) == 1


def frozen_nests():
    """The same in nests, where parameters at rest are wider than their masters."""
    out = {}
    for i, (name, (parts, _)) in enumerate(
        zoo.nested_chains(zoo.source(("node", "local")), zoo.MICROS // 4, (fz.freeze(FROZEN), *zoo.tx())).items()
    ):
        masters, log, _, _ = zoo.train(
            parts, {"node": 2, "local": 2}, updates=3, dtype=torch.float64, policy="float64", donate=i % 2 == 1
        )
        out[name] = zoo.tree_hash([masters, log])
    return out


@pytest.mark.slow
def test_what_is_frozen_stays_so_in_every_nest(run_world):
    alone = {h for *_, h in freezing().values()}
    assert set(zoo.everywhere(run_world, 4, frozen_nests).values()) == alone


def frozen_bytes():
    """Elements of gradients sent in an update and of parameters gathered; and the closed form of the first."""
    out = []
    for stage in (0, 1, 2, 3):
        step = fz.train_step(
            *fz.zero(zoo.source(), fz.freeze(FROZEN), *zoo.tx(), stage=stage, accumulate=2), mesh={"data": -1}
        )
        state = step.init(zoo.params())
        rows = step.local_rows(zoo.batch(0))
        with fz.count_bytes(step) as sent:
            step(state, rows)
        structure = state.params.where.structure
        lengths = Where(structure, (("data", 2, 0),)).lengths
        learn = sum(n for n, u in zip(lengths, structure.units, strict=True) if not u.frozen)
        out.append((sent["data", "reduce_scatter", "float32"], 4 * learn * (2 if stage > 1 else 1)))
    return out


def test_no_gradient_of_a_frozen_leaf_is_sent(run_world):
    for found in run_world(2, frozen_bytes):
        assert [sent for sent, _ in found] == [want for _, want in found]


def test_everything_frozen_moves_nothing():
    for stage in range(4):
        masters, log, state, _ = zoo.train(
            fz.zero(zoo.source(), fz.freeze(""), *zoo.tx(), stage=stage, accumulate=2), {"data": 1}, updates=1
        )
        assert (
            zoo.tree_hash(masters) == zoo.tree_hash(zoo.params())
            and log[0].grad_norm == 0
            and sum(b.numel() for b in state.chain["adamw"].mu.buffers) == 0
        )


# --- tied, unused, cut otherwise --------------------------------------------------------------------------------------
def test_a_tensor_at_two_paths_is_one_leaf():
    masters, _, state, step = zoo.train(fz.zero(zoo.source(), *zoo.tx(), stage=3), {"data": 1}, updates=1)
    assert torch.equal(masters["norm"], masters["head"]["scale"]) and not torch.equal(
        masters["norm"], zoo.params()["norm"]
    )
    paths = [leaf.path for leaf in state.params.where.structure.leaves]
    assert "norm" in paths and "head/scale" not in paths
    assert step.specs(zoo.params())["adamw"].mu["head"]["scale"] == P("data")


def tied_blocks():
    """A matrix shared by all blocks and by the head."""
    p = zoo.params(torch.float64)
    for b in p["blocks"]:
        b["w"] = p["head"]["w"].T.contiguous() if b is p["blocks"][0] else p["blocks"][0]["w"]
    return p


def tied(form):
    """One update by stage, by hand and sharded."""
    out = {}
    for stage in range(4):
        g = zoo.source(
            loss_fn=zoo.loss_remat if form == "remat" else zoo.loss_plain, units=() if form == "whole" else ("blocks",)
        )
        step = fz.train_step(
            *fz.zero(g, fz.sgd(0.1), stage=stage, accumulate=zoo.MICROS // world_size()),
            mesh={"data": -1},
            policy="float64",
        )
        state = step.init(tied_blocks())
        state, m = step(state, step.local_rows(zoo.batch(0, torch.float64)))
        out[stage] = [torch.cat([x.flatten() for x in tree.leaves(step.params(state))]).tolist(), m.grad_norm.item()]
    return out


@pytest.mark.parametrize("form", ["whole", "keep", "remat"])
def test_a_tensor_in_every_block_learns_from_all_of_them(run_world, form):
    p = tied_blocks()
    unique = list({id(x): x.requires_grad_() for x in tree.leaves(p)}.values())
    loss, weight = zoo.loss_plain(p, zoo.batch(0, torch.float64))
    grads = dict(zip(map(id, unique), torch.autograd.grad(loss / weight, unique, allow_unused=True), strict=True))
    want = torch.cat(
        [(x - 0.1 * (0 if grads[id(x)] is None else grads[id(x)])).flatten() for x in tree.leaves(p)]
    ).detach()
    norm = sum(g.square().sum() for g in grads.values() if g is not None).sqrt().item()
    for world in (1, 2):
        found = zoo.everywhere(run_world, world, tied, form)
        assert all(found[s] == found[0] for s in found) and found[0][1] == pytest.approx(norm, rel=1e-12)
        torch.testing.assert_close(torch.tensor(found[0][0], dtype=torch.float64), want, rtol=0, atol=1e-13)


def cuts(world, axes):
    """Chains whose brackets cut columns, keep leaves whole, or keep small ones."""
    g, sh, acc, tx = zoo.source(tuple(axes)), fz.shard, fz.accumulate(zoo.MICROS // world), zoo.tx(scale=True)
    ways = {
        "columns": dict(rules=RULES),
        "small whole": dict(threshold=30),
        "all whole": dict(threshold=10**9),
        "both": dict(rules=RULES[:2], threshold=12),
    }
    for name, how in ways.items():
        if "data" in axes:
            yield f"1 {name}", (g, acc, sh("data", *tx, **how))
            yield f"2 {name}", (g, sh("data", acc, *tx, **how))
            yield f"3 {name}", (sh("data", g, acc, *tx, **how),)
        else:
            outer = {
                k: [(r, P(*("local" if a == "data" else a for a in p))) for r, p in v] if k == "rules" else v
                for k, v in how.items()
            }
            yield f"hpZ {name}", (sh("local", g, sh("node", acc, *tx), **outer),)
            yield f"ZeRO-3 {name}", (sh("local", sh("node", g, acc, *tx, threshold=9), **outer),)
            yield f"ZeRO-1 {name}", (g, acc, sh("local", sh("node", *tx), **outer))


def cut_bits(axes, whole):
    """By chain; without `whole` every one on every world, and every way to cut somewhere."""
    rows = [(world, *name.split(" ", 1)) for world in (1, 4) for name, _ in cuts(world, {"data": world})]
    rows += [("nest", *name.split(" ", 1)) for name, _ in cuts(4, {"node": 2, "local": 2})]
    here = "nest" if "node" in axes else {2: 4}.get(world_size(), world_size())
    some = {f"{chain} {way}" for at, chain, way in cover(rows, pairs=[(0, 1)]) if at == here}
    return {
        name: zoo.bits(zoo.train(parts, axes, updates=4))
        for name, parts in cuts(world_size(), axes)
        if whole or name in some
    }


@EACH
@pytest.mark.parametrize(
    "axes",
    [{"data": 1}, {"data": 4}, {"node": 2, "local": 2}, pytest.param({"data": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_how_leaves_are_cut_changes_no_bit(run_world, axes, whole):
    truth = zoo.bits(
        zoo.train(fz.zero(zoo.source(), *zoo.tx(scale=True), stage=0, accumulate=zoo.MICROS), {"data": 1}, updates=4)
    )
    found = zoo.everywhere(run_world, torch.Size(axes.values()).numel(), cut_bits, axes, whole)
    assert found and {n: h for n, h in found.items() if h != truth} == {}


def test_specs_show_the_cut():
    g = zoo.source()
    specs = fz.train_step(fz.shard("data", g, *zoo.tx(), rules=RULES, threshold=8), mesh={"data": 4}).specs(
        zoo.params()
    )
    want = {
        "embed": P(None, "data"),
        "conv": P(None, None, "data"),
        "norm": P(),
        "one": P(),
        "gain": P(),
        "unused": P(),
        "empty": P(),
    }
    assert {n: specs["grads"][n] for n in want} == want == {n: specs["adamw"].nu[n] for n in want}
    assert (
        specs["views"]["blocks"][2] == {"w": P("data"), "v": P(None, "data"), "b": P()} and specs["adamw"].count == P()
    )
