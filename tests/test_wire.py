"""Wires of a user's own: at every stage, with units and without, both ways; what they may not do, and what they say of
themselves.
"""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P
from funczero.comm.edge import Edge, joined
from funczero.comm.wire import as_born

TWO, FOUR = {"data": 2}, {"node": 2, "local": 2}


# --- wires in ten lines -----------------------------------------------------------------------------------------------
def truncated():
    """The upper half of float32: bfloat16 rounded towards zero."""
    return fz.Wire(
        "upper half",
        lambda x, lengths, key: (x.float().view(torch.int32) >> 16).to(torch.int16),
        lambda sent, lengths, dtype: (sent.to(torch.int32) << 16).view(torch.float32).to(dtype),
        lambda lengths, dtype: 2 * sum(lengths),
    )


def bytes_by_slot():
    """One scale and int8 a slot."""

    def pack(x, lengths, key):
        tops = [part.abs().amax().view(1) for part in x.float().split(lengths)]
        whole = [
            (part / top.clamp(min=1e-30) * 127).round().to(torch.int8)
            for part, top in zip(x.float().split(lengths), tops)
        ]
        return torch.cat([*(top.view(torch.uint8) for top in tops), *(q.view(torch.uint8) for q in whole)])

    def unpack(sent, lengths, dtype):
        tops = sent[: 4 * len(lengths)].view(torch.float32)
        parts = sent[4 * len(lengths) :].view(torch.int8).split(lengths)
        return torch.cat([q / 127 * top for q, top in zip(parts, tops)]).to(dtype)

    return fz.Wire("int8 by slot", pack, unpack, lambda lengths, dtype: sum(4 + n for n in lengths))


def dithered():
    """Steps of 1/256, rounded at random by the key."""

    def pack(x, lengths, key):
        noise = torch.rand(x.shape, generator=fz.rng.generator(key, x.device))
        return (x.float() * 256 + noise).floor()

    return fz.Wire(
        "dithered", pack, lambda sent, lengths, dtype: (sent / 256).to(dtype), lambda lengths, dtype: 4 * sum(lengths)
    )


def same():
    """The identity, through the whole machinery."""
    return as_born._replace(name="same")


WIRES = {
    "upper half": truncated,
    "int8 by slot": bytes_by_slot,
    "dithered": dithered,
    "same": same,
    "cast": lambda: fz.cast(torch.bfloat16),
    "int8": lambda: fz.int8(16),
    "int4, stochastic": lambda: fz.int4(32, stochastic=True, hadamard=16),
    "feedback": lambda: fz.feedback(fz.int4(16), decay=0.25, every=2),
    "difference": lambda: fz.difference(fz.int4(16)),
}


# --- every stage, with units and without, both ways -------------------------------------------------------------------
def by_stage(way, name, units, updates=3):
    """One hash a stage of masters, moments, metrics and an evaluation."""
    out, wire = {}, WIRES[name]()
    last = 3 if name == "difference" else 4  # at stage 3 views are gathered more than once an update
    for stage in range(1, last) if way == "gather" else range(4):
        parts = fz.zero(zoo.source(units=units), *zoo.tx(), stage=stage, **{way: wire})
        run = zoo.train(parts, TWO, updates=updates, micros=2)
        _, _, state, step = run
        loss = step.eval(zoo.loss_plain)(state, step.local_rows(zoo.batch(9, micros=2)))
        out[stage] = zoo.bits(run), loss.loss.item() if way == "gather" and stage else None
    return out


TRIED = [
    ("upper half", ()),
    ("upper half", ("blocks",)),
    ("int8 by slot", ("blocks",)),
    ("dithered", ()),
    ("dithered", ("blocks",)),
    ("cast", ("blocks",)),
    ("int8", ("blocks",)),
    ("int4, stochastic", ("blocks",)),
]
QUICK = [("gather", "int8", ("blocks",)), ("scatter", "int4, stochastic", ("blocks",)), ("scatter", "upper half", ())]
BOTH = [
    (way, *tried) if (way, *tried) in QUICK else pytest.param(way, *tried, marks=pytest.mark.slow)
    for way in ("gather", "scatter")
    for tried in TRIED
]
MEMORY = [("scatter", "feedback", ()), ("scatter", "feedback", ("blocks",)), ("gather", "difference", ("blocks",))]


@pytest.mark.parametrize(("way", "name", "units"), [*BOTH, *MEMORY])
def test_a_wire_gives_the_same_bits_at_every_stage(run_world, way, name, units):
    found = zoo.everywhere(run_world, 2, by_stage, way, name, units)
    assert len(set(found.values())) == 1, found


def plain(**how):
    """Without a wire, and through the identity."""
    parts = lambda **wires: fz.zero(zoo.source(), *zoo.tx(), stage=3, accumulate=2, **wires)
    return [
        zoo.bits(zoo.train(parts(**w), TWO, updates=4, micros=4))
        for w in ({}, {"gather": same(), "scatter": same()}, {"gather": truncated()})
    ]


def test_the_identity_is_bitwise_no_wire_and_a_lossy_one_is_not(run_world):
    without, through, lossy = zoo.everywhere(run_world, 2, plain)
    assert without == through != lossy


def nested(name):
    """The same wires on both axes, wherever brackets open."""
    w, g, tx = WIRES[name](), zoo.source(("node", "local")), zoo.tx()
    both = lambda axis, *inside: fz.shard(axis, *inside, gather=w, scatter=w)
    chains = {
        "ZeRO-1": (g, both("local", both("node", *tx))),
        "hpZ": (both("local", g, both("node", *tx)),),
        "ZeRO-3": (both("local", both("node", g, *tx)),),
        "ZeRO-3 remat": (both("local", both("node", zoo.source(("node", "local"), zoo.loss_remat), *tx)),),
    }
    return {n: zoo.bits(zoo.train(parts, FOUR, updates=3, micros=4)) for n, parts in chains.items()}


@pytest.mark.parametrize("name", [pytest.param("int8 by slot", marks=pytest.mark.slow), "dithered"])
def test_nested_brackets_pack_alike(run_world, name):
    found = zoo.everywhere(run_world, 4, nested, name)
    assert len(set(found.values())) == 1, found


# --- against a reference by hand --------------------------------------------------------------------------------------
def linear():
    """Parameters of one cut leaf and one that lies on every rank, a loss, and its gradient by rows."""
    g = torch.Generator().manual_seed(3)
    params = {"w": torch.randn(6, generator=g), "b": torch.randn((), generator=g)}
    loss = lambda p, b: (torch.tanh(b["x"] @ p["w"] + p["b"]).sum(), torch.full((), float(len(b["x"]))))
    return params, loss, {"x": torch.randn(8, 6, generator=g)}


def by_hand(way, updates, lr=0.5):
    """The upper half of every gradient, or of every view that travels, in plain torch."""
    params, loss, batch = linear()
    half = lambda x: (x.view(torch.int32) >> 16 << 16).view(torch.float32)
    w, b = params["w"].clone(), params["b"].clone()
    for _ in range(updates):
        total = [torch.zeros(6), torch.zeros(())]
        for rows in batch["x"].chunk(2):
            leaves = [(half(w) if way == "gather" else w.clone()).requires_grad_(), b.clone().requires_grad_()]
            found = torch.autograd.grad(loss({"w": leaves[0], "b": leaves[1]}, {"x": rows})[0], leaves)
            total = [t + (half(x) if way == "scatter" else x) for t, x in zip(total, found, strict=True)]
        w, b = w - lr * (total[0] / 8), b - lr * (total[1] / 8)
    return torch.cat([w, b.view(1)])


def trained(way, stage, updates):
    params, loss, batch = linear()
    parts = fz.zero(
        fz.value_and_grad(loss, batch=P("data")), fz.sgd(0.5), stage=stage, **{way: truncated()} if way else {}
    )
    step = fz.train_step(*parts, mesh=TWO)
    state = step.init(params)
    for _ in range(updates):
        state, _ = step(state, step.local_rows(batch))
    whole = step.params(state)
    return torch.cat([whole["w"], whole["b"].view(1)]).tolist()


@pytest.mark.parametrize("way", ["gather", "scatter"])
def test_values_are_those_of_the_loop_by_hand(run_world, way):
    want, exact = by_hand(way, 5), zoo.everywhere(run_world, 2, trained, None, 3, 5)
    for stage in range(1, 4) if way == "gather" else range(4):
        got = torch.tensor(zoo.everywhere(run_world, 2, trained, way, stage, 5))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        assert (got - torch.tensor(exact)).abs().max() > 1e-4


def both_ways(axis_wire):
    """all_reduce with a wire packs the parts and the sum."""
    g = fz.value_and_grad(lambda p, b: ((p["w"] * b["x"][0]).sum(), torch.ones(())), batch=P("data"))
    sums = zoo.Sums(
        g,
        fz.all_reduce("data", wire=truncated()),
        mesh=TWO,
        tree={"w": torch.zeros(6, dtype=torch.float32)},
        policy="float32",
    )
    rank = sums.mesh.index("data")
    with fz.count_bytes(sums.mesh) as sent:
        out = sums({"x": torch.full((1, 6), 1.0 + (rank + 1) / 512)})
    return out.grads.leaves()[0].tolist(), dict(sent)


def test_an_all_reduce_packs_the_parts_and_the_sum(run_world):
    half = (
        lambda x: torch.tensor(x)
        .view(torch.int32)
        .bitwise_right_shift(16)
        .bitwise_left_shift(16)
        .view(torch.float32)
        .item()
    )
    want = half(half(1 + 1 / 512) + half(1 + 2 / 512))
    for values, sent in run_world(2, both_ways, None):
        assert values == [want] * 6 and want != 2 + 3 / 512
        assert sent == {("data", "reduce_scatter", "upper half"): 2 * 16, ("data", "all_gather", "upper half"): 2 * 16}


# --- bytes ------------------------------------------------------------------------------------------------------------
def counted(stage):
    """Bytes of one update by (verb, wire), and by the wire's closed form over the slots that travel."""
    w = bytes_by_slot()
    step = fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=stage, gather=w, scatter=w), mesh=TWO)
    state = step.init(zoo.params())
    with fz.count_bytes(step) as sent:
        step(state, step.local_rows(zoo.batch(0, micros=2)))
    where, opens = state.params.where, {"": 1, "blocks/0": 2, "blocks/1": 3, "blocks/2": 2}
    gathered, scattered = 0, 0
    for u, members in enumerate(where.structure.members):
        slots = sorted(
            (where.slots[i].offset, where.slots[i].length, where.structure.leaves[i].cut("data").replicated)
            for i in members
        )
        cut = tuple(n for _, n, whole in slots if n and not whole)
        gathered += w.nbytes(cut, torch.float32) * (opens[where.structure.units[u].name] if stage == 3 else 1)
        scattered += w.nbytes(tuple(n for _, n, _ in slots if n), torch.float32)
    return (
        {k[1]: n for k, n in sent.items() if k[2] == w.name},
        {"all_gather": gathered, "reduce_scatter": scattered},
        {k[2] for k in sent},
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bytes_are_the_wires_own(run_world, stage):
    sent, want, forms = zoo.everywhere(run_world, 2, counted, stage)
    assert sent == want and forms == {
        "int8 by slot",
        "int64",
    }  # nothing but losses, weights and the norm travels otherwise


# --- views and masters ------------------------------------------------------------------------------------------------
def restored(folder, name):
    """Four updates at stage 1; two there and two at stage 3, through a checkpoint. Masters that are read are exact."""
    w, hashes = WIRES[name](), []
    parts = lambda stage: fz.zero(zoo.source(), *zoo.tx(), stage=stage, gather=w, scatter=w)
    step = fz.train_step(*parts(1), mesh=TWO)
    state = step.init(zoo.params(), key=7)
    exact = all(
        torch.equal(a, b) for a, b in zip(fz.tree.leaves(step.params(state)), fz.tree.leaves(zoo.params()), strict=True)
    )
    for t in range(4):
        if t == 2:
            with fz.Checkpointer(folder) as ck:
                ck.save(state, 2)
        state, _ = step(state, step.local_rows(zoo.batch(t, micros=2)))
    hashes.append(zoo.tree_hash(step.params(state)))
    for stage in (1, 3):
        other = fz.train_step(*parts(stage), mesh=TWO)
        with fz.Checkpointer(folder) as ck:
            state = ck.restore(like=(other, zoo.params())).state
        for t in (2, 3):
            state, _ = other(state, other.local_rows(zoo.batch(t, micros=2)))
        hashes.append(zoo.tree_hash(other.params(state)))
    return exact, hashes


@pytest.mark.parametrize("name", ["int8 by slot", "dithered"])
def test_a_restore_goes_on_bit_for_bit_and_masters_are_exact(run_world, tmp_path, name):
    exact, hashes = zoo.everywhere(run_world, 2, restored, str(tmp_path), name)
    assert exact and len(set(hashes)) == 1, hashes


# --- what is refused, and what is said --------------------------------------------------------------------------------
def wired(**change):
    return truncated()._replace(name="w", **change)


def memo():
    calls = []
    return lambda x, lengths, key: calls.append(0) or x.half() + len(calls)


def no_cast(x, lengths, key):
    raise NotImplementedError("no such cast")


BAD = {
    "torch.bfloat16 is no wire; write a Wire, as fz.cast('bfloat16')": lambda: torch.bfloat16,
    "pack gives 192 bytes as (96,) for slots of (48, 16, 32), but nbytes says 96;"
    " give one flat buffer of as many bytes": lambda: wired(nbytes=lambda n, d: sum(n)),
    "pack gives other bytes for the same values; draw from fz.rng.generator(key) alone": (
        lambda: fz.cast("fp16")._replace(pack=memo())
    ),
    "it cannot pack float32 values on cpu (no such cast); write one that it can, as fz.int8(2048)": (
        lambda: fz.cast("fp16")._replace(pack=no_cast)
    ),
    "pack writes into the values that it is given; return new ones": (
        lambda: fz.cast("fp16")._replace(pack=lambda x, n, k: x.mul_(2).half())
    ),
    "unpack gives (96,) of torch.bfloat16, but it was asked for (96,) of torch.float32;"
    " read what was sent in that dtype": (
        lambda: fz.cast("bf16")._replace(unpack=lambda sent, n, d: sent)
    ),
    "a leaf's values depend on its neighbours', so replicas of a leaf that is not cut would differ;"
    " pack every slot by itself": (
        lambda: fz.cast("fp16")._replace(pack=lambda x, n, k: (x / x.abs().max()).half())
    ),
    "zeros do not read as zeros, and a leaf that the loss does not use is all zeros;"
    " where a scale is taken, divide by at least a smallest one": (
        lambda: fz.cast("fp16")._replace(pack=lambda x, n, k: torch.cat([p / p.abs().max() for p in x.split(n)]).half())
    ),
    "nan reads as a finite value, so an overflow would be applied; let its block read as nan": (
        lambda: fz.cast("fp16")._replace(pack=lambda x, n, k: x.nan_to_num().half())
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", ["gather", "scatter"])
@pytest.mark.parametrize("why", BAD)
def test_a_wire_that_breaks_a_law_is_refused_where_the_chain_is_built(why, way):
    with pytest.raises(fz.ChainError) as e:
        fz.train_step(fz.shard("data", zoo.source(), *zoo.tx(), **{way: BAD[why]()}), mesh={"data": 4})
    assert why in str(e.value)


def test_an_axis_has_one_wire_for_each_way():
    a, b = fz.cast("bf16"), truncated()
    with pytest.raises(
        fz.ChainError,
        match=r"the gather over 'data' has a wire already \(cast\(bfloat16\)\), and is given another \(upper half\)",
    ):
        fz.train_step(fz.shard("data", zoo.source(), fz.shard("data", *zoo.tx(), gather=b), gather=a), mesh=TWO)
    with pytest.raises(
        fz.ChainError, match=r"reduce_scatter\('data', wire=upper half\): the scatter over 'data' has a wire already"
    ):
        fz.train_step(
            zoo.source(), fz.all_reduce("data", wire=a), fz.reduce_scatter("data", wire=b), *zoo.tx(), mesh=TWO
        )
    with pytest.raises(ValueError, match="the gather over 'x' has a wire already"):
        joined([Edge("x", gather=a), Edge("x", gather=a)])
    assert joined([Edge("x", gather=a), Edge("x", scatter=b)]) == {"x": Edge("x", gather=a, scatter=b)}


def test_what_would_not_pack_is_refused():
    with pytest.raises(
        fz.ChainError,
        match=(
            "sums='backend' over 'data': the backend adds what is on the wire, and upper half packs it; leave one of"
            " them out"
        ),
    ):
        fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=2, scatter=truncated()), mesh=TWO, sums="backend")
    with pytest.raises(
        ValueError,
        match="zero: gather=upper half packs views, and none travels at stage 0; leave it out, or write stage=1",
    ):
        fz.zero(zoo.source(), *zoo.tx(), stage=0, gather=truncated())
    with pytest.raises(ValueError, match="zero: frozen=upper half packs views, and none travels at stage 0"):
        fz.zero(zoo.source(), *zoo.tx(), stage=0, frozen=truncated())
    with pytest.raises(ValueError, match="cast: 'int3' is not a dtype of training"):
        fz.cast("int3")


def test_wires_are_printed_and_an_axis_of_one_says_that_nothing_travels():
    g, w = zoo.source(("node", "local")), fz.cast("bf16")
    step = fz.train_step(
        fz.shard("local", g, fz.all_reduce("node", wire=w), *zoo.tx(), gather=truncated()), mesh={"node": 1, "local": 2}
    )
    text = str(step)
    assert "shard('local', gather=upper half,\n" in text and "all_reduce('node', wire=cast(bfloat16))" in text
    assert (
        "note: what travels over 'local' is packed (gather=upper half): all ranks read the same, and other bits than"
        " those of the chain without wires"
        in text
    )
    assert (
        "note: nothing travels over 'node', whose size is 1, so gather=cast(bfloat16), scatter=cast(bfloat16) packs"
        " nothing there"
        in text
    )
    assert "wire" not in str(fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=3), mesh=TWO))


def test_over_one_rank_a_wire_is_the_identity():
    hashes = {
        zoo.bits(zoo.train(fz.zero(zoo.source(), *zoo.tx(), stage=3, **w), {"data": 1}, updates=2))
        for w in ({}, {"gather": truncated(), "scatter": truncated()})
    }
    assert len(hashes) == 1


def test_a_cast_counts_its_own_bytes():
    w = fz.cast("bfloat16")
    x = torch.linspace(-1, 1, 48)
    sent = w.pack(x, (16, 32), 0)
    assert sent.nbytes == w.nbytes((16, 32), torch.float32) == 96 and torch.equal(
        w.unpack(sent, (16, 32), torch.float32), x.bfloat16().float()
    )


def handed_over(name):
    """Four updates at stage 3; two there and two at stage 1, handed over in memory."""
    w, hashes = WIRES[name](), []
    steps = {s: fz.train_step(*fz.zero(zoo.source(), *zoo.tx(), stage=s, gather=w), mesh=TWO) for s in (3, 1)}
    for last in (3, 1):
        state, step = steps[3].init(zoo.params(), key=7), steps[3]
        for t in range(4):
            if t == 2 and last != 3:
                state, step = fz.reshard(state, steps[last]), steps[last]
            state, _ = step(state, step.local_rows(zoo.batch(t, micros=2)))
        hashes.append(zoo.tree_hash(step.params(state)))
    return hashes


@pytest.mark.parametrize("name", ["upper half", "dithered"])
def test_a_state_that_is_handed_over_is_seen_through_the_wire(run_world, name):
    first, second = zoo.everywhere(run_world, 2, handed_over, name)
    assert first == second
