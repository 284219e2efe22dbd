"""Wires with memory: against a loop by hand, over skips, in checkpoints and other worlds, and what is refused."""

from __future__ import annotations

import pytest
import torch
import zoo

import funczero as fz
from funczero import P
from funczero.comm.wire import Memory, as_born
from funczero.testing import tree_hash
from funczero.transforms.feedback import Feedback

TWO, FOUR = {"data": 2}, {"node": 2, "local": 2}


# --- against a loop by hand -------------------------------------------------------------------------------------------
def linear():
    """One cut leaf and one that lies on every rank, a loss, and rows for two ranks with two micro-batches each."""
    g = torch.Generator().manual_seed(3)
    params = {"w": torch.randn(40, generator=g), "b": torch.randn((), generator=g)}
    loss = lambda p, b: (torch.tanh(b["x"] @ p["w"] / 6 + p["b"]).sum(), torch.full((), float(len(b["x"]))))
    return params, loss, {"x": torch.randn(8, 40, generator=g)}


def coarse(x, block=16):
    """int4 in blocks, in plain torch; parts of a leaf are padded to multiples of 16."""
    out = []
    for part in x.view(-1).split(block):
        top = part.abs().max().clamp(min=1e-30)
        out.append((part / top * 7).round() / 7 * top)
    return torch.cat(out).view(x.shape)


def by_rows(x):
    """As it travels to two ranks: each half in blocks of its own."""
    return torch.cat([coarse(part) for part in x.chunk(2)]) if x.dim() else coarse(x)


def sums_by_hand(decay, every, updates, lr=0.5):
    params, loss, batch = linear()
    masters = {n: x.clone() for n, x in params.items()}
    errors = [{n: torch.zeros_like(x) for n, x in params.items()} for _ in range(2)]
    for t in range(updates):
        total = {n: torch.zeros_like(x) for n, x in params.items()}
        for rank, rows in enumerate(batch["x"].chunk(2)):
            leaves = {n: x.clone().requires_grad_() for n, x in masters.items()}
            found = torch.autograd.grad(loss(leaves, {"x": rows})[0], list(leaves.values()))
            for n, g in zip(leaves, found, strict=True):
                sent = g + errors[rank][n]
                read = by_rows(sent)
                total[n] += read
                errors[rank][n] = decay * errors[rank][n] + (1 - decay) * (sent - read)
                if every and (t + 1) % every == 0:
                    errors[rank][n].zero_()
        masters = {n: x - lr * total[n] / 8 for n, x in masters.items()}
    return masters, errors


def trained(stage, wires, updates):
    params, loss, batch = linear()
    parts = fz.zero(fz.value_and_grad(loss, batch=P("data")), fz.sgd(0.5), stage=stage, **wires)
    step = fz.train_step(*parts, mesh=TWO)
    state = step.init(params)
    for _ in range(updates):
        state, _ = step(state, step.local_rows(batch))
    return step, state


def summed(decay, every, updates):
    """By stage: the masters, and this rank's memory."""
    out = []
    for stage in range(4):
        wire = fz.feedback(fz.int4(16), decay=decay, every=every)
        step, state = trained(stage, {"scatter": wire}, updates)
        own = state.chain["feedback@data"]
        out.append((step.params(state), dict(zip(("w", "b"), own.errors.leaves(), strict=True)), int(own.count)))
    return out


@pytest.mark.parametrize(("decay", "every"), [(0.0, 0), (0.75, 0), (0.0, 3)])
def test_sums_remember_what_a_loop_by_hand_does(run_world, decay, every):
    masters, errors = sums_by_hand(decay, every, 5)
    exact = sums_by_hand(0.0, 1, 5)[0]
    for rank, found in enumerate(run_world(2, summed, decay, every, 5)):
        for got, memory, count in found:
            assert count == (5 % every if every else 5)
            for n, x in masters.items():
                torch.testing.assert_close(got[n], x, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(memory[n], errors[rank][n], rtol=1e-4, atol=1e-5)
    assert (masters["w"] - exact["w"]).abs().max() > 1e-4


def views_by_hand(updates, lr=0.5):
    params, loss, batch = linear()
    masters, held = ({n: x.clone() for n, x in params.items()} for _ in range(2))
    for _ in range(updates):
        leaves = {n: x.clone().requires_grad_() for n, x in held.items()}
        found = torch.autograd.grad(loss(leaves, batch)[0], list(leaves.values()))
        masters = {n: x - lr * g / 8 for (n, x), g in zip(masters.items(), found, strict=True)}
        held = {n: held[n] + by_rows(x - held[n]) if x.dim() else x.clone() for n, x in masters.items()}
    return masters, held


def viewed(updates):
    out = []
    for stage in (1, 2):
        step, state = trained(stage, {"gather": fz.difference(fz.int4(16))}, updates)
        out.append((step.params(state), step.view(state)))
    return out


def test_views_follow_as_in_a_loop_by_hand(run_world):
    masters, held = views_by_hand(5)
    for found in run_world(2, viewed, 5):
        for got, views in found:
            for n, x in masters.items():
                torch.testing.assert_close(got[n], x, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(views[n].detach(), held[n], rtol=1e-5, atol=1e-6)
    assert 1e-6 < (masters["w"] - held["w"]).abs().max() < 0.1


# --- chains of the zoo: skips, checkpoints, worlds --------------------------------------------------------------------
def zeropp(k=1, stream=False):
    """Both memories, over two axes."""
    g = zoo.source(("node", "local"))
    acc = (fz.accumulate(k, stream=True),) if stream else k
    sums = (fz.feedback(fz.int8(16)), fz.feedback(fz.int4(16), decay=0.5))
    return fz.zeropp(g, *zoo.tx(), weights=fz.difference(fz.int4(16)), gradients=sums, accumulate=acc)


def memories(state):
    return tree_hash([x for x in state.chain.values() if isinstance(x, Feedback)]), tree_hash(state.views)


def skipping():
    """The update that overflows leaves every memory as it was; the next one goes on."""
    step = fz.train_step(*zeropp(k=2), mesh=FOUR)
    state, seen = step.init(zoo.params(), key=7), []
    for t in range(zoo.UPDATES):
        before = memories(state)
        state, m = step(state, step.local_rows(zoo.batch(t)))
        seen.append((bool(m.ok), memories(state) == before))
    finite = all(x.isfinite().all() for x in fz.tree.leaves(state) if isinstance(x, torch.Tensor))
    return seen, finite, tree_hash(step.params(state))


def test_a_skip_keeps_every_memory(run_world):
    for seen, finite, _ in run_world(4, skipping):
        assert seen == [(t != zoo.BAD, t == zoo.BAD) for t in range(zoo.UPDATES)] and finite


def donated_and_streamed():
    """Neither where the memory lies nor how micro-batches come changes a bit."""
    hashes = []
    for donate, stream in ((False, 0), (True, 0), (False, 2)):
        run = zoo.train(zeropp(2, bool(stream)), FOUR, stream=stream, updates=2, donate=donate, micros=8)
        hashes.append((tree_hash(run[0]), memories(run[2])))
    return hashes


def test_donated_and_streamed_steps_have_the_same_bits(run_world):
    for hashes in run_world(4, donated_and_streamed):
        assert len(set(hashes)) == 1


def saved(folder):
    """Four updates, a checkpoint after two, and the run that goes on from it; also a state whose tensors are copies."""
    step = fz.train_step(*zeropp(), mesh=FOUR)
    state, kept = step.init(zoo.params(), key=7), None
    for t in range(4):
        if t == 2:
            kept = fz.tree.clone(state)
            with fz.Checkpointer(folder) as ck:
                ck.save(state, 2)
        state, _ = step(state, step.local_rows(zoo.batch(t, micros=4)))
    out = [(tree_hash(step.params(state)), memories(state))]
    with fz.Checkpointer(folder) as ck:
        restored = ck.restore(like=(step, zoo.params())).state
    for other in (restored, kept):
        for t in (2, 3):
            other, _ = step(other, step.local_rows(zoo.batch(t, micros=4)))
        out.append((tree_hash(step.params(other)), memories(other)))
    return out


def elsewhere(folder, mesh):
    """Restored by other ranks, and handed over in memory from there: the sums of all memories, and their notes."""
    step = fz.train_step(*zeropp(), mesh=mesh)
    with fz.Checkpointer(folder) as ck:
        found = ck.restore(like=(step, zoo.params()))
    state = found.state
    step(state, step.local_rows(zoo.batch(2, micros=4)))
    sums = {n: [x.double().sum().item() for x in own.errors.buffers] for n, own in state.chain.items() if n[0] == "f"}
    return sums, list(found.notes), tree_hash(step.params(state)), tree_hash(fz.tree.leaves(step.whole_views(state)))


def test_a_checkpoint_holds_memories_in_any_world(run_world, tmp_path):
    for first, *others in run_world(4, saved, str(tmp_path)):
        assert all(x == first for x in others)
    here = run_world(4, elsewhere, str(tmp_path), FOUR)
    fewer = run_world(2, elsewhere, str(tmp_path), {"node": 2, "local": 1})
    more = run_world(4, elsewhere, str(tmp_path), {"node": 4, "local": 1})
    total = lambda ranks: torch.tensor([sum(x) for x in zip(*(r[0]["feedback@node"] for r in ranks), strict=True)])
    for there in (fewer, more):
        torch.testing.assert_close(total(there), total(here), rtol=1e-4, atol=1e-5)
        assert {r[2:] for r in here} == {r[2:] for r in there}
        assert any("'feedback@local' of the checkpoint is not in this chain" in n for n in there[0][1])
    added = "'feedback@node' was kept by another number of ranks: theirs are added, and the first one has the sum"
    assert [added in ranks[0][1] for ranks in (here, fewer, more)] == [False, False, True]
    assert all(not any(map(any, [r[0]["feedback@node"]])) for r in more[1:])


def replaced():
    """New masters under old views: what is read are the new ones."""
    step = fz.train_step(*zeropp(), mesh=FOUR)
    state = step.init(zoo.params(), key=7)
    for t in range(2):
        state, _ = step(state, step.local_rows(zoo.batch(t, micros=4)))
    other = state._replace(params=state.params.map(lambda x: x * 2))
    views, masters = fz.tree.leaves(step.view(other)), fz.tree.leaves(step.params(other))
    return all(torch.equal(a.detach(), b) for a, b in zip(views, masters, strict=True))


def test_replaced_masters_are_read(run_world):
    assert all(run_world(4, replaced))


def alike(a, b):
    return all(torch.equal(x.detach(), y.detach()) for x, y in zip(*map(fz.tree.leaves, (a, b)), strict=True))


def replaced_in_a_stream():
    """Every micro-batch after the first one reads the new masters, too."""
    acc = (fz.accumulate(2, stream=True),)
    parts = fz.zero(zoo.source(), *zoo.tx(), stage=2, accumulate=acc, gather=fz.difference(fz.int4(16)))
    step = fz.train_step(*parts, mesh=TWO)
    state, rows = step.init(zoo.params(), key=7), zoo.split(step.local_rows(zoo.batch(0, micros=4)), 2)
    for batch in (*rows, None):
        state, _ = step(state, batch)
    state, _ = step(state._replace(params=state.params.map(lambda x: x * 2)), rows[0])
    return alike(step.view(state), step.params(state))


def given_to_another():
    """A state of a step whose views remember, given to one whose views do not, and the other way round."""
    g, tx = zoo.source(), zoo.tx()
    steps = [
        fz.train_step(*fz.zero(g, *tx, stage=2, **how), mesh=TWO)
        for how in ({"gather": fz.difference(fz.int4(16))}, {})
    ]
    out = []
    for first, second in (steps, steps[::-1]):
        state = first.init(zoo.params(), key=7)
        state, _ = first(state, first.local_rows(zoo.batch(0, micros=2)))
        reads_masters = alike(second.view(state), second.params(state))
        state, _ = second(state, second.local_rows(zoo.batch(1, micros=2)))
        exact = alike(second.view(state), second.params(state))
        again = alike(second.view(fz.tree.clone(state)), second.view(state))  # as after a restore
        out.append((reads_masters, exact, state.views.where.memory, again))
    return out


def test_views_are_those_of_the_step_that_reads(run_world):
    assert all(run_world(2, replaced_in_a_stream))
    for out in run_world(2, given_to_another):
        assert out == [(True, True, False, True), (True, False, True, True)]


def handed_over():
    """To another stage and back, in memory."""
    g, wire = zoo.source(), fz.feedback(fz.int4(16))
    steps = [
        fz.train_step(*fz.zero(g, *zoo.tx(), stage=s, scatter=wire, gather=fz.difference(fz.int4(16))), mesh=TWO)
        for s in (1, 2)
    ]
    out = []
    for path in ((0, 0, 0), (0, 1, 0)):
        state, last = steps[0].init(zoo.params(), key=7), 0
        for t, i in enumerate(path):
            state, last = state if i == last else fz.reshard(state, steps[i]), i
            state, _ = steps[i](state, steps[i].local_rows(zoo.batch(t, micros=2)))
        out.append((tree_hash(steps[last].params(state)), memories(state)))
    return out


def test_a_memory_is_handed_over(run_world):
    for first, second in run_world(2, handed_over):
        assert first == second


def whole_tree_is_one_tensor(folder):
    """Their name on disk has no path behind it."""
    loss = lambda p, b: ((b["x"] @ p).square().sum(), torch.full((), float(len(b["x"]))))
    rows, out = {"x": torch.linspace(-1, 1, 8 * 40).view(8, 40).sin()}, []
    g = fz.value_and_grad(loss, batch=P("data"))
    step = fz.train_step(*fz.zero(g, fz.sgd(0.1), stage=1, gather=fz.difference(fz.int4(16))), mesh=TWO)
    state = step.init(torch.linspace(0.3, 1, 40))
    for t in range(4):
        if t == 2:
            with fz.Checkpointer(folder) as ck:
                ck.save(state, 2)
        state, _ = step(state, step.local_rows(rows))
    out.append((tree_hash(step.params(state)), memories(state)))
    with fz.Checkpointer(folder) as ck:
        state = ck.restore(like=(step, torch.zeros(40))).state
    for _ in range(2):
        state, _ = step(state, step.local_rows(rows))
    return [*out, (tree_hash(step.params(state)), memories(state))]


def test_a_tree_that_is_one_tensor_has_its_views_back(run_world, tmp_path):
    for first, second in run_world(2, whole_tree_is_one_tensor, str(tmp_path)):
        assert first == second


# --- what is refused, and what is said --------------------------------------------------------------------------------
G, TX = zoo.source(), zoo.tx()
keeps = lambda keep: fz.int4()._replace(name="w", memory=Memory(keep))
built = lambda wire: fz.train_step(*fz.zero(G, *TX, stage=2, scatter=wire), mesh=TWO)
BAD = {
    "wire 'w': keep gives torch.float64 of shape (96,) for torch.float32 of shape (96,)": lambda: built(
        keeps(lambda sent, read, old: (sent - read).double())
    ),
    "wire 'w': keep writes into the values that it is given; return new ones": lambda: built(
        keeps(lambda sent, read, old: sent.sub_(read))
    ),
    "wire 'w': keep remembers something of values that were read as they were sent": lambda: built(
        keeps(lambda sent, read, old: sent)
    ),
    "feedback: as_born rounds nothing": lambda: fz.feedback(as_born),
    "feedback: 'int4' is no wire": lambda: fz.feedback("int4"),
    "feedback: decay=1 is no share": lambda: fz.feedback(fz.int4(), decay=1),
    "feedback: every=-1 is no number of sums": lambda: fz.feedback(fz.int4(), every=-1),
    "difference: feedback(int4(512)) has memory already": lambda: fz.difference(fz.feedback(fz.int4())),
    "gather=feedback(int4(512)) over 'data': it keeps the error of a sum, and views are no sum": lambda: fz.train_step(
        *fz.zero(G, *TX, stage=2, gather=fz.feedback(fz.int4())), mesh=TWO
    ),
    "scatter=difference(int4(512)) over 'data': it sends what is new against the values that its readers hold": (
        lambda: fz.train_step(*fz.zero(G, *TX, stage=2, scatter=fz.difference(fz.int4())), mesh=TWO)
    ),
    "shard('data'): difference(int4(512)) sends what is new since the last time, once an update, but parameters that": (
        lambda: fz.train_step(*fz.zero(G, *TX, stage=3, gather=fz.difference(fz.int4())), mesh=TWO)
    ),
    "all_gather('data', wire=difference(int4(512))): difference(int4(512)) sends what is new": lambda: fz.train_step(
        G, fz.reduce_scatter("data"), fz.all_gather("data", wire=fz.difference(fz.int4())), *TX, mesh=TWO
    ),
}


@pytest.mark.parametrize("why", BAD)
def test_a_memory_that_cannot_be_right_is_refused(why):
    with pytest.raises((fz.ChainError, TypeError, ValueError)) as e:
        BAD[why]()
    assert why in str(e.value)


def test_an_axis_of_one_has_no_memory():
    parts = fz.zero(zoo.source(), *zoo.tx(), stage=2, scatter=fz.feedback(fz.int4()), gather=fz.difference(fz.int4()))
    plain = fz.zero(zoo.source(), *zoo.tx(), stage=2)
    runs = [zoo.train(p, {"data": 1}, updates=3) for p in (parts, plain)]
    assert zoo.bits(runs[0]) == zoo.bits(runs[1]) and "feedback@data" not in runs[0][2].chain


def test_a_transform_called_views_is_no_memory(tmp_path):
    """Views that follow from the masters are filled from them, whatever a transform of the chain is called."""
    pair = fz.lift(fz.sgd(0.1, momentum=0.9), name="views", elementwise=True)
    step = fz.train_step(*fz.zero(zoo.source(), pair, stage=1), mesh={"data": 1}, policy="params=float32,compute=bf16")
    state = step.init(zoo.params(), key=7)
    state, _ = step(state, step.local_rows(zoo.batch(0)))
    with fz.Checkpointer(tmp_path) as ck:
        ck.save(state, 1)
        found = ck.restore(like=(step, zoo.params())).state
    assert tree_hash(found.views) == tree_hash(state.views) and tree_hash(found.chain) == tree_hash(state.chain)
