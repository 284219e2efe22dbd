"""Off the narrow path (routed experts, loops, autocast, gradients within the loss) every stage, world and form gives
plain torch's value and one hash.
"""

from __future__ import annotations

import cover
import pytest
import torch
import zoo
from cover import EACH
from torch import nn

import funczero as fz
from funczero import P
from funczero.layout.processes import world_size

LR, WIDE = 0.01, 192  # a unit of 192 x 192 is sent by itself, one of 6 x 6 with others
ROWS, MICROS = 2, 4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / shape[-1] ** 0.5


def params(width, dtype=torch.float64):
    blocks = [{"w": draw(width, width, seed=i), "b": draw(width, seed=9 + i)} for i in range(3)]
    return fz.tree.map(
        lambda x: x.to(dtype), {"in": draw(6, width, seed=20), "blocks": blocks, "gain": draw(width, seed=21)}
    )


def batch():
    return {"x": draw(ROWS * MICROS, 6, seed=30), "route": torch.tensor([0, 2, 1, 3]).repeat_interleave(ROWS)}


def block(p, x):
    return x + torch.tanh(torch.sin(x @ p["w"]) @ p["w"].T + p["b"])  # reads its weight twice


# --- losses: (params, batch, remat) -> (sum, weight) ------------------------------------------------------------------
def routed(p, b, remat):
    """All rows of a micro-batch go to one expert; the last kind goes to none."""
    x, e = b["x"].to(p["in"].dtype) @ p["in"], int(b["route"][0])
    chosen = p["blocks"][e : e + 1]
    return end(p, fz.layers(block, chosen, x, remat=remat))


def dropped(p, b, remat):
    """Layers that some micro-batches skip."""
    x, e = b["x"].to(p["in"].dtype) @ p["in"], int(b["route"][0])
    return end(p, fz.layers(block, [q for i, q in enumerate(p["blocks"]) if i != e], x, remat=remat))


def looped(p, b, remat):
    """The same blocks three times, once in another order."""
    x = b["x"].to(p["in"].dtype) @ p["in"]
    for order in (1, -1, 1):
        x = fz.layers(block, p["blocks"][::order], x, remat=remat)
    return end(p, x)


def by_hand(p, b, remat):
    """A block opened by hand and by fz.layers in one forward."""
    x = fz.layers(block, p["blocks"], b["x"].to(p["in"].dtype) @ p["in"], remat=remat)
    opened = fz.gather(p["blocks"][1])
    return end(p, block(opened, block(opened, x)))


def cast(p, b, remat):
    """Autocast around blocks that read their weights twice."""
    with torch.autocast("cpu", torch.bfloat16):
        x = fz.layers(block, p["blocks"], b["x"].to(p["in"].dtype) @ p["in"], remat=remat)
        x = fz.layers(block, p["blocks"][:1], x, remat=remat)
    return end(p, x.to(p["in"].dtype))


def attack(p, b, remat):
    """FGSM: a gradient by inputs on the way, and a second forward."""
    x = (b["x"].to(p["in"].dtype) @ p["in"]).detach().requires_grad_()
    inner = fz.layers(block, p["blocks"], x, remat=remat).square().sum()
    (g,) = torch.autograd.grad(inner, x)
    return end(p, fz.layers(block, p["blocks"], b["x"].to(p["in"].dtype) @ p["in"] + 0.1 * g.sign(), remat=remat))


def kept(p, b, remat):
    """A gradient by inputs of a graph that the loss goes on to use."""
    h = b["x"].to(p["in"].dtype) @ p["in"]
    out = fz.layers(block, p["blocks"], h, remat=remat)
    (g,) = torch.autograd.grad(out.square().sum(), h, retain_graph=True)
    return end(p, fz.layers(block, p["blocks"], out, remat=remat) + g.detach())


def backwards(p, b, remat):
    """loss.backward() on the way, for a gradient by inputs."""
    x = (b["x"].to(p["in"].dtype) @ p["in"]).detach().requires_grad_()
    fz.layers(block, p["blocks"], x, remat=remat).square().sum().backward()
    return end(p, fz.layers(block, p["blocks"], b["x"].to(p["in"].dtype) @ p["in"] + x.grad, remat=remat))


def penalty(p, b, remat):
    """A penalty on the gradient by inputs: a second derivative."""
    h = b["x"].to(p["in"].dtype) @ p["in"]
    out = fz.layers(block, p["blocks"], h, remat=remat)
    (g,) = torch.autograd.grad(out.square().sum(), h, create_graph=True)
    loss, weight = end(p, out)
    return loss + g.square().sum(), weight


def end(p, x):
    return (x * p["gain"]).square().sum(), torch.full((), float(len(x)))


LOSSES = (routed, dropped, looped, by_hand, cast, attack, kept, backwards, penalty)


FORMS = {"keep": (("blocks",), False), "remat": (("blocks",), True), "whole": ((), False), "whole, remat": ((), True)}


def ways(loss, whole):
    """By world the stages and forms in which a loss is tried."""
    return cover.ways(loss.__name__, [f.__name__ for f in LOSSES], FORMS, whole, ("routed", "dropped"))


def runs(name, width, policy, ways):
    """One hash by (stage, form), and the masters. A second derivative of what runs again is refused, and checked
    here.
    """
    loss, found, masters, exact = globals()[name], {}, None, policy == "float64"
    for stage, form in ways:
        units, remat = FORMS[form]
        fn = lambda p, b, remat=remat: loss(p, b, remat)
        g = fz.value_and_grad(fn, batch=P("data"), units=units)
        parts = fz.zero(g, fz.sgd(LR, momentum=0.9), stage=stage, accumulate=MICROS // world_size())
        step = fz.train_step(*parts, mesh={"data": -1}, policy=policy)
        state = step.init(params(width, torch.float64 if exact else torch.float32))
        if loss is penalty and remat and units and stage > 1 and step.running().env.mesh.axes["data"].size > 1:
            with pytest.raises(RuntimeError, match="first-order only, but create_graph=True .* leave remat out"):
                step(state, step.local_rows(batch()))
            continue
        for _ in range(2):
            state, _ = step(state, step.local_rows(batch()))
        masters = step.params(state)
        found[stage, form] = zoo.tree_hash(masters)
    return found, [x.tolist() for x in fz.tree.leaves(masters)] if exact else None


def hashes_of(run_world, loss, width, policy, whole):
    """Of both worlds."""
    by_world = ways(loss, whole)
    found = [zoo.everywhere(run_world, w, runs, loss.__name__, width, policy, by_world[w])[0] for w in (1, 2)]
    return {h for world in found for h in world.values()}


def reference(loss, width):
    """Two updates of plain torch, by hand."""
    p = params(width)
    flat, form = fz.tree.flatten(p)
    trace = [torch.zeros_like(x) for x in flat]
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in flat]
        micros = [{k: v.chunk(MICROS)[i] for k, v in batch().items()} for i in range(MICROS)]
        sums = [loss(fz.tree.unflatten(leaves, form), m, False) for m in micros]
        total = sum(s for s, _ in sums) / sum(w for _, w in sums)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        trace = [0.9 * t if g is None else 0.9 * t + g for t, g in zip(trace, grads)]
        flat = [x - LR * t for x, t in zip(flat, trace)]
    return flat


@EACH
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_values_are_plain_torchs_at_every_stage_in_every_form_on_every_world(run_world, loss, whole):
    want, hashes = reference(loss, 6), set()
    for world, some in ways(loss, whole).items():
        found, masters = zoo.everywhere(run_world, world, runs, loss.__name__, 6, "float64", some)
        hashes |= set(found.values())
        off = max(
            float((a - torch.tensor(b, dtype=a.dtype)).abs().max() / a.abs().max()) for a, b in zip(want, masters)
        )
        assert off < (
            1e-2 if loss is cast else 1e-12
        )  # autocast rounds to bfloat16, and torch's cache rounds uses together
    assert len(hashes) == 1


@EACH
@pytest.mark.parametrize("policy", ["float32", pytest.param("params=float32,compute=bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_bits_are_one_hash(run_world, loss, policy, whole):
    assert len(hashes_of(run_world, loss, 6, policy, whole)) == 1


@EACH
@pytest.mark.parametrize("loss", [routed, dropped, looped], ids=lambda f: f.__name__)
def test_large_units_keep_one_order_of_messages(run_world, loss, whole):
    assert len(hashes_of(run_world, loss, WIDE, "float32", whole)) == 1


# --- written parameters -----------------------------------------------------------------------------------------------
def clamped(p, b):
    with torch.no_grad():
        p["in"].clamp_(-0.1, 0.1)
    return end(p, fz.layers(block, p["blocks"], b["x"].to(p["in"].dtype) @ p["in"]))


def clamped_inside(p, b, remat=False):
    def one(q, x):
        with torch.no_grad():
            q["w"][0].mul_(0.5)
        return block(q, x)

    return end(p, fz.layers(one, p["blocks"], b["x"].to(p["in"].dtype) @ p["in"], remat=remat))


def clamped_open(p, b):
    q = fz.gather(p["blocks"][2])
    with torch.no_grad():
        q["w"].zero_()
    return end(p, block(q, b["x"].to(p["in"].dtype) @ p["in"]))


def hidden(p, b):
    p["in"].data.mul_(0.5)
    return end(p, b["x"].to(p["in"].dtype) @ p["in"])


def hidden_inside(p, b):
    def one(q, x):
        q["w"].data.mul_(0.5)
        return block(q, x)

    return end(p, fz.layers(one, p["blocks"], b["x"].to(p["in"].dtype) @ p["in"]))


def module_with_max_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 4, max_norm=0.5), nn.Linear(4, 2))


def refusals():
    """What is said at every stage, by kind of write."""
    out = {}
    table = {
        "clamped": (clamped, "in"),
        "inside": (clamped_inside, "blocks/0/w"),
        "again": (lambda p, b: clamped_inside(p, b, True), "blocks/0/w"),
        "open": (clamped_open, "blocks/2/w"),
        "hidden": (hidden, "in"),
        "hidden inside": (hidden_inside, "blocks/0/w"),
    }
    for stage in range(4):
        for units in (("blocks",), ()):
            for name, (loss, path) in table.items():
                step = fz.train_step(
                    *fz.zero(fz.value_and_grad(loss, batch=P("data"), units=units), fz.sgd(0.1), stage=stage),
                    mesh={"data": -1},
                    debug="hidden" in name,
                )
                state = step.init(params(6, torch.float32))
                with pytest.raises(RuntimeError) as caught:
                    step(state, step.local_rows(batch()))
                out[stage, units, name] = f"parameter {path!r} in place" in str(caught.value) or str(caught.value)
        loss_fn, p = fz.stateless(module_with_max_norm(), lambda m, b: (m(b["route"]).square().sum(), torch.ones(())))
        step = fz.train_step(
            *fz.zero(fz.value_and_grad(loss_fn, batch=P("data")), fz.sgd(0.1), stage=stage), mesh={"data": -1}
        )
        state = step.init(p)
        with pytest.raises(
            RuntimeError,
            match="writes into parameter '0.weight' in place, but a pure loss may read its parameters alone",
        ):
            step(state, step.local_rows(batch()))
    return {k: v for k, v in out.items() if v is not True}


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_writes_its_parameters_is_refused_by_path(run_world, world):
    assert zoo.everywhere(run_world, world, refusals) == {}
