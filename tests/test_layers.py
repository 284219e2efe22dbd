"""The seam: closed parameters, blocks one by one, at most two units open, and the plain loop's bits."""

from __future__ import annotations

import pytest
import torch
import zoo
from cover import EACH, cover

import funczero as fz
from funczero import P, rng
from funczero.layout.processes import world_size

BLOCKS = 5


def params(n=BLOCKS):
    g = torch.Generator().manual_seed(0)
    return {
        "in": torch.randn(4, 6, generator=g) / 2,
        "blocks": [{"w": torch.randn(6, 6, generator=g) / 2, "b": torch.randn(6, generator=g)} for _ in range(n)],
    }


def block(p, x, scale=1.0, key=None):
    h = torch.tanh(x @ p["w"] + p["b"])
    return x + scale * (h if key is None else rng.dropout(h, 0.3, key))


def rows(n=8):
    return {"x": torch.randn(n, 4, generator=torch.Generator().manual_seed(1))}


def total(h):
    return h.square().sum(), torch.full((), float(len(h)))


# --- the plain loop ---------------------------------------------------------------------------------------------------
def test_open_blocks_run_in_turn():
    p = params()
    x = want = rows()["x"] @ p["in"]
    for b in p["blocks"]:
        want = block(b, want, 0.5)
    assert torch.equal(fz.layers(block, p["blocks"], x, 0.5), want) and torch.equal(
        fz.layers(block, p["blocks"], x, 0.5, remat=True), want
    )
    assert fz.layers(block, [], x) is x


def test_each_block_has_a_key_of_its_own():
    seen = []
    fz.layers(lambda p, x, key: seen.append(key) or x, [{}, {}, {}], torch.ones(1), key=9)
    assert seen == [rng.fold(9, i) for i in range(3)]


@pytest.mark.parametrize("remat", [False, True])
def test_aux_values_come_as_a_list(remat):
    def noisy(p, x):
        y = block(p, x)
        return y, {"mean": y.mean(), "n": torch.tensor(1.0)}

    x, auxes = fz.layers(noisy, params()["blocks"], torch.ones(2, 6), remat=remat)
    assert len(auxes) == BLOCKS and set(auxes[0]) == {"mean", "n"} and torch.equal(auxes[-1]["mean"], x.mean())


def test_x_may_be_a_tree():
    def pair(p, x):
        return {"a": x["a"] + 1, "b": x["b"] * 2}

    got = fz.layers(pair, [{}, {}], {"a": torch.zeros(1), "b": torch.ones(1)}, remat=True)
    assert got["a"] == 2 and got["b"] == 4


# --- closed parameters ------------------------------------------------------------------------------------------------
def stack(remat):
    return lambda p, b: total(fz.layers(block, p["blocks"], b["x"] @ p["in"], remat=remat))


def opened(remat):
    """Units in the order they were gathered, as the log of launches has them, and what the tape of one update says: how
    many were gathered at once, and what is left.
    """
    tapes = []

    def shown(p, b):
        tapes.append(p["blocks"][0]["w"].tape)
        return stack(remat)(p, b)

    step = fz.train_step(
        *fz.zero(fz.value_and_grad(shown, batch=P("data"), units=("blocks",)), fz.sgd(0.1), stage=3),
        mesh={"data": world_size()},
    )
    state = step.init(params())
    log = step.live_mesh.ledger.watch.log
    before = log.count
    step(state, rows(8 // world_size()))
    launched = [e for n, _, e in log.entries if n > before and e.verb == "all_gather"]
    order, (tape,) = [e.context.units[u] for e in launched for u in e.units], tapes
    found = tape.gathers
    return order, found.peak, found.live, len(found.open) + len(found.here), len(found.flying)


@pytest.mark.parametrize("remat", [False, True])
def test_at_most_two_blocks_are_gathered_at_once(run_world, remat):
    """The one that computes and the one that travels, however many there are; and nothing is left open."""
    names = [f"blocks/{i}" for i in range(BLOCKS)]
    order, peak, live, left, flying = zoo.everywhere(run_world, 2, opened, remat)
    back = (
        names[::-1] if order.count(names[-1]) == 2 else names[-2::-1]
    )  # the last block may stay open for the backward
    assert order == ["", *names, *back] and peak <= 2 and (live, left, flying) == (0, 0, 0)


def opening(stage):
    """The same loss with blocks gathered by hand, by fz.layers, and twice; masters after two updates."""

    def by_hand(p, b):
        h = b["x"] @ p["in"]
        for q in p["blocks"]:
            h = block(fz.gather(q), h)
        return total(h)

    def at_once(p, b):
        h = b["x"] @ p["in"]
        for q in fz.gather(p["blocks"]):
            h = block(q, h)
        return total(h)

    out = []
    for loss, units in (
        (by_hand, "blocks"),
        (at_once, "blocks"),
        (stack(False), "blocks"),
        (stack(True), "blocks"),
        (stack(False), ()),
    ):
        g = fz.value_and_grad(loss, batch=P("data"), units=units)
        step = fz.train_step(
            *fz.zero(g, fz.sgd(0.1, momentum=0.9), stage=stage, accumulate=4 // world_size()), mesh={"data": -1}
        )
        state = step.init(params())
        for _ in range(2):
            state, _ = step(state, step.local_rows(rows()))
        out.append(zoo.tree_hash(step.params(state)))
    return out


def openings():
    return [opening(stage) for stage in range(4)]


def test_however_blocks_are_opened_the_bits_are_those_of_the_plain_loop(run_world):
    alone = opening(0)
    assert len(set(alone)) == 1 and zoo.everywhere(run_world, 2, openings) == [alone] * 4


def shared_inputs(remat):
    """Gradients reach what blocks share: a parameter, and a value computed from one; and not an integer."""

    def loss(p, b):
        def one(q, x, bias, at, half):
            return block(q, x[:, at]) * half + bias

        at = torch.arange(6).flip(0)
        return total(fz.layers(one, p["blocks"], b["x"] @ p["in"], p["bias"] * 2, at, p["half"], remat=remat))

    out = []
    for units in ((), ("blocks",)):
        step = fz.train_step(
            fz.shard("data", fz.value_and_grad(loss, batch=P("data"), units=units), fz.sgd(0.1)), mesh={"data": -1}
        )
        state = step.init(params() | {"bias": torch.zeros(6), "half": torch.tensor(0.5)})
        state, _ = step(state, step.local_rows(rows()))
        got = step.params(state)
        out.append((zoo.tree_hash(got), bool((got["bias"] != 0).all()), got["half"].item() != 0.5))
    return out


@pytest.mark.parametrize("remat", [False, True])
def test_what_blocks_share_learns_from_all_of_them(run_world, remat):
    for world in (1, 2):
        plain, closed = zoo.everywhere(run_world, world, shared_inputs, remat)
        assert plain == closed and plain[1:] == (True, True)


LOSSES = "backwards", "some", "twice", "none", "mixed", "detour"
ICE = "^$", r"blocks/\d/w", "blocks/[13]"
USES = [(loss, ice, world) for loss in LOSSES for ice in ICE for world in (1, 2)]


def odd_uses(tried):
    """Blocks used in another order, in part, twice, or not at all; frozen in part; a loss that opens some and reads one
    leaf of another.
    """

    def backwards(p, b):
        return total(fz.layers(block, p["blocks"][::-1], b["x"] @ p["in"]))

    def some(p, b):
        return total(fz.layers(block, p["blocks"][1:4:2], b["x"] @ p["in"]))

    def twice(p, b):
        h = fz.layers(block, p["blocks"], b["x"] @ p["in"])
        return total(fz.layers(block, p["blocks"], h, remat=True))

    def none(p, b):
        return total(b["x"] @ p["in"])

    def mixed(p, b):
        h = fz.layers(block, p["blocks"][:2], b["x"] @ p["in"])
        return total(h * fz.gather(p["blocks"][4]["b"]) + fz.gather(p["blocks"][4])["b"])

    def detour(p, b):
        with torch.no_grad():
            h = fz.layers(block, p["blocks"], b["x"] @ p["in"])
        return total(fz.layers(block, p["blocks"][:2], h + b["x"] @ p["in"]))

    out = {}
    for loss in (backwards, some, twice, none, mixed, detour):
        for ice in (ice for name, ice, _ in tried if name == loss.__name__):
            for units in ((), ("blocks",)):
                g = fz.shard(
                    "data",
                    fz.value_and_grad(loss, batch=P("data"), units=units),
                    fz.freeze(ice),
                    fz.accumulate(2),
                    fz.sgd(0.1),
                )
                step = fz.train_step(g, mesh={"data": -1})
                state = step.init(params())
                for _ in range(2):
                    state, m = step(state, step.local_rows(rows()))
                out[loss.__name__, ice, units] = zoo.tree_hash([step.params(state), m.grad_norm])
    return out


@EACH
@pytest.mark.parametrize("world", [1, 2])
def test_blocks_may_be_used_in_any_way(run_world, world, whole):
    """Without `whole` every use on both worlds, and every part frozen on both."""
    tried = [row for row in (USES if whole else cover(USES, pairs=[(0, 2), (1, 2)])) if row[2] == world]
    found = zoo.everywhere(run_world, world, odd_uses, tried)
    assert len(found) == 2 * len(tried)
    assert {n: h for n, h in found.items() if h != found[n[0], n[1], ()]} == {}


def two_lists():
    """An encoder and a decoder: units of two lists, of other shapes, one inside a subtree."""
    g = torch.Generator().manual_seed(2)
    draw = lambda *s: torch.randn(s, generator=g) / 2
    p = {
        "enc": {"blocks": [{"w": draw(4, 4), "b": draw(4)} for _ in range(3)]},
        "dec": [{"w": draw(4, 4), "b": draw(4), "n": {"s": draw(4)}} for _ in range(2)],
    }

    def loss(p, b):
        memory = fz.layers(block, p["enc"]["blocks"], b["x"])
        return total(fz.layers(lambda q, x, m: block(q, x) * q["n"]["s"] + m, p["dec"], b["x"], memory, remat=True))

    out = []
    for units in ((), ("dec",), ("enc/blocks", "dec"), ("enc", "dec")):
        step = fz.train_step(
            fz.shard("data", fz.value_and_grad(loss, batch=P("data"), units=units), fz.sgd(0.1)), mesh={"data": -1}
        )
        state, m = step(step.init(p), step.local_rows(rows()))
        out.append(zoo.tree_hash([step.params(state), m]))
    return out


def test_units_may_be_several_lists_or_hold_one_whole(run_world):
    for world in (1, 2):
        assert len(set(zoo.everywhere(run_world, world, two_lists))) == 1


def second_order():
    """A penalty on the gradient at the blocks' input, through the keep form."""

    def loss(p, b):
        h = b["x"] @ p["in"]
        (g,) = torch.autograd.grad(total(fz.layers(block, p["blocks"], h))[0], h, create_graph=True)
        return total(g)

    out = []
    for units in ((), ("blocks",)):
        step = fz.train_step(
            fz.shard("data", fz.value_and_grad(loss, batch=P("data"), units=units), fz.sgd(0.01)), mesh={"data": -1}
        )
        state, m = step(step.init(params()), step.local_rows(rows()))
        out.append((zoo.tree_hash(step.params(state)), m.grad_norm.item()))
    return out


def test_second_derivatives_through_kept_blocks_are_those_of_the_plain_loop(run_world):
    plain, closed = zoo.everywhere(run_world, 2, second_order)
    assert plain == closed


def aborted():
    """A forward that raises leaves nothing behind: the next update is as if it had not been."""
    fail = [True]

    def loss(p, b):
        h = fz.layers(block, p["blocks"][:3], b["x"] @ p["in"])
        if fail[0]:
            raise ArithmeticError("a bad batch")
        return total(fz.layers(block, p["blocks"][3:], h))

    step = fz.train_step(
        fz.shard("data", fz.value_and_grad(loss, batch=P("data"), units="blocks"), fz.sgd(0.1)), mesh={"data": -1}
    )
    state = step.init(params())
    with pytest.raises(ArithmeticError):
        step(state, step.local_rows(rows()))
    fail[0] = False
    state, _ = step(state, step.local_rows(rows()))
    return zoo.tree_hash(step.params(state))


def clean():
    step = fz.train_step(
        fz.shard("data", fz.value_and_grad(stack(False), batch=P("data"), units="blocks"), fz.sgd(0.1)),
        mesh={"data": -1},
    )
    state, _ = step(step.init(params()), step.local_rows(rows()))
    return zoo.tree_hash(step.params(state))


def test_a_forward_that_raises_leaves_nothing_stale(run_world):
    assert zoo.everywhere(run_world, 2, aborted) == zoo.everywhere(run_world, 2, clean)


def prefetched(ahead):
    zoo_run = zoo.train(fz.zero(zoo.source(), *zoo.tx(scale=True), stage=3, accumulate=4), {"data": 2}, prefetch=ahead)
    return zoo.bits(zoo_run)


def test_prefetch_changes_no_bit(run_world):
    assert len({h for ahead in (True, False) for h in run_world(2, prefetched, ahead)}) == 1
